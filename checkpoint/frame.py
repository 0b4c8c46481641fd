# SPDX-License-Identifier: Apache-2.0
"""The frame of a block's files: an Arrow IPC file with one record batch, and metadata that says whose it is.

Invariant: equal columns and identity give equal bytes (one version of pyarrow); numbers in the metadata have one form only.
Pure functions, from any thread; reading a file that is not compressed copies nothing.

A column's checksum is the CRC-32 of its values as they are in memory, little-endian: it says which column is damaged in a
file whose SHA-256 does not fit. For that it has to be cheap (a third of SHA-256's time) and known to every reader's language.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from oarlock.checkpoint.format import CHAINS, check_format, format_text, unreadable
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

COMPRESSIONS = (None, "zstd")

# Ids on disk: they never change meaning.
_FORMAT, _KIND, _NAME, _BLOCK, _SEQ, _MARKS = (
    b"oarlock.format",
    b"oarlock.kind",
    b"oarlock.name",
    b"oarlock.block",
    b"oarlock.seq",
    b"oarlock.marks",
)
_COLUMNS, _AFTER = b"oarlock.columns", b"oarlock.after"
_METADATA = (_FORMAT, _KIND, _NAME, _BLOCK, _SEQ, _MARKS)


class Identity(NamedTuple):
    """Whose file it is, and of which instant."""

    kind: str
    name: str
    block: int
    seq: int
    marks: Mapping[int, int]


class Frame(NamedTuple):
    """What was read of a file: its format version, whose it is, its columns, and what it is an increment to.

    ``after``: operations that the block had applied at the cut before, None if the file stands for itself.
    """

    version: tuple[int, int]
    identity: Identity
    batch: pa.RecordBatch
    after: int | None


def pack_frame(
    identity: Identity,
    schema: pa.Schema,
    arrays: list[NDArray[Any]],
    *,
    after: int | None = None,
    compress: str | None = None,
) -> list[Any]:
    """Return the file's bytes, in pieces. ``arrays``: a column each, of two axes where the column holds lists.

    Large pieces are views of the arrays, which must stay as they are while the pieces are in use.
    """
    if compress not in COMPRESSIONS:
        raise InvalidArgument(f"compress = {compress!r}: choose zstd, or None")
    arrays = [np.ascontiguousarray(array) for array in arrays]
    metadata = {
        _FORMAT: format_text(),
        _KIND: identity.kind,
        _NAME: identity.name,
        _BLOCK: str(identity.block),
        _SEQ: str(identity.seq),
        _MARKS: _marks_text(identity.marks),
        _COLUMNS: _columns_text({n: _checksum(array) for n, array in zip(schema.names, arrays, strict=True)}),
    }
    if after is not None:
        metadata[_AFTER] = str(after)
    schema = schema.with_metadata(metadata)
    columns = [_column(field.type, array) for field, array in zip(schema, arrays, strict=True)]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    # Without threads, so that a writer takes the processor that it was given and no more.
    options = pa.ipc.IpcWriteOptions(compression=compress, use_threads=False)
    sink = _Pieces()
    with pa.PythonFile(sink, mode="w") as stream, pa.ipc.new_file(stream, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.pieces


def joined(pieces: list[Any]) -> pa.Buffer:
    """Return a file's bytes as one buffer."""
    return pa.py_buffer(b"".join(pieces))


class _Pieces:
    """A file for Arrow to write to, which keeps what it is given instead of copying it; small pieces are put together."""

    closed = False
    small = 1 << 16

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def write(self, data: Any) -> int:
        size = len(data)
        if size < self.small and self.pieces and isinstance(self.pieces[-1], bytearray):
            self.pieces[-1] += data
        elif size:
            self.pieces.append(bytearray(data) if size < self.small else data)
        return size

    def tell(self) -> int:
        return sum(map(len, self.pieces))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_frame(data: Any, file: str, kinds: tuple[str, ...]) -> Frame:
    """Return what a file's bytes hold; CorruptCheckpoint and VersionMismatch name ``file``."""
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data), options=pa.ipc.IpcReadOptions(use_threads=False))
        metadata = dict(reader.schema.metadata or {})
        version = check_format(metadata.get(_FORMAT, b"").decode(errors="replace"), file)
        batches = reader.num_record_batches
        batch = reader.get_batch(0) if batches else None
        if batch is not None:
            batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{file}: not a whole Arrow file: {error}", file=file) from None
    if batch is None or batches != 1:
        raise unreadable(file, version, f"{batches} record batches where one is expected")
    identity, after = _identity(metadata, file, version, kinds)
    return Frame(version, identity, batch, after)


def damaged_columns(data: Any) -> list[str]:
    """Return the columns whose checksums do not fit; none if the file has none, or is not readable as a file."""
    damaged = []
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        names = reader.schema.names
        written = json.loads((reader.schema.metadata or {}).get(_COLUMNS, b"{}"))
        for at, name in enumerate(names) if isinstance(written, dict) else ():
            try:
                options = pa.ipc.IpcReadOptions(included_fields=[at], use_threads=False)
                column = pa.ipc.open_file(pa.py_buffer(data), options=options).get_batch(0).column(0)
                column.validate(full=True)
                if name in written and _checksum(flat_values(column)) != written[name]:
                    damaged.append(name)
            except (pa.ArrowException, OSError, ValueError):
                damaged.append(name)
    except (pa.ArrowException, OSError, ValueError, RecursionError):
        return []
    return damaged


def flat_values(column: pa.Array) -> NDArray[Any]:
    """Return a column's numbers, those of lists one list after the other; ValueError if there are nulls among them."""
    found: NDArray[Any] = (column.values if pa.types.is_fixed_size_list(column.type) else column).to_numpy(
        zero_copy_only=True
    )
    return found


def refuse_names(have: list[str], need: list[str], may: list[str]) -> None:
    """Raise InvalidArgument unless the columns are those that it needs, and of those that it may have some, in this order."""
    missing = [name for name in need if name not in have]
    extra = [name for name in have if name not in [*need, *may]]
    if missing or extra:
        raise InvalidArgument(f"column {missing[0]} is missing" if missing else f"column {extra[0]!r} is unknown")
    if have != [*need, *(name for name in may if name in have)]:
        raise InvalidArgument(f"columns {have}: expected the order {', '.join([*need, *may])}, each once")


def refuse_nulls(batch: pa.RecordBatch) -> None:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count or (pa.types.is_fixed_size_list(column.type) and column.values.null_count):
            raise InvalidArgument(f"column {name} has nulls")


def describe(schema: pa.Schema) -> str:
    """Return the columns' names and types, for messages."""
    return ", ".join(f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in schema)


def _column(kind: pa.DataType, array: NDArray[Any]) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(array)
    return pa.Array.from_buffers(kind, len(array), [None], children=[pa.array(array.reshape(-1))])


def _checksum(array: NDArray[Any]) -> str:
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"


def _columns_text(checksums: Mapping[str, str]) -> str:
    return json.dumps(checksums, separators=(",", ":"))


def _marks_text(marks: Mapping[int, int]) -> str:
    return json.dumps({str(split): group for split, group in sorted(marks.items())}, separators=(",", ":"))


def _identity(
    metadata: dict[bytes, bytes], file: str, version: tuple[int, int], kinds: tuple[str, ...]
) -> tuple[Identity, int | None]:
    need = (*_METADATA, _COLUMNS) if version >= CHAINS else _METADATA
    may = (*need, _AFTER) if version >= CHAINS else need
    missing = [key.decode() for key in need if key not in metadata]
    extra = sorted(key.decode(errors="replace") for key in metadata if key not in may)
    if missing or extra:
        raise unreadable(
            file, version, f"metadata {'lacks ' + missing[0] if missing else 'has an unknown ' + extra[0]}"
        )
    try:
        texts = {key: value.decode() for key, value in metadata.items()}
        numbers = json.loads(texts[_MARKS])
        block, seq, marks = int(texts[_BLOCK]), int(texts[_SEQ]), {int(k): v for k, v in numbers.items()}
        after = int(texts[_AFTER]) if _AFTER in texts else None
        # Only the text that was written: no "007", no repeated split.
        exact = texts[_BLOCK] == str(block) and texts[_SEQ] == str(seq) and texts[_MARKS] == _marks_text(marks)
        exact = exact and (after is None or (texts[_AFTER] == str(after) and 0 <= after <= seq))
        if _COLUMNS in texts:
            checksums = json.loads(texts[_COLUMNS])
            exact = exact and texts[_COLUMNS] == _columns_text(checksums)
            exact = exact and all(isinstance(c, str) and len(c) == 8 for c in checksums.values())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(file, version, f"metadata cannot be read: {error}") from None
    if not exact:
        raise unreadable(file, version, "the numbers in its metadata are not in their plain form")
    if texts[_KIND] not in kinds:
        raise unreadable(file, version, f"metadata names the unknown kind {texts[_KIND]!r}")
    return Identity(texts[_KIND], texts[_NAME], block, seq, marks), after
