# SPDX-License-Identifier: Apache-2.0
"""The file of an export: rows in Parquet or Arrow's own format, whole under its name or not there at all.

Invariant: what is held in memory is one row group. One thread: `oarlock rows export` and ``export/tables.py`` write it.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oarlock.client.rows import RowsPart
from oarlock.embedding.lookup import counter_names
from oarlock.embedding.spec import TableSpec
from oarlock.export.publish import partial_of, publish, refuse_existing
from oarlock.proto.errors import InvalidArgument, Malformed

KINDS = (".parquet", ".arrow")
GROUP_BYTES = 32 << 20
_FLOATS = ("shows", "clicks")


class RowsFile:
    """Writes the rows of ``spec`` to ``path``; what has to be known of them besides goes into ``facts``.

    ``whole`` = False leaves out state and counters, which only training needs. ``force``: it may replace another file; ``hint``:
    what else than another name could help, for messages.
    """

    def __init__(
        self,
        path: Path,
        spec: TableSpec,
        facts: dict[str, Any],
        *,
        force: bool = False,
        hint: str = "",
        whole: bool = True,
    ) -> None:
        if path.suffix not in KINDS:
            raise InvalidArgument(f"{path}: give a file that ends in {' or '.join(KINDS)}")
        refuse_existing(path, force=force, hint=hint)
        self.path = path
        self.rows = 0
        self._force = force
        self._hint = hint
        self._partial = partial_of(path)
        self._whole = whole
        self._counters = counter_names(spec)
        values = pa.list_(pa.field("item", pa.float32(), nullable=False))
        fields = [("key", pa.uint64()), ("weights", values)]
        if whole:
            fields.append(("state", values))
            fields += [(name, pa.float32() if name in _FLOATS else pa.uint32()) for name in self._counters]
        self._schema = pa.schema(
            [pa.field(name, kind, nullable=False) for name, kind in fields], {"oarlock": json.dumps(facts)}
        )
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._writer: Any = None

    def __enter__(self) -> "RowsFile":
        if self.path.suffix == ".parquet":
            # Weights hardly repeat: a dictionary of them would be built for nothing.
            self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd", use_dictionary=False)
        else:
            self._writer = pa.ipc.new_file(self._partial, self._schema)
        return self

    def write(self, part: RowsPart) -> None:
        """Add some rows."""
        if part.counters.shape[1] != len(self._counters):
            raise Malformed(f"rows with {part.counters.shape[1]} counters came, the table has {len(self._counters)}")
        columns = [pa.array(part.keys), _lists(part.weights)]
        if self._whole:
            columns.append(_lists(part.state))
        for position, name in enumerate(self._counters if self._whole else ()):
            counted = np.ascontiguousarray(part.counters[:, position])
            columns.append(pa.array(counted.view(np.float32) if name in _FLOATS else counted))
        batch = pa.record_batch(columns, schema=self._schema)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        self.rows += len(part.keys)
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._bytes:
            self._writer.write_table(pa.Table.from_batches(self._batches, self._schema).combine_chunks())
        self._batches, self._bytes = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                publish(self._partial, self.path, force=self._force, hint=self._hint)
        finally:
            self._partial.unlink(missing_ok=True)


def _lists(values: NDArray[np.float32]) -> pa.ListArray:
    rows, columns = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(columns)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).reshape(-1)))
