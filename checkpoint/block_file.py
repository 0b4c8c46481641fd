# SPDX-License-Identifier: Apache-2.0
"""One block as an Arrow IPC file: columns ``key``, ``weights``, ``state``, ``counters``, and metadata that says whose it is.

Invariant: equal content gives equal bytes (rows ascend by key; one version of pyarrow), and what ``decode`` returns
has distinct ascending keys, no nulls and, unless told otherwise, finite values only. Pure functions over arrays, from
any thread; ``decode`` copies nothing, so its arrays are read-only views that keep the file's buffer alive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oarlock.checkpoint.format import KINDS, check_count, unreadable
from oarlock.checkpoint.frame import (
    Identity,
    describe,
    flat_values,
    joined,
    open_frame,
    pack_frame,
    refuse_names,
    refuse_nulls,
)
from oarlock.embedding.spec import check_name
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

_MAX_WIDTH = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class BlockImage:
    """A block at one instant. ``kind``: ``rows`` (a hash range of a table) or ``dense`` (a slice of a parameter).

    ``seq``: operations applied so far. ``marks``: open split -> last group applied. ``keys: uint64[r]`` (dense: empty),
    ``weights: float32[r, dim]`` (dense: ``[1, length]``), ``state: float32[r, s]`` (s = 0 if the optimizer has none),
    ``counters: uint32[r, c]`` (c = 0 if the table keeps none). ``waiting: uint64[p]``, ``waited: uint32[p]`` and
    ``sketch`` are what the block knows of keys without a row; they are in a file of their own (``waiting_file.py``).
    """

    kind: str
    name: str
    block: int
    seq: int
    marks: Mapping[int, int]
    keys: NDArray[np.uint64]
    weights: NDArray[np.float32]
    state: NDArray[np.float32]
    counters: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), np.uint32))
    waiting: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    waited: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    sketch: bytes = b""

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
        for name, array, dtype, ndim in (
            ("keys", self.keys, np.uint64, 1),
            ("weights", self.weights, np.float32, 2),
            ("state", self.state, np.float32, 2),
            ("counters", self.counters, np.uint32, 2),
            ("waiting", self.waiting, np.uint64, 1),
            ("waited", self.waited, np.uint32, 1),
        ):
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
                found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InvalidArgument(f"{self.where}: {name} is {found}: give a {np.dtype(dtype)} array of {ndim} axes")
        rows = len(self.weights)
        if self.counters.shape == (0, 0):
            object.__setattr__(self, "counters", np.empty((rows, 0), np.uint32))
        if self.kind == "dense" and (rows != 1 or len(self.keys) or len(self.state) != 1):
            raise InvalidArgument(f"{self.where}: give one row of weights, one of state, and no keys")
        if self.kind == "rows" and not len(self.keys) == rows == len(self.state):
            raise InvalidArgument(
                f"{self.where}: {len(self.keys)} keys, {rows} rows of weights, {len(self.state)} of state: "
                "give as many of each"
            )
        if len(self.counters) != rows or (self.kind == "dense" and self.counters.shape[1]):
            raise InvalidArgument(
                f"{self.where}: counters of {list(self.counters.shape)}: give a row of them for each of {rows} rows of "
                "a table, or none"
            )
        if len(self.waiting) != len(self.waited):
            raise InvalidArgument(f"{self.where}: {len(self.waiting)} waiting keys, {len(self.waited)} counts of them")
        if (len(self.waiting) > 0) + (len(self.sketch) > 0) > (self.kind == "rows"):
            raise InvalidArgument(f"{self.where}: waiting keys are counted, or sketched, and by a table's block only")
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
    """Return the block's file as one buffer; see ``encode_pieces``."""
    return joined(encode_pieces(image, check_finite=check_finite))


def encode_pieces(
    image: BlockImage, *, after: int | None = None, compress: str | None = None, check_finite: bool = True
) -> list[Any]:
    """Return the block's file, rows sorted by key; InvalidArgument names a duplicate key or a value not finite.

    It is in pieces, of which large ones are the image's own arrays: they must not change before the pieces are written.
    ``after``: the image is an increment, to the cut at which the block had applied so many operations.
    """
    keys, weights, state, counters = image.keys, image.weights, image.state, image.counters
    if image.kind == "rows" and np.any(keys[1:] <= keys[:-1]):
        order = np.argsort(keys)
        keys = keys[order]
        weights, state, counters = (take_rows(values, order) for values in (weights, state, counters))
    problem = _first_problem(image.kind, keys, weights, state, check_finite)
    if problem:
        raise InvalidArgument(f"{image.where}: {problem}", name=image.name, block=image.block)
    arrays: list[NDArray[Any]] = [weights]
    if image.kind == "rows":
        arrays.insert(0, keys)
    arrays += [values for values in (state, counters) if values.shape[1]]
    schema = _schema(image.kind, weights.shape[1], state.shape[1], counters.shape[1])
    identity = Identity(image.kind, image.name, image.block, image.seq, image.marks)
    return pack_frame(identity, schema, arrays, after=after, compress=compress)


def decode(data: Any, *, file: str = "block file", after: int | None = None, check_finite: bool = True) -> BlockImage:
    """Return the block that a file's bytes hold, or with ``after`` the increment. ``data``: any buffer; errors name ``file``."""
    version, identity, batch, found = open_frame(data, file, KINDS)
    if found != after:
        what = ["a whole block" if n is None else f"an increment to {n} operations" for n in (found, after)]
        raise CorruptCheckpoint(f"{file}: it is {what[0]}, where {what[1]} is expected", file=file)
    try:
        image = BlockImage(*identity, *_columns(identity.kind, batch))
    except (InvalidArgument, ValueError) as error:
        raise unreadable(file, version, str(error)) from None
    problem = _first_problem(image.kind, image.keys, image.weights, image.state, check_finite)
    if problem:
        raise CorruptCheckpoint(f"{file}: {image.where}: {problem}", file=file, name=image.name, block=image.block)
    return image


def take_rows(values: NDArray[Any], order: NDArray[np.intp]) -> NDArray[Any]:
    """Return ``values[order]``. A row is moved as one item of its size, which takes a fifth of the time."""
    if values.shape[1] == 0:
        return values[order]
    whole = np.ascontiguousarray(values).view(np.dtype((np.void, values.shape[1] * values.itemsize)))
    return whole[:, 0].take(order).view(values.dtype).reshape(len(order), values.shape[1])


def _schema(kind: str, dim: int, width: int, counters: int) -> pa.Schema:
    item = pa.field("item", pa.float32(), nullable=False)
    count = pa.field("item", pa.uint32(), nullable=False)
    fields = [pa.field("key", pa.uint64(), nullable=False)] if kind == "rows" else []
    fields.append(pa.field("weights", pa.list_(item, dim), nullable=False))
    if width:
        fields.append(pa.field("state", pa.list_(item, width), nullable=False))
    if counters:
        fields.append(pa.field("counters", pa.list_(count, counters), nullable=False))
    return pa.schema(fields)


def _columns(
    kind: str, batch: pa.RecordBatch
) -> tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint32]]:
    have = batch.schema.names
    may = ["state", "counters"] if kind == "rows" else ["state"]
    refuse_names(have, ["key", "weights"] if kind == "rows" else ["weights"], may)
    refuse_nulls(batch)
    types = {f.name: f.type for f in batch.schema}
    widths = {name: t.list_size if pa.types.is_fixed_size_list(t) else 0 for name, t in types.items()}
    dim, width, counters = (widths.get(name, 0) for name in ("weights", "state", "counters"))
    empty = dim < 1 or any(name in have and widths[name] < 1 for name in may)
    if empty or not batch.schema.equals(_schema(kind, dim, width, counters)):
        raise InvalidArgument(
            f"columns are {describe(batch.schema)}: expected key: uint64, weights and state: fixed_size_list of "
            "float32, counters: fixed_size_list of uint32, all not null"
        )
    rows = batch.num_rows
    keys = batch.column(0).to_numpy(zero_copy_only=True) if kind == "rows" else np.empty(0, np.uint64)
    weights, state, counts = (
        _values(batch, name, rows, dtype)
        for name, dtype in (("weights", np.float32), ("state", np.float32), ("counters", np.uint32))
    )
    return keys, weights, state, counts


def _values(batch: pa.RecordBatch, name: str, rows: int, dtype: type[np.generic]) -> NDArray[Any]:
    if name not in batch.schema.names:
        return np.empty((rows, 0), dtype)
    column = batch.column(batch.schema.names.index(name))
    width = column.type.list_size
    values = flat_values(column)
    if len(values) != rows * width:
        raise InvalidArgument(f"{len(values)} values of {name} do not make {rows} rows of {width}")
    return values.reshape(rows, width)


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
