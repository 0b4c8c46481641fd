# SPDX-License-Identifier: Apache-2.0
"""The recipe of `oarlock.benchmarks.checkpoint`: Wide & Deep of `end_to_end`, its rows under adagrad with a state a weight.

Invariant: but for the optimizer, a job is that of `end_to_end_recipe`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oarlock.benchmarks.end_to_end_data import GROUPS_PER_FILE, ROWS_PER_GROUP
from oarlock.benchmarks.end_to_end_recipe import EndToEndConfig, EndToEndRecipe
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.worker.recipe import Plan

RECIPE = "oarlock.benchmarks.checkpoint_recipe:recipe"
TABLE = "fields"


def table_spec(dim: int, blocks: int = EndToEndConfig.blocks) -> TableSpec:
    """Return the table: a weight of the wide part and a vector of ``dim`` for each key."""
    adagrad = OptimizerSpec("adagrad")
    first = Initializer("normal", scale=0.05)
    return TableSpec(
        TABLE, 1 + dim, parts=(Part(1, adagrad, Initializer("zeros")), Part(dim, adagrad, first)), blocks=blocks
    )


def prolong(folder: Path, samples: int, epoch: int) -> None:
    """Have the ``samples`` of a folder come again until an epoch has ``epoch`` of them, in files of as many rows."""
    per_file = ROWS_PER_GROUP * GROUPS_PER_FILE
    for number, begin in enumerate(range(samples, epoch, per_file)):
        rows = np.arange(begin, begin + per_file, dtype=np.int64) % samples
        pq.write_table(
            pa.table({"row": rows}), folder / f"rows-again-{number:04}.parquet", row_group_size=ROWS_PER_GROUP
        )


class CheckpointRecipe(EndToEndRecipe):
    """Plans jobs on a folder that ``end_to_end_data`` wrote."""

    def plan(self, config: EndToEndConfig, data: Path, *, epochs: int) -> Plan:
        return replace(super().plan(config, data, epochs=epochs), tables=(table_spec(config.dim, config.blocks),))


recipe = CheckpointRecipe()
