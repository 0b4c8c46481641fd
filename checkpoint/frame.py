# SPDX-License-Identifier: Apache-2.0
"""The frame of a block's files: an Arrow IPC file with one record batch, and metadata that says whose it is.

Invariant: equal columns and identity give equal bytes (one version of pyarrow); numbers in the metadata have one form only.
Pure functions, from any thread; reading copies nothing.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc

from oarlock.checkpoint.format import check_format, format_text, unreadable
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

# Ids on disk: they never change meaning.
_FORMAT, _KIND, _NAME, _BLOCK, _SEQ, _MARKS = (
    b"oarlock.format",
    b"oarlock.kind",
    b"oarlock.name",
    b"oarlock.block",
    b"oarlock.seq",
    b"oarlock.marks",
)
_METADATA = (_FORMAT, _KIND, _NAME, _BLOCK, _SEQ, _MARKS)


class Identity(NamedTuple):
    """Whose file it is, and of which instant."""

    kind: str
    name: str
    block: int
    seq: int
    marks: Mapping[int, int]


class Frame(NamedTuple):
    """What was read of a file: its format version, whose it is, and its columns."""

    version: tuple[int, int]
    identity: Identity
    batch: pa.RecordBatch


def pack_frame(identity: Identity, version: tuple[int, int], schema: pa.Schema, columns: list[pa.Array]) -> pa.Buffer:
    """Return the file's bytes."""
    schema = schema.with_metadata(
        {
            _FORMAT: format_text(version),
            _KIND: identity.kind,
            _NAME: identity.name,
            _BLOCK: str(identity.block),
            _SEQ: str(identity.seq),
            _MARKS: _marks_text(identity.marks),
        }
    )
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    # The first pass only counts, so that the second fills one buffer of the exact size instead of growing one.
    counter = pa.MockOutputStream()
    _write(counter, batch)
    out = pa.allocate_buffer(counter.size())
    _write(pa.FixedSizeBufferWriter(out), batch)
    return out


def open_frame(data: Any, file: str, kinds: tuple[str, ...]) -> Frame:
    """Return what a file's bytes hold; CorruptCheckpoint and VersionMismatch name ``file``."""
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
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
    return Frame(version, _identity(metadata, file, version, kinds), batch)


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


def _write(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions()) as writer:
        writer.write_batch(batch)


def _marks_text(marks: Mapping[int, int]) -> str:
    return json.dumps({str(split): group for split, group in sorted(marks.items())}, separators=(",", ":"))


def _identity(metadata: dict[bytes, bytes], file: str, version: tuple[int, int], kinds: tuple[str, ...]) -> Identity:
    missing = [key.decode() for key in _METADATA if key not in metadata]
    extra = sorted(key.decode(errors="replace") for key in metadata if key not in _METADATA)
    if missing or extra:
        raise unreadable(
            file, version, f"metadata {'lacks ' + missing[0] if missing else 'has an unknown ' + extra[0]}"
        )
    try:
        texts = {key: metadata[key].decode() for key in _METADATA}
        numbers = json.loads(texts[_MARKS])
        block, seq, marks = int(texts[_BLOCK]), int(texts[_SEQ]), {int(k): v for k, v in numbers.items()}
        # Only the text that was written: no "007", no repeated split.
        exact = texts[_BLOCK] == str(block) and texts[_SEQ] == str(seq) and texts[_MARKS] == _marks_text(marks)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(file, version, f"metadata cannot be read: {error}") from None
    if not exact:
        raise unreadable(file, version, "the numbers in its metadata are not in their plain form")
    if texts[_KIND] not in kinds:
        raise unreadable(file, version, f"metadata names the unknown kind {texts[_KIND]!r}")
    return Identity(texts[_KIND], texts[_NAME], block, seq, marks)
