# SPDX-License-Identifier: Apache-2.0
"""One block as an Arrow IPC file: columns ``key``, ``weights``, ``state``, and metadata that says whose it is.

Invariant: equal content gives equal bytes (rows ascend by key; one version of pyarrow), and what ``decode`` returns
has distinct ascending keys, no nulls and, unless told otherwise, finite values only. Pure functions over arrays, from
any thread; ``decode`` copies nothing, so its arrays are read-only views that keep the file's buffer alive.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from oarlock.checkpoint.format import KINDS, check_count, check_format, format_text, unreadable
from oarlock.embedding.spec import check_name
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
_MAX_WIDTH = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class BlockImage:
    """A block at one instant. ``kind``: ``rows`` (a hash range of a table) or ``dense`` (a slice of a parameter).

    ``seq``: operations applied so far. ``marks``: open split -> last group applied. ``keys: uint64[r]`` (dense: empty),
    ``weights: float32[r, dim]`` (dense: ``[1, length]``), ``state: float32[r, s]`` (s = 0 if the optimizer has none).
    """

    kind: str
    name: str
    block: int
    seq: int
    marks: Mapping[int, int]
    keys: NDArray[np.uint64]
    weights: NDArray[np.float32]
    state: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"block kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        check_name("table" if self.kind == "rows" else "dense parameter", self.name)
        check_count("block", self.block)
        check_count(f"{self.where}: seq", self.seq)
        for split, group in self.marks.items():
            check_count(f"{self.where}: split of a mark", split)
            check_count(f"{self.where}: mark of split {split}", group)
        object.__setattr__(self, "marks", dict(sorted(self.marks.items())))
        for field, array, dtype, ndim in (
            ("keys", self.keys, np.uint64, 1),
            ("weights", self.weights, np.float32, 2),
            ("state", self.state, np.float32, 2),
        ):
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
                found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InvalidArgument(
                    f"{self.where}: {field} is {found}: give a {np.dtype(dtype)} array of {ndim} axes"
                )
        rows = len(self.weights)
        if self.kind == "dense" and (rows != 1 or len(self.keys) or len(self.state) != 1):
            raise InvalidArgument(f"{self.where}: give one row of weights, one of state, and no keys")
        if self.kind == "rows" and not len(self.keys) == rows == len(self.state):
            raise InvalidArgument(
                f"{self.where}: {len(self.keys)} keys, {rows} rows of weights, {len(self.state)} of state: "
                "give as many of each"
            )
        if not 1 <= self.weights.shape[1] <= _MAX_WIDTH or self.state.shape[1] > _MAX_WIDTH:
            raise InvalidArgument(
                f"{self.where}: a row must hold 1 to 2^31 - 1 weights and at most as many state values"
            )

    @property
    def where(self) -> str:
        """What messages call it, such as ``table user, block 3``."""
        return f"{'table' if self.kind == 'rows' else 'dense parameter'} {self.name}, block {self.block}"

    @property
    def rows(self) -> int:
        """Rows of a table's block; values of a dense block."""
        return len(self.keys) if self.kind == "rows" else int(self.weights.shape[1])


def encode(image: BlockImage, *, check_finite: bool = True) -> pa.Buffer:
    """Return the block's file, rows sorted by key; InvalidArgument names a duplicate key or a value not finite."""
    keys, weights, state = image.keys, image.weights, image.state
    if image.kind == "rows" and np.any(keys[1:] <= keys[:-1]):
        order = np.argsort(keys)
        keys, weights, state = keys[order], weights[order], state[order]
    problem = _first_problem(image.kind, keys, weights, state, check_finite)
    if problem:
        raise InvalidArgument(f"{image.where}: {problem}", name=image.name, block=image.block)
    columns = [_lists(weights)]
    if image.kind == "rows":
        columns.insert(0, pa.array(np.ascontiguousarray(keys)))
    if state.shape[1]:
        columns.append(_lists(state))
    schema = _schema(image.kind, weights.shape[1], state.shape[1]).with_metadata(
        {
            _FORMAT: format_text(),
            _KIND: image.kind,
            _NAME: image.name,
            _BLOCK: str(image.block),
            _SEQ: str(image.seq),
            _MARKS: _marks_text(image.marks),
        }
    )
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    # The first pass only counts, so that the second fills one buffer of the exact size instead of growing one.
    counter = pa.MockOutputStream()
    _write(counter, batch)
    out = pa.allocate_buffer(counter.size())
    _write(pa.FixedSizeBufferWriter(out), batch)
    return out


def decode(data: Any, *, file: str = "block file", check_finite: bool = True) -> BlockImage:
    """Return the block that a file's bytes hold. ``data`` is any buffer; errors name ``file``."""
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
    kind, name, block, seq, marks = _identity(metadata, file, version)
    try:
        keys, weights, state = _columns(kind, batch)
        image = BlockImage(kind, name, block, seq, marks, keys, weights, state)
    except (InvalidArgument, ValueError) as error:
        raise unreadable(file, version, str(error)) from None
    problem = _first_problem(kind, keys, weights, state, check_finite)
    if problem:
        raise CorruptCheckpoint(f"{file}: {image.where}: {problem}", file=file, name=name, block=block)
    return image


def _schema(kind: str, dim: int, width: int) -> pa.Schema:
    item = pa.field("item", pa.float32(), nullable=False)
    fields = [pa.field("key", pa.uint64(), nullable=False)] if kind == "rows" else []
    fields.append(pa.field("weights", pa.list_(item, dim), nullable=False))
    if width:
        fields.append(pa.field("state", pa.list_(item, width), nullable=False))
    return pa.schema(fields)


def _lists(values: NDArray[np.float32]) -> pa.Array:
    rows, width = values.shape
    kind = pa.list_(pa.field("item", pa.float32(), nullable=False), width)
    return pa.Array.from_buffers(kind, rows, [None], children=[pa.array(np.ascontiguousarray(values).reshape(-1))])


def _write(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions()) as writer:
        writer.write_batch(batch)


def _marks_text(marks: Mapping[int, int]) -> str:
    return json.dumps({str(split): group for split, group in sorted(marks.items())}, separators=(",", ":"))


def _identity(
    metadata: dict[bytes, bytes], file: str, version: tuple[int, int]
) -> tuple[str, str, int, int, dict[int, int]]:
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
        # Only the text that encode would have written: no "007", no repeated split.
        exact = texts[_BLOCK] == str(block) and texts[_SEQ] == str(seq) and texts[_MARKS] == _marks_text(marks)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(file, version, f"metadata cannot be read: {error}") from None
    if not exact:
        raise unreadable(file, version, "the numbers in its metadata are not in their plain form")
    if texts[_KIND] not in KINDS:
        raise unreadable(file, version, f"metadata names the unknown kind {texts[_KIND]!r}")
    return texts[_KIND], texts[_NAME], block, seq, marks


def _columns(kind: str, batch: pa.RecordBatch) -> tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.float32]]:
    have = batch.schema.names
    need = ["key", "weights"] if kind == "rows" else ["weights"]
    missing = [name for name in need if name not in have]
    extra = [name for name in have if name not in [*need, "state"]]
    if missing or extra:
        raise InvalidArgument(f"column {missing[0]} is missing" if missing else f"column {extra[0]!r} is unknown")
    if have not in (need, [*need, "state"]):
        raise InvalidArgument(f"columns {have}: expected the order key, weights, state, each once")
    for name, column in zip(have, batch.columns, strict=True):
        if column.null_count or (pa.types.is_fixed_size_list(column.type) and column.values.null_count):
            raise InvalidArgument(f"column {name} has nulls")
    widths = [field.type.list_size if pa.types.is_fixed_size_list(field.type) else 0 for field in batch.schema]
    dim, width = widths[have.index("weights")], widths[-1] if "state" in have else 0
    if dim < 1 or ("state" in have and width < 1) or not batch.schema.equals(_schema(kind, dim, width)):
        found = ", ".join(
            f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in batch.schema
        )
        raise InvalidArgument(
            f"columns are {found}: expected key: uint64, weights and state: fixed_size_list of float32, all not null"
        )
    rows = batch.num_rows
    keys = batch.column(0).to_numpy(zero_copy_only=True) if kind == "rows" else np.empty(0, np.uint64)
    lists = [batch.column(have.index("weights")).values.to_numpy(zero_copy_only=True)]
    lists.append(batch.column(len(have) - 1).values.to_numpy(zero_copy_only=True) if width else lists[0][:0])
    if len(lists[0]) != rows * dim or len(lists[1]) != rows * width:
        raise InvalidArgument(f"{len(lists[0])} weights and {len(lists[1])} state values do not make {rows} rows")
    return keys, lists[0].reshape(rows, dim), lists[1].reshape(rows, width)


def _first_problem(
    kind: str, keys: NDArray[np.uint64], weights: NDArray[np.float32], state: NDArray[np.float32], check_finite: bool
) -> str | None:
    wrong = np.flatnonzero(keys[1:] <= keys[:-1])
    if len(wrong):
        at = int(wrong[0])
        return f"key {keys[at]} {'is there twice' if keys[at] == keys[at + 1] else f'stands before key {keys[at + 1]}'}"
    for column, values in (("weights", weights), ("state", state)) if check_finite else ():
        # A sum with a NaN or infinity in it is not finite; only then is it worth looking at each value.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()):
                continue
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, at = (int(n) for n in bad[0])
            owner = f"key {keys[row]}: {column}[{at}]" if kind == "rows" else f"{column}[{at}]"
            return f"{owner} is {values[row, at]}, not a finite number"
    return None
