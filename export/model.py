# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint as an ONNX file: the recipe's graph, with dense parameters and, if asked for, the rows of the cut.

Invariant: what is written was read under its checksum, and has its name only when it is whole. One thread.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.client.job import JobSpec
from oarlock.export.onnx import MAX_ROW_BYTES, dense_graph, whole_graph
from oarlock.export.publish import partial_of, publish, refuse_existing
from oarlock.export.tables import dense_values
from oarlock.nn import Model
from oarlock.proto.errors import InvalidArgument, OutOfMemory
from oarlock.worker.recipe import load_recipe


def model_of(spec: JobSpec) -> Model:
    """Return the graph that a job trains."""
    return load_recipe(spec.recipe).workload(spec).model


def export_model(
    store: Reading,
    manifest: Manifest,
    spec: JobSpec,
    to: Path,
    *,
    rows: bool = False,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> int:
    """Write the model of a cut of the job ``spec`` to the file ``to``; return its bytes. ``rows``: with those of its tables."""
    if to.suffix != ".onnx":
        raise InvalidArgument(f"{to}: give a file that ends in .onnx")
    refuse_existing(to)
    model = model_of(spec)
    parameters = dense_values(store, manifest)
    if rows:
        specs = manifest.table_specs()
        found = {name: table_rows(store, manifest, name, max_row_bytes) for name in model.tables}
        made = whole_graph(model, parameters, specs, found, max_row_bytes=max_row_bytes)
    else:
        made = dense_graph(model, parameters)
    data = made.SerializeToString()
    partial = partial_of(to)
    try:
        partial.write_bytes(data)
        publish(partial, to)
    finally:
        partial.unlink(missing_ok=True)
    return len(data)


def table_rows(
    store: Reading, manifest: Manifest, table: str, max_bytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Return (keys: uint64[n], weights: float32[n, dim]) of a table; OutOfMemory before it takes more than ``max_bytes``."""
    dim = manifest.table_specs()[table].dim
    keys, weights, size = [np.empty(0, np.uint64)], [np.empty((0, dim), np.float32)], 0
    entries = [entry for entry in manifest.blocks if entry.kind == "rows" and entry.name == table]
    store.check_sizes(manifest, entries)
    for entry in entries:
        image = store.load_block(manifest, entry)
        size += image.keys.nbytes + image.weights.nbytes
        if size > max_bytes:
            raise OutOfMemory(
                f"keys and rows of table {table} take more than {max_bytes} bytes, the most that a whole model may have: export "
                "the dense graph alone, and look rows up with `oarlock serve`; or give --max-row-bytes",
                table=table,
            )
        # Copies: the views would keep whole files, with the state in them.
        keys.append(image.keys.copy())
        weights.append(image.weights.copy())
    return np.concatenate(keys), np.concatenate(weights)
