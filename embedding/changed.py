# SPDX-License-Identifier: Apache-2.0
"""Rows of keys that changed, copied out of a table's blocks in the form in which tables that are served store them.

Invariant: looking changes nothing; a block is entered for its own keys of one call, as by a pull. What one call returns is of one
instant only if whoever calls keeps others from changing the blocks meanwhile. Any thread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, CHUNKS, COUNT, DESCRIPTOR_BYTES
from oarlock.embedding.frozen import stored_bytes, stored_rows
from oarlock.embedding.hashing import key_mix
from oarlock.embedding.index import PENDING, SPILLED, VALUE, find, home
from oarlock.embedding.jit import jit
from oarlock.embedding.lock import enter, leave
from oarlock.embedding.lookup import rows_of
from oarlock.embedding.make import AnyTable
from oarlock.embedding.pointer import Int, copy, kernel_array, load_i64, load_u32
from oarlock.embedding.slab import Layout, weights_at
from oarlock.embedding.store import Store

# What became of a key.
_ABSENT, _COPIED, _IN_FILE = range(3)


class Found(NamedTuple):
    """The rows that there are: present: bool[n], which of the keys have one, and rows: uint8[p, bytes] of those, in order."""

    present: NDArray[np.bool_]
    rows: NDArray[np.uint8]


@jit
def copy_changed(
    descriptors: Int,
    salt: np.uint64,
    shape: Layout,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    fates: NDArray[np.uint8],
    entries: NDArray[np.int64],
    out: Int,
    row_bytes: Int,
) -> int:
    """Tell of each key whether it has a row; copy ``row_bytes`` bytes of it to line i of ``out``.

    Return how many are in the file. A key of a block that is not stored has none. entries: scratch of n.
    """
    in_file = 0
    at = 0
    for group in range(blocks.shape[0]):
        end = at + counts[group]
        descriptor = descriptors + np.int64(blocks[group]) * DESCRIPTOR_BYTES
        enter(descriptor)
        buckets: Int = load_i64(descriptor, BUCKETS)
        if buckets != 0:
            count: Int = load_i64(descriptor, COUNT)
            chunks: Int = load_i64(descriptor, CHUNKS)
            for i in range(at, end):
                entries[i] = find(buckets, count, home(buckets, count, key_mix(salt, keys[i])), keys[i])
            for i in range(at, end):
                if entries[i] == 0:
                    continue
                word = np.int64(load_u32(entries[i], 0))
                if word < PENDING:
                    fates[i] = _COPIED
                    copy(out + i * row_bytes, weights_at(chunks, word & VALUE, shape), row_bytes)
                elif word >= SPILLED:
                    fates[i] = _IN_FILE
                    in_file += 1
        leave(descriptor)
        at = end
    return in_file


def changed_rows(
    table: AnyTable, keys: NDArray[np.uint64], blocks: NDArray[np.int32], counts: NDArray[np.int32]
) -> Found:
    """Return the rows of keys: uint64[n], each once, which are grouped by block."""
    keys = kernel_array("keys", keys, np.uint64)
    blocks, counts = kernel_array("blocks", blocks, np.int32), kernel_array("counts", counts, np.int32)
    n, row_bytes = len(keys), stored_bytes(table.spec)
    plain = isinstance(table, Store)
    store: Store = table if isinstance(table, Store) else table.narrow
    fates, out = np.zeros(n, np.uint8), np.empty((n, row_bytes), np.uint8)
    size = row_bytes if plain else 0
    scratch = np.empty(n, np.int64)
    address = out.__array_interface__["data"][0]
    filed = int(copy_changed(store.base, store.salt, store.layout, keys, blocks, counts, fates, scratch, address, size))
    if not plain:
        # Its two halves keep no common rows.
        weights = np.empty((n, table.spec.dim), np.float32)
        table.pull(keys, blocks, counts, weights)
        out = stored_rows(table.spec, weights, np.empty((n, 0), np.float32))
    elif filed:
        _from_file(table, keys, np.repeat(blocks, counts), fates, out)
    present = fates == _COPIED
    return Found(present, out if present.all() else out[present])


def _from_file(
    table: AnyTable,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    fates: NDArray[np.uint8],
    out: NDArray[np.uint8],
) -> None:
    """Add the rows that were found to be in the file: cold ones, of which hardly any has just changed."""
    for block in np.unique(blocks[fates == _IN_FILE]).tolist():
        where = np.flatnonzero((fates == _IN_FILE) & (blocks == block))
        found = rows_of(table, block, keys[where])
        order = np.argsort(keys[where])
        at = where[order[np.searchsorted(keys[where], found.keys, sorter=order)]]
        out[at] = stored_rows(table.spec, found.weights, found.state)
        fates[at] = _COPIED
    fates[fates == _IN_FILE] = _ABSENT
