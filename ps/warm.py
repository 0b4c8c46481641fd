# SPDX-License-Identifier: Apache-2.0
"""Warm rows: what a checkpoint of another job has of a table, as rows of this job's table of perhaps another spec.

    key        as it is; hashed anew, since names and numbers of blocks may differ
    weights    as they are, rounded to nearest where they are stored; truncated, or padded with first values
    state      of each part: as it is under an optimizer of the same name and width, else that of a new row
    counters   occurrences, shows and clicks as they are, if both tables keep them; steps and versions start anew

Invariant: what a block holds does not depend on how many shards there are, nor on the order in which files are read. Keys that
wait for a row, sketches, and operations are not taken over. Orders come from the coordinator; the push lock is held throughout.
"""

from threading import Lock

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.checkpoint.writing import read_blocks
from oarlock.client.warm import WarmStart, matched
from oarlock.embedding.content import BlockRows
from oarlock.embedding.dense import DenseBlock
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.make import make_table
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.spec import DenseSpec, Part, TableSpec
from oarlock.embedding.store import keeps
from oarlock.ps.shard import Shard

Rows = NDArray[np.float32]
# Of the counters of a row, those that mean the same in another job.
LASTING = ("occurrences", "shows", "clicks", "expanded")
# As embedding/precision.py has them: below, a scale's own rounding would count; above, 127 of it would be infinite.
_SCALE_MIN = np.float32(2.0**-126)
_SCALE_MAX = np.nextafter(np.float32(3.4028234663852886e38 / 127), np.float32(0))


def warm_up(shard: Shard, numbers: list[int], warm: WarmStart, seed: int) -> None:
    """Fill blocks that were created with what ``warm`` takes over."""
    store, manifest = open_checkpoint(warm.path, options=shard.place.options_for(warm.path))
    layout = shard.layout
    old_tables, old_dense = manifest.table_specs(), manifest.dense_specs()
    matched(warm, {t.name: t for t in layout.tables}, {d.name: d for d in layout.dense}, old_tables, old_dense)
    mine: dict[str, list[int]] = {}
    for number in numbers:
        name, block = layout.name(number)
        mine.setdefault(name, []).append(block)
    for name, old in warm.tables.items():
        if name in mine:
            _warm_table(shard, name, mine[name], old_tables[old], store, manifest, seed)
    for name, old in warm.dense.items():
        if name in mine:
            _warm_dense(shard, name, mine[name], old_dense[old], store, manifest)


def _warm_table(
    shard: Shard, name: str, blocks: list[int], old: TableSpec, store: CheckpointStore, manifest: Manifest, seed: int
) -> None:
    table = shard.tables[shard.layout.table_index[name]]
    spec = table.spec
    converter = Converter(old, spec, seed)
    parts: dict[int, list[BlockRows]] = {block: [] for block in blocks}
    guard = Lock()

    def use(entry: BlockEntry, image: BlockImage) -> None:
        found = converter.by_block(image, parts)
        with guard:
            for block, rows in found.items():
                parts[block].append(rows)

    needed = _needed(old, spec, blocks)
    entries = [e for e in manifest.blocks if e.kind == "rows" and e.name == old.name and e.block in needed]
    read_blocks(store, manifest, entries, use)
    for block in blocks:
        # One block at a time: what was read of it goes.
        rows = parts.pop(block)
        if rows:
            table.import_block(block, _joined(rows))


def _needed(old: TableSpec, spec: TableSpec, blocks: list[int]) -> set[int]:
    """Return the blocks of ``old`` that may have keys of ``blocks`` of ``spec``."""
    if old.name != spec.name:
        return set(range(old.blocks))
    if old.blocks <= spec.blocks:
        return {block // (spec.blocks // old.blocks) for block in blocks}
    many = old.blocks // spec.blocks
    return {many * block + i for block in blocks for i in range(many)}


def _joined(rows: list[BlockRows]) -> BlockRows:
    keys, weights, state, counters = (np.concatenate([part[i] for part in rows]) for i in range(4))
    order = np.argsort(keys)
    return BlockRows(keys[order], weights[order], state[order], counters[order])


class Converter:
    """Rows of ``old`` as rows of ``spec`` in a job of seed ``seed``. Callable from several threads at once."""

    def __init__(self, old: TableSpec, spec: TableSpec, seed: int) -> None:
        self._old, self._spec, self._seed = old, spec, seed
        self._salt, self._bits = table_salt(spec.name), spec.blocks.bit_length() - 1
        self._old_counters, self._counters = counter_names(old), counter_names(spec)

    def by_block(self, image: BlockImage, wanted: dict[int, list[BlockRows]]) -> dict[int, BlockRows]:
        """Return the rows of an image that belong into the blocks of ``wanted``, by block."""
        where = np.empty(len(image.keys), np.int32)
        blocks_of(np.ascontiguousarray(image.keys), self._salt, self._bits, where)
        order = np.argsort(where, kind="stable")
        found, begins = np.unique(where[order], return_index=True)
        ends = [*begins[1:].tolist(), len(order)]
        chosen = {b: order[i:j] for b, i, j in zip(found.tolist(), begins.tolist(), ends, strict=True) if b in wanted}
        return {block: self.rows(image, at) for block, at in chosen.items()}

    def rows(self, image: BlockImage, at: NDArray[np.int64]) -> BlockRows:
        """Return rows ``at`` of an image."""
        keys = np.ascontiguousarray(image.keys[at])
        counters = image.counters[at] if image.counters.size else np.zeros((len(keys), 0), np.uint32)
        expanded = np.ones(len(keys), np.bool_)
        if self._old.expand_score and counters.shape[1]:
            expanded = counters[:, -1] != 0
        narrow = bool(self._spec.expand_score) and self._alike_parts()
        weights = self._weights(keys, image.weights[at], expanded, narrow)
        state = self._state(weights, image.state[at], expanded, narrow)
        return BlockRows(keys, weights, state, self._counted(counters, expanded if narrow else np.ones_like(expanded)))

    def _alike_parts(self) -> bool:
        return [p.width for p in self._old.all_parts] == [p.width for p in self._spec.all_parts]

    def _weights(self, keys: NDArray[np.uint64], old: Rows, expanded: NDArray[np.bool_], narrow: bool) -> Rows:
        out = np.empty((len(keys), self._spec.dim), np.float32)
        same = min(old.shape[1], out.shape[1])
        out[:, :same] = old[:, :same]
        whole = bool(expanded.all()) or narrow
        if same < out.shape[1] or not whole:
            first = first_values(self._spec, self._seed, keys)
            out[:, same:] = first[:, same:]
            if not whole:
                # Rows that had not grown yet: the rest of them as of a new row.
                width = self._old.all_parts[0].width
                out[~expanded, width:] = first[~expanded, width:]
        return out

    def _state(self, weights: Rows, old: Rows, expanded: NDArray[np.bool_], narrow: bool) -> Rows:
        columns = []
        begin = 0
        alike = self._alike_parts()
        for number, part in enumerate(self._spec.all_parts):
            fresh = _initial(part)
            its = self._old.all_parts[number] if alike else None
            values = np.repeat(fresh[None], len(weights), 0)
            if its is not None:
                end = begin + len(_initial(its))
                if its.optimizer.name == part.optimizer.name:
                    kept = expanded if number else np.ones_like(expanded)
                    values[kept] = old[kept, begin:end]
                begin = end
            columns.append(values)
        if self._spec.dtype == "int8":
            columns.append(scales(weights)[:, None])
        return np.ascontiguousarray(np.concatenate(columns, 1))

    def _counted(self, old: NDArray[np.uint32], expanded: NDArray[np.bool_]) -> NDArray[np.uint32]:
        out = np.zeros((len(old), len(self._counters)), np.uint32)
        for column, name in enumerate(self._counters):
            if name == "expanded":
                out[:, column] = expanded
            elif name in LASTING and name in self._old_counters and old.shape[1]:
                out[:, column] = old[:, self._old_counters.index(name)]
        return out


def counter_names(spec: TableSpec) -> list[str]:
    """Return what the counters of a table's rows count, in the order of a checkpoint's."""
    kept = keeps(spec)
    found = [
        *(["occurrences"] if kept.occurrences else []),
        *(["updated"] if kept.updated else []),
        *(["shows", "clicks"] if kept.score else []),
        *(["version"] if kept.version else []),
    ]
    return [*found, "expanded"] if spec.expand_score else found


def first_values(spec: TableSpec, seed: int, keys: NDArray[np.uint64]) -> Rows:
    """Return what new rows of a table begin with: float32[n, dim]."""
    plain = TableSpec(
        spec.name, spec.dim, spec.optimizer, spec.initializer, blocks=1, parts=spec.parts, expand_score=0.0
    )
    table = make_table(plain, seed=seed)
    try:
        table.adopt(0)
        out = np.empty((len(keys), spec.dim), np.float32)
        if len(keys):
            table.pull(keys, np.zeros(1, np.int32), np.array([len(keys)], np.int32), out)
        return out
    finally:
        table.close()


def scales(weights: Rows) -> Rows:
    """Return the scales of rows that are stored as int8: float32[n]."""
    largest = np.abs(weights).max(axis=1, initial=0.0)
    found = np.clip(largest / np.float32(127), _SCALE_MIN, _SCALE_MAX)
    return np.where(largest == 0, np.float32(0), found).astype(np.float32)


def _initial(part: Part) -> Rows:
    return optimizer_of(part.optimizer).initial_state(part.optimizer, part.width)


def _warm_dense(
    shard: Shard, name: str, blocks: list[int], old: DenseSpec, store: CheckpointStore, manifest: Manifest
) -> None:
    parameter = next(p for p in shard.dense if p.spec.name == name)
    spec = parameter.spec
    values, states = np.empty(spec.size, np.float32), {}
    first, last = min(blocks) * spec.slice, (max(blocks) + 1) * spec.slice
    for entry in manifest.blocks:
        begin = entry.block * old.slice
        if (entry.kind, entry.name) != ("dense", old.name) or begin >= last or begin + old.slice <= first:
            continue
        image = store.load_block(manifest, entry)
        values[begin : begin + image.weights.shape[1]] = image.weights[0]
        states[entry.block] = image.state[0]
    # States of slices that were cut elsewhere cannot be put together: some have columns of their own.
    alike = old.slice == spec.slice and old.optimizer.name == spec.optimizer.name
    for block in blocks:
        begin, length = block * spec.slice, min(spec.slice, spec.size - block * spec.slice)
        fresh = optimizer_of(spec.optimizer).initial_state(spec.optimizer, length)
        weights = values[begin : begin + length].copy()
        parameter.import_block(block, DenseBlock(weights, states[block].copy() if alike else fresh))
