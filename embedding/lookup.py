# SPDX-License-Identifier: Apache-2.0
"""Some of a block's rows, copied out whole: those of given keys, or a run of them in ascending order of keys.

Invariant: looking changes nothing, and what one call returns is of one instant. A key that is there throughout comes once
in a walk of runs, however the block grows meanwhile, because the order of keys is not the order of buckets.
An expanding table is copied a block at a time, for its two halves keep no common index.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import BlockRows, export_rows
from oarlock.embedding.descriptor import BUCKETS, COUNT, ENTRIES
from oarlock.embedding.explain import find_word
from oarlock.embedding.index import PENDING, SPILLED, list_entries
from oarlock.embedding.make import AnyTable
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.store import Store, keeps

Keys = NDArray[np.uint64]


def row_bytes(table: AnyTable) -> int:
    """Return how many bytes a row takes that travels with its key."""
    return 8 + 4 * (table.spec.dim + table.state_columns + table.counters)


def counter_names(spec: TableSpec) -> list[str]:
    """Return what a row's counters are, in their order; ``shows`` and ``clicks`` are float32."""
    keep = keeps(spec)
    wanted = {
        "occurrences": keep.occurrences,
        "last_update": keep.updated,
        "shows": keep.score,
        "clicks": keep.score,
        "version": keep.version,
    }
    return [name for name, kept in wanted.items() if kept] + (["expanded"] if spec.expand_score else [])


def rows_of(table: AnyTable, block: int, keys: Keys) -> BlockRows:
    """Return the rows of those of keys: uint64[n], each once, that a stored block has, in ascending order of keys."""
    if not isinstance(table, Store):
        whole = table.export_block(block)
        return _chosen(whole, np.flatnonzero(np.isin(whole.keys, keys)))
    table.stored(block)
    with table.holding(block) as descriptor:
        table.stored(block)
        words = table.descriptors[block]
        found = np.array([find_word(int(words[BUCKETS]), int(words[COUNT]), table.salt, key) for key in keys], np.int64)
        here = (found >= 0) & ((found < PENDING) | (found >= SPILLED))
        return _copied(table, descriptor, keys[here], found[here].astype(np.uint32))


def rows_from(table: AnyTable, block: int, least: int, most: int) -> tuple[BlockRows, bool]:
    """Return up to ``most`` rows of a stored block, of its lowest keys from ``least`` on, and whether there are more."""
    if not isinstance(table, Store):
        whole = table.export_block(block)
        here = np.flatnonzero(whole.keys >= np.uint64(least))
        return _chosen(whole, _lowest(whole.keys, here, most)), len(here) > most
    table.stored(block)
    with table.holding(block) as descriptor:
        table.stored(block)
        words = table.descriptors[block]
        keys = np.empty(int(words[ENTRIES]), np.uint64)
        values = np.empty(len(keys), np.uint32)
        list_entries(int(words[BUCKETS]), 0, int(words[COUNT]), keys, values)
        here = np.flatnonzero(((values < PENDING) | (values >= SPILLED)) & (keys >= np.uint64(least)))
        chosen = _lowest(keys, here, most)
        return _copied(table, descriptor, keys[chosen], values[chosen]), len(here) > most


def _copied(table: Store, descriptor: int, keys: Keys, words: NDArray[np.uint32]) -> BlockRows:
    """Copy the rows with these index words; the caller holds the block."""
    rows = int((words < PENDING).sum())
    weights = np.empty((rows, table.spec.dim), np.float32)
    state = np.empty((rows, table.state_columns), np.float32)
    counters = np.empty((rows, table.counters), np.uint32)
    keys, words = keys.copy(), words.copy()
    export_rows(descriptor, table.layout, keys, words, address_of(weights), state, counters)
    out = BlockRows(keys[:rows], weights, state, counters)
    if rows < len(words):
        out = table._with_cold(out, words[rows:])
    return _chosen(out, np.arange(len(out.keys)))


def _lowest(keys: Keys, here: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the up to ``most`` of the positions ``here`` that hold the lowest keys."""
    return here[np.argpartition(keys[here], most - 1)[:most]] if len(here) > most else here


def _chosen(rows: BlockRows, here: NDArray[np.int64]) -> BlockRows:
    """Return the rows at some positions, in ascending order of keys."""
    at = here[np.argsort(rows.keys[here])]
    return BlockRows(rows.keys[at], rows.weights[at], rows.state[at], rows.counters[at])
