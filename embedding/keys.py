# SPDX-License-Identifier: Apache-2.0
"""What a worker does with a batch's raw keys: find the distinct ones, group them by block, merge and spread rows.

Invariant: results depend on the raw keys alone: within a block keys stand in order of first occurrence, and gradients
of one key are added in order of position. A KeySorter holds scratch memory and serves one thread; the KeySet it gives
out is plain arrays, and merge and gather are free functions for any thread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import check_output, kernel_array
from oarlock.proto.errors import InvalidArgument, Malformed

_ONE = np.uint64(1)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


class KeySet(NamedTuple):
    """Distinct keys grouped by block: keys: uint64[u], inverse: int32[n] (raw position -> position in keys),
    blocks: int32[m] in rank order, counts: int32[m]."""

    keys: NDArray[np.uint64]
    inverse: NDArray[np.int32]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]


@jit
def distinct(
    keys: NDArray[np.uint64],
    salt: np.uint64,
    bits: int,
    places: NDArray[np.uint64],
    round_: np.uint64,
    mixes: NDArray[np.uint64],
    found: NDArray[np.uint64],
    found_block: NDArray[np.int32],
    inverse: NDArray[np.int32],
    sizes: NDArray[np.int32],
) -> int:
    """Number the distinct keys in order of first occurrence; return how many.

    Fills found: uint64[u], found_block: int32[u], inverse: int32[n] and adds to sizes: int32[blocks]. ``places``:
    uint64[capacity, 2] = key | round and number; an entry of another round is empty, so nothing is ever cleared.
    """
    n = keys.shape[0]
    mask = np.uint64(places.shape[0] - 1)
    for i in range(n):
        mixes[i] = key_mix(salt, keys[i])
    count = 0
    for i in range(n):
        key = keys[i]
        place = mixes[i] & mask
        while True:
            word = places[place, 1]
            if (word >> _HALF) != round_:
                block = block_of_mix(mixes[i], bits)
                places[place, 0] = key
                places[place, 1] = (round_ << _HALF) | np.uint64(count)
                found[count] = key
                found_block[count] = block
                sizes[block] += 1
                inverse[i] = count
                count += 1
                break
            if places[place, 0] == key:
                inverse[i] = np.int32(word & _LOW)
                break
            place = (place + _ONE) & mask
    return count


@jit
def rank_blocks(
    sizes: NDArray[np.int32],
    by_rank: NDArray[np.int32],
    offsets: NDArray[np.int32],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> int:
    """List the blocks with keys in rank order, with the offset of each in the result; clear sizes; return how many."""
    m = 0
    offset = np.int32(0)
    for rank in range(by_rank.shape[0]):
        block = by_rank[rank]
        size = sizes[block]
        if size > 0:
            offsets[block] = offset
            blocks[m] = block
            counts[m] = size
            offset += size
            sizes[block] = 0
            m += 1
    return m


@jit
def place_keys(
    found: NDArray[np.uint64],
    found_block: NDArray[np.int32],
    offsets: NDArray[np.int32],
    position: NDArray[np.int32],
    inverse: NDArray[np.int32],
    out: NDArray[np.uint64],
) -> None:
    """Move each distinct key to its place among its block's, and point inverse there."""
    for i in range(out.shape[0]):
        at = offsets[found_block[i]]
        offsets[found_block[i]] = at + 1
        position[i] = at
        out[at] = found[i]
    for i in range(inverse.shape[0]):
        inverse[i] = position[inverse[i]]


@jit
def merge_rows(gradients: NDArray[np.float32], inverse: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """out[inverse[i]] += gradients[i] in order of i, from zero."""
    dim = out.shape[1]
    for i in range(out.shape[0]):
        for c in range(dim):
            out[i, c] = 0
    for i in range(inverse.shape[0]):
        at = np.uint64(inverse[i])
        for c in range(dim):
            out[at, c] += gradients[i, c]


@jit
def gather_inverse(rows: NDArray[np.float32], inverse: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """out[i] = rows[inverse[i]]."""
    dim = out.shape[1]
    for i in range(inverse.shape[0]):
        at = np.uint64(inverse[i])
        for c in range(dim):
            out[i, c] = rows[at, c]


class KeySorter:
    """Builds KeySets; its scratch grows to the largest batch seen and is used again."""

    def __init__(self) -> None:
        self._round = 0
        self._places: NDArray[np.uint64] = np.zeros((0, 2), np.uint64)
        self._mixes: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._found: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._found_block: NDArray[np.int32] = np.zeros(0, np.int32)
        self._position: NDArray[np.int32] = np.zeros(0, np.int32)
        self._sizes: NDArray[np.int32] = np.zeros(0, np.int32)
        self._offsets: NDArray[np.int32] = np.zeros(0, np.int32)
        self._ranks: NDArray[np.int32] = np.zeros(0, np.int32)
        self._by_rank: NDArray[np.int32] = np.zeros(0, np.int32)

    def build(self, keys: NDArray[np.uint64], salt: np.uint64, bits: int, block_rank: NDArray[np.int32]) -> KeySet:
        """Return the distinct keys of keys: uint64[n], grouped by block in rank order.

        ``salt`` from table_salt(); the table has 2^``bits`` blocks; block_rank: int32[blocks] is a permutation, the
        position of each block in the wanted order (by owner shard, then block).
        """
        keys = kernel_array("keys", keys, np.uint64)
        n = keys.shape[0]
        if n >= 1 << 31:
            raise InvalidArgument(f"{n} keys in one batch are over the limit of 2^31 - 1")
        self._order(block_rank, bits)
        self._reserve(n)
        inverse = np.empty(n, np.int32)
        unique = int(
            distinct(
                keys,
                np.uint64(salt),
                bits,
                self._places,
                np.uint64(self._round),
                self._mixes,
                self._found,
                self._found_block,
                inverse,
                self._sizes,
            )
        )
        most = min(unique, 1 << bits)
        blocks = np.empty(most, np.int32)
        counts = np.empty(most, np.int32)
        m = int(rank_blocks(self._sizes, self._by_rank, self._offsets, blocks, counts))
        out = np.empty(unique, np.uint64)
        place_keys(self._found, self._found_block, self._offsets, self._position, inverse, out)
        return KeySet(out, inverse, blocks[:m], counts[:m])

    def _order(self, block_rank: NDArray[np.int32], bits: int) -> None:
        ranks = kernel_array("block_rank", block_rank, np.int32)
        if np.array_equal(ranks, self._ranks):
            return
        blocks = 1 << bits
        if ranks.shape[0] != blocks or not np.array_equal(np.sort(ranks), np.arange(blocks)):
            raise Malformed(f"block_rank must hold each of 0 to {blocks - 1} once")
        self._ranks = ranks.copy()
        self._by_rank = np.argsort(ranks).astype(np.int32)
        self._sizes = np.zeros(blocks, np.int32)
        self._offsets = np.zeros(blocks, np.int32)

    def _reserve(self, n: int) -> None:
        if self._places.shape[0] < max(2 * n, 1):
            room = max(16, 1 << (n - 1).bit_length())  # of every scratch array alike, so that all fit any n up to it
            self._places = np.zeros((2 * room, 2), np.uint64)
            self._mixes = np.empty(room, np.uint64)
            self._found = np.empty(room, np.uint64)
            self._found_block = np.empty(room, np.int32)
            self._position = np.empty(room, np.int32)
            self._round = 0
        self._round += 1
        if self._round == 1 << 32:
            self._places[:] = 0
            self._round = 1


def merge(gradients: NDArray[np.float32], inverse: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """Write to out: float32[u, dim] each distinct key's sum of gradients: float32[n, dim], in order of position."""
    check_output("out", out)
    gradients = kernel_array("gradients", gradients, np.float32, 2)
    merge_rows(gradients, _fitting(gradients, inverse, kernel_array("out", out, np.float32, 2)), out)


def gather(rows: NDArray[np.float32], inverse: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """Write to out: float32[n, dim] the line of rows: float32[u, dim] of each raw position."""
    check_output("out", out)
    rows = kernel_array("rows", rows, np.float32, 2)
    gather_inverse(rows, _fitting(kernel_array("out", out, np.float32, 2), inverse, rows), out)


def _fitting(wide: NDArray[np.float32], inverse: NDArray[np.int32], narrow: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return inverse for kernels, if ``wide`` has a line for each raw position and ``narrow`` for each distinct key."""
    inverse = kernel_array("inverse", inverse, np.int32)
    if wide.shape != (inverse.shape[0], narrow.shape[1]):
        raise Malformed(f"{inverse.shape[0]} raw keys do not fit values of shape {wide.shape} and {narrow.shape}")
    if inverse.shape[0] and not 0 <= int(inverse.min()) <= int(inverse.max()) < narrow.shape[0]:
        raise Malformed(f"inverse points outside the {narrow.shape[0]} distinct keys")
    return inverse
