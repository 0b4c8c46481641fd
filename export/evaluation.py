# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a job's recipe, of rows that are looked up in tables at hand instead of pulled from shards.

Invariant: batches, transforms and metrics are those of training, so of the tables of a checkpoint it finds what the evaluation of
that cut found, apart from the order of a few sums. The job's data have to be where they were. One thread.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.files import files_from_json
from oarlock.data.reader import open_reader
from oarlock.data.scores import Scores
from oarlock.data.splits import plan_splits
from oarlock.embedding.frozen import FrozenTable
from oarlock.nn import Program
from oarlock.proto.errors import InvalidArgument
from oarlock.worker.recipe import Example, Labelled, Summed, load_recipe


def evaluate(
    spec: JobSpec, tables: Mapping[str, FrozenTable], parameters: Mapping[str, NDArray[np.float32]]
) -> dict[str, float | None]:
    """Return the job's metrics by name, over all of its evaluation files."""
    if not spec.evaluation_files:
        raise InvalidArgument(f"job {spec.name} has no evaluation files")
    workload = load_recipe(spec.recipe).workload(spec)
    workload.start()
    program = workload.model.bind(workload.max_samples)
    for name, values in parameters.items():
        program.parameters[name][...] = values
    scores, sums = Scores(), np.zeros(1 + len(spec.metrics))
    reader = open_reader("arrow")
    for plan in plan_splits(files_from_json(list(spec.evaluation_files)), spec.evaluation_rows_per_split):
        rows = reader.read(plan, list(workload.evaluation_columns))
        for batch in workload.evaluation(rows):
            found = score(program, tables, batch.example)
            if isinstance(workload, Labelled):
                scores.add(found, workload.labels(batch))
            elif isinstance(workload, Summed):
                sums += workload.sums(batch, found)
    if isinstance(workload, Labelled):
        metrics = scores.metrics()
        return {name: metrics[name] for name in spec.metrics}
    return {name: float(sums[1 + i] / sums[0]) if sums[0] else None for i, name in enumerate(spec.metrics)}


def score(program: Program, tables: Mapping[str, FrozenTable], example: Example) -> NDArray[np.float32]:
    """Return the scores of a batch: float32[samples], a view that is valid until the next one."""
    model = program.model
    feeds: dict[str, Any] = {name: values for name, values in example.feeds.items() if name != model.label}
    for each in model.lookups:
        keys, inverse = np.unique(example.keys[each.name].reshape(-1), return_inverse=True)
        rows = np.empty((len(keys), each.dim), np.float32)
        tables[each.table].lookup(keys, rows)
        feeds[each.name] = (rows, inverse.astype(np.int32).reshape(example.samples, each.fields))
    return program.predict(feeds, example.samples)
