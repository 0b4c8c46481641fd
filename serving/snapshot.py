# SPDX-License-Identifier: Apache-2.0
"""A snapshot: the tables and dense parameters of one cut, opened to be looked up, and the version that every answer carries.

Invariant: it is whole and never changes: all rows of it are of one cut, and so are its dense parameters. Every file that it lies
in had the manifest's checksum before it was made, unless it was told to trust the files. A block whose files are those of the
snapshot before is shared with it. What it lies in goes when nobody refers to it any more, so a request keeps the snapshot that it
began with. Any thread.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.embedding.frozen import FrozenBlock, FrozenTable, stored_code
from oarlock.embedding.precision import FLOAT32
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import UnknownTable
from oarlock.serving.compressed import Compressed
from oarlock.serving.part import WHOLE, ModelPart

# A table's name, keys: uint64[n], and where their rows go: float32[n, dim].
Wanted = tuple[str, NDArray[np.uint64], NDArray[np.float32]]
# Told of bytes that are opened, and of all.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Version:
    """Which state of the model it is. ``created``: seconds since the epoch of Unix; ``live``: of a job that is followed."""

    run: int
    cut: int
    created: float
    live: bool = False

    def __str__(self) -> str:
        return f"run {self.run}, live" if self.live else f"cut {self.cut} of run {self.run}"

    def stands_for(self, wanted: "Version") -> bool:
        """Tell whether it is what is wanted: the same cut of the same run; what is followed is of a run alone."""
        same = (self.live, self.run) == (wanted.live, wanted.run)
        return same and (self.live or self.cut == wanted.cut)

    def age(self, now: float | None = None) -> float:
        """Return how many seconds old it is; a clock that is behind makes it 0."""
        return max(0.0, (time.time() if now is None else now) - self.created)


class Served(Protocol):
    """A table that is looked up."""

    @property
    def spec(self) -> TableSpec: ...
    @property
    def form(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int: ...


class Model(Protocol):
    """What is served: a snapshot, or the live model of a job (``serving/live.py``)."""

    @property
    def job(self) -> str: ...
    @property
    def part(self) -> ModelPart: ...
    @property
    def version(self) -> Version: ...
    @property
    def tables(self) -> Mapping[str, Served]: ...
    @property
    def rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dense(self) -> NDArray[np.float32]: ...
    # How many times the rows of an answer are in memory while it is made.
    @property
    def copies(self) -> int: ...
    def table(self, name: str) -> Served: ...
    def lookup(self, table: str, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int: ...
    def lookup_many(self, wanted: Sequence[Wanted]) -> Sequence[int | None]: ...


def created_of(manifest: Manifest) -> float:
    """Return when a cut was made, in seconds since the epoch of Unix."""
    return datetime.fromisoformat(manifest.created).timestamp()


class Snapshot:
    """The tables of a cut; ``open_snapshot`` makes one. ``dense``: float32[P], all dense parameters in the manifest's order.

    Of a ``part`` that is not all of a model there are no dense parameters, and other parts' blocks are empty.
    """

    def __init__(
        self,
        manifest: Manifest,
        tables: Mapping[str, FrozenTable],
        blocks: Mapping[tuple[str, ...], FrozenBlock],
        dense: NDArray[np.float32],
        part: ModelPart = WHOLE,
    ) -> None:
        self.manifest = manifest
        self.part = part
        self.copies = 1
        self.job = manifest.job
        self.dense = dense
        self.version = Version(manifest.run, manifest.cut, created_of(manifest))
        self.tables = dict(tables)
        # By what tells their content: whoever has the same files has the same block.
        self.blocks = dict(blocks)
        self.rows = sum(table.rows for table in self.tables.values())
        self.nbytes = sum(table.nbytes for table in self.tables.values())

    def table(self, name: str) -> FrozenTable:
        """Return a table; UnknownTable says which there are."""
        found = self.tables.get(name)
        if found is None:
            raise unknown_table(name, self.tables)
        return found

    def lookup(self, table: str, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many of them have no row."""
        return self.table(table).lookup(keys, out)

    def lookup_many(self, wanted: Sequence[Wanted]) -> list[int]:
        """Do so for each (table, keys, out) of ``wanted``."""
        return [self.table(table).lookup(keys, out) for table, keys, out in wanted]


def unknown_table(name: str, tables: Iterable[str]) -> UnknownTable:
    """Return the error that says which tables there are."""
    have = ", ".join(tables) or "none"
    return UnknownTable(f"this model has no table {name[:200]!r}; its tables are: {have}"[:1000], table=name[:200])


def open_snapshot(
    store: Reading,
    manifest: Manifest,
    *,
    before: Snapshot | None = None,
    trust: bool = False,
    part: ModelPart = WHOLE,
    progress: Progress = lambda done, total: None,
) -> Snapshot:
    """Return the model of a cut, all of ``part`` in memory; CorruptCheckpoint names a file that is not as it was written.

    ``before``: of the same job and part, lends the blocks whose files are the same. ``trust``: do not compute checksums.
    """
    if isinstance(store, Compressed):
        return _open_compressed(store, manifest, trust, part, progress)
    specs = manifest.table_specs()
    entries = [entry for entry in manifest.blocks if entry.kind == "rows" and part.has(entry.block)]
    dense = [entry for entry in manifest.blocks if entry.kind != "rows"] if part.whole else []
    store.check_sizes(manifest, entries + dense)
    known = {} if before is None or before.job != manifest.job else before.blocks
    done, total = 0, sum(entry.total_bytes for entry in entries)
    blocks: dict[tuple[str, ...], FrozenBlock] = {}
    by_table = {name: _empty_blocks(spec, part) for name, spec in specs.items()}
    for entry in entries:
        spec = specs[entry.name]
        identity = _identity(spec, entry)
        found = known.get(identity)
        if found is None:
            found = _open_block(store, manifest, entry, spec, trust)
            found.touch()
        blocks[identity] = found
        by_table[entry.name][entry.block] = found
        done += entry.total_bytes
        progress(done, total)
    tables = {name: FrozenTable(specs[name], list(by_table[name].values()), seed=manifest.seed) for name in specs}
    return Snapshot(manifest, tables, blocks, _open_dense(store, manifest, trust, part), part)


def _empty_blocks(spec: TableSpec, part: ModelPart) -> dict[int, FrozenBlock]:
    """Return by number what stands for a table's blocks of other parts: one block without rows. Those of ``part`` are to come."""
    if part.whole and part.rows:
        return {}
    empty = FrozenBlock(spec, np.empty(0, np.uint64), np.empty((0, spec.dim), np.float32), np.empty((0, 1), np.float32))
    return dict.fromkeys(range(spec.blocks), empty)


def _open_dense(store: Reading, manifest: Manifest, trust: bool, part: ModelPart) -> NDArray[np.float32]:
    """Return float32[P]: the slices of each dense parameter in their order, the parameters in that of the manifest.

    They are for predictions, which no part of a model makes: there are none of it.
    """
    if not part.whole:
        return np.empty(0, np.float32)
    slices: dict[str, list[NDArray[np.float32]]] = {name: [] for name in manifest.dense_specs()}
    for entry in manifest.blocks:  # those of a parameter ascend by block
        if entry.kind == "dense":
            slices[entry.name].append(store.load_block(manifest, entry, checked=trust).weights.reshape(-1))
    found = [part for parts in slices.values() for part in parts]
    return np.concatenate(found) if found else np.empty(0, np.float32)


def _open_compressed(
    store: Compressed, manifest: Manifest, trust: bool, part: ModelPart, progress: Progress
) -> Snapshot:
    specs = manifest.table_specs()
    tables = {}
    for number, (name, spec) in enumerate(specs.items(), 1):
        if part.rows:
            tables[name] = store.open_table(name, spec, manifest.seed, trust=trust, part=part)
        else:
            tables[name] = FrozenTable(spec, list(_empty_blocks(spec, part).values()), seed=manifest.seed)
        tables[name].touch()
        progress(number, len(specs))
    return Snapshot(manifest, tables, {}, _open_dense(store, manifest, trust, part), part)


def _identity(spec: TableSpec, entry: BlockEntry) -> tuple[str, ...]:
    """Return what tells a block's content and form: two blocks with the same one can stand for each other."""
    files = (file.sha256 for link in entry.links for file in link.files)
    return (entry.name, str(entry.block), str(spec.dim), str(stored_code(spec)), *files)


def _open_block(store: Reading, manifest: Manifest, entry: BlockEntry, spec: TableSpec, trust: bool) -> FrozenBlock:
    if stored_code(spec) == FLOAT32:
        mapped = store.map_block(manifest, entry, checked=trust)
        if mapped is not None:
            return FrozenBlock(spec, mapped.keys, mapped.weights, mapped.state)
    image = store.load_block(manifest, entry, checked=trust)
    keys, weights = image.keys, image.weights
    if not entry.base:
        # Views of a file that was read, which has the state as well; what a chain was merged into stands alone.
        keys = keys.copy()
        weights = weights.copy() if stored_code(spec) == FLOAT32 else weights
    return FrozenBlock(spec, np.asarray(keys), weights, image.state)
