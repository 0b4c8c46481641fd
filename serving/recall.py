# SPDX-License-Identifier: Apache-2.0
"""Recall: which tables of a model can be asked for their nearest rows, and how their indexes keep in step with it.

A swap to another cut compares the blocks that are not shared, and changes what differs in place; where that is much, an index is
built beside the old one and takes its place. Of a part of a model copies are changed, and those before are kept for as long as
other parts may be behind. ``update`` and ``remove`` are for rows that change between cuts. Invariant: an answer is of one state
of one table, whose version it carries; until an index is in step, the old one answers. ``follow``, ``update`` and ``remove`` are
called by one thread at a time, ``nearest`` by any.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.frozen import FrozenBlock, FrozenTable
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable, UnknownTable
from oarlock.serving.nearest import NearestIndex
from oarlock.serving.snapshot import Snapshot, Version, unknown_table
from oarlock.serving.vectors import INNER, METRICS, Floats, Keys, Nearest

_FORM = re.compile(r"([^:]+)(?::(?!exact)(\w+))?(?::(\d{1,9})-(\d{1,9}))?(?::(exact))?")
# Of all rows; beyond it a new index is built, whose centroids are those of the rows as they are.
REBUILD = 0.25


@dataclass(frozen=True)
class RecallSpec:
    """A table that can be asked; ``columns``: which of a row's are the vector, None: all. ``ann`` = False: exact search alone."""

    table: str
    metric: str = INNER
    columns: tuple[int, int] | None = None
    ann: bool = True

    def check_columns(self, dim: int) -> tuple[int, int]:
        """Return from which column to before which a row of ``dim`` is the vector; InvalidArgument if it has no such."""
        first, end = self.columns or (0, dim)
        if end > dim:
            raise InvalidArgument(f"columns {first}-{end} of table {self.table}: it has {dim}")
        return first, end


def read_recall(text: str) -> RecallSpec:
    """Return what ``TABLE[:METRIC][:FIRST-END][:exact]`` means."""
    found = _FORM.fullmatch(text)
    if found is None or found[2] not in (None, *METRICS):
        raise InvalidArgument(
            f"{text[:200]!r}: write it as TABLE, TABLE:METRIC or TABLE:METRIC:FIRST-END, with {' or '.join(METRICS)} as metric, "
            "the columns from FIRST to before END, and :exact behind it for no index"
        )
    columns = None if found[3] is None else (int(found[3]), int(found[4]))
    if columns is not None and columns[0] >= columns[1]:
        raise InvalidArgument(f"{text!r}: the columns {columns[0]}-{columns[1]} are none")
    return RecallSpec(found[1], found[2] or INNER, columns, found[5] is None)


class Table(Protocol):
    """A table whose nearest rows can be asked for: how many rows are compared, and how many values a vector has."""

    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...


class Asked(Protocol):
    """What questions for nearest rows are put to: ``Recall``, or that of a live model."""

    def index(self, table: str) -> Table: ...
    def nearest(
        self,
        table: str,
        vectors: Floats,
        k: int,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
    ) -> tuple[Nearest, Version]: ...


def by_table(specs: Sequence[RecallSpec]) -> dict[str, RecallSpec]:
    """Return specs by table; InvalidArgument if one has two."""
    found = {spec.table: spec for spec in specs}
    if len(found) != len(specs):
        raise InvalidArgument(f"a table is to be indexed twice: {', '.join(spec.table for spec in specs)}")
    return found


def check_recall(specs: Sequence[RecallSpec], dims: Mapping[str, int]) -> None:
    """Raise unless a model whose tables have ``dims`` can have these indexes."""
    for name, spec in by_table(specs).items():
        if name not in dims:
            raise unknown_table(name, dims)
        spec.check_columns(dims[name])


def no_index(specs: Mapping[str, RecallSpec], table: str) -> PSError:
    """Return why a table has no index that could be asked."""
    if table in specs:
        return Unavailable(f"the index of table {table} is still being built: ask again")
    have = ", ".join(specs) or "none; start `oarlock serve` with --recall TABLE"
    return UnknownTable(
        f"nearest rows of table {table[:200]!r} cannot be asked for; of these: {have}", table=table[:200]
    )


def check_vectors(table: str, dim: int, vectors: Floats) -> None:
    """Raise unless vectors are float32[q, dim], all finite."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InvalidArgument(f"vectors of {list(vectors.shape)}: those of table {table} have {dim} values")
    if not np.isfinite(vectors).all():
        raise InvalidArgument("a vector has a value that is not a finite number")


class Indexes:
    """Indexes by table, of one ``version`` of the model; None: of none yet."""

    def __init__(
        self, specs: Mapping[str, RecallSpec], indexes: Mapping[str, NearestIndex], version: Version | None
    ) -> None:
        self.specs = specs
        self.indexes = dict(indexes)
        self.version = version

    def index(self, table: str) -> NearestIndex:
        """Return a table's index; UnknownTable says which there are."""
        found = self.indexes.get(table)
        if found is None:
            raise no_index(self.specs, table)
        return found

    def nearest(
        self,
        table: str,
        vectors: Floats,
        k: int,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
    ) -> tuple[Nearest, Version]:
        """Return the ``k`` nearest rows of vectors: float32[q, dim], and the version that they are of."""
        index = self.index(table)
        check_vectors(table, index.dim, vectors)
        found: tuple[Nearest, Version] = index.search(vectors, k, exact=exact, among=among, without=without)
        return found


class Recall:
    """The indexes of the tables of ``specs``. ``keep``: those of the snapshot before are kept as they were."""

    def __init__(self, specs: Sequence[RecallSpec], *, keep: bool = False) -> None:
        self.specs = by_table(specs)
        self._keep = keep
        # What is asked now, and what was before that.
        self._indexes = Indexes(self.specs, {}, None), Indexes(self.specs, {}, None)
        self._tables: dict[str, FrozenTable] = {}
        # Tables whose rows have changed since their snapshot.
        self._live: set[str] = set()

    @property
    def now(self) -> Indexes:
        """The indexes that are in step with what is served."""
        return self._indexes[0]

    @property
    def indexes(self) -> dict[str, NearestIndex]:
        """These, by table."""
        return self.now.indexes

    def of(self, wanted: Version) -> Indexes:
        """Return the indexes of a version; NotFound says of which there are."""
        known = [each for each in self._indexes if each.version is not None]
        for each in known:
            if each.version is not None and each.version.stands_for(wanted):
                return each
        have = " and ".join(str(each.version) for each in known) or "none"
        raise NotFound(f"nearest rows of {wanted} are not to be had here; of {have}", cut=wanted.cut, run=wanted.run)

    def let_go(self) -> None:
        """Keep nothing of what was before."""
        self._indexes = self.now, Indexes(self.specs, {}, None)

    def follow(self, snapshot: Snapshot) -> None:
        """Bring all indexes to a snapshot; returns when they are there."""
        made: dict[str, NearestIndex] = {}
        for name, spec in self.specs.items():
            table = snapshot.table(name)
            spec.check_columns(table.spec.dim)
            index = self.indexes.get(name)
            if index is not None and self._keep:
                index = index.copy()
            if index is None or not self._changed_in_place(spec, index, table, snapshot.version):
                index = self._built(spec, table, snapshot.version)
            made[name] = index
        before = self.now if self._keep else Indexes(self.specs, {}, None)
        self._indexes = Indexes(self.specs, made, snapshot.version), before
        self._tables = {name: snapshot.table(name) for name in self.specs}
        self._live.clear()

    def _built(self, spec: RecallSpec, table: FrozenTable, version: Version) -> NearestIndex:
        first, end = spec.columns or (0, table.spec.dim)
        keys = np.empty(table.rows, np.uint64)
        rows = np.empty((table.rows, end - first), np.float32)
        begin = 0
        for block in table.blocks:
            run = slice(begin, begin := begin + block.rows)
            keys[run], rows[run] = block.keys, _rows(spec, table, block.keys)
        index = NearestIndex(end - first, spec.metric, ann=spec.ann)
        index.build(keys, rows, stamp=version)
        return index

    def _changed_in_place(self, spec: RecallSpec, index: NearestIndex, table: FrozenTable, version: Version) -> bool:
        """Bring an index to a table by what differs; False, and nothing is changed, if that is too much."""
        keys, rows, gone, many = [_NOTHING], [], [_NOTHING], 0
        most = REBUILD * max(table.rows, 1) - index.changed
        for block in self._other_blocks(spec.table, table):
            found = _rows(spec, table, block.keys)
            differs = index.differing(block.keys, found)
            keys.append(block.keys[differs])
            rows.append(found[differs])
            many += len(keys[-1])
            if many > most:
                return False
        before = self._tables[spec.table]
        if spec.table in self._live:
            gone.append(np.setdiff1d(index.keys, np.concatenate([block.keys for block in table.blocks])))
        else:
            for old, new in zip(before.blocks, table.blocks, strict=True):
                if old is not new:
                    gone.append(np.setdiff1d(old.keys, new.keys, assume_unique=True))
        changed = np.concatenate(rows) if rows else np.empty((0, index.dim), np.float32)
        index.apply(np.concatenate(keys), changed, np.concatenate(gone), stamp=version)
        return True

    def _other_blocks(self, name: str, table: FrozenTable) -> Iterator[FrozenBlock]:
        """Yield the blocks whose rows may not be those of the index."""
        before = self._tables[name].blocks
        if len(before) != len(table.blocks) or self._tables[name].spec.dim != table.spec.dim:
            raise InvalidArgument(f"table {name} is not what it was: {len(before)} blocks became {len(table.blocks)}")
        for old, new in zip(before, table.blocks, strict=True):
            if old is not new or name in self._live:
                yield new

    # Between cuts

    def update(self, table: str, keys: Keys, rows: Floats, *, version: Version | None = None) -> None:
        """Take over changed rows: float32[n, dim], whole ones, of keys: uint64[n]; a table without an index is passed over."""
        index = self.indexes.get(table)
        if index is not None:
            first, end = self.specs[table].columns or (0, rows.shape[1])
            self._live.add(table)
            index.update(keys, rows[:, first:end], stamp=version)

    def remove(self, table: str, keys: Keys, *, version: Version | None = None) -> None:
        """Let keys: uint64[n] go; a table without an index is passed over."""
        index = self.indexes.get(table)
        if index is not None:
            self._live.add(table)
            index.remove(keys, stamp=version)

    # Asking

    def index(self, table: str) -> NearestIndex:
        """Return a table's index; UnknownTable says which there are."""
        return self.now.index(table)

    def nearest(
        self,
        table: str,
        vectors: Floats,
        k: int,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
    ) -> tuple[Nearest, Version]:
        """Return the ``k`` nearest rows of vectors: float32[q, dim], and the version that they are of."""
        return self.now.nearest(table, vectors, k, exact=exact, among=among, without=without)


_NOTHING: Keys = np.empty(0, np.uint64)


def _rows(spec: RecallSpec, table: FrozenTable, keys: Keys) -> NDArray[np.float32]:
    """Return the vectors of keys: float32[n, columns]."""
    out = np.empty((len(keys), table.spec.dim), np.float32)
    table.lookup(keys, out)
    first, end = spec.columns or (0, table.spec.dim)
    return out[:, first:end]
