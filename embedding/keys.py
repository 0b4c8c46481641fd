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
from oarlock.embedding.pointer import Int, check_output, kernel_array
from oarlock.proto.errors import InvalidArgument, Malformed

_ONE = np.uint64(1)
# The inverses, modulo 2^64, of the factors of mix64.
_INVERSE_1 = np.uint64(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
_INVERSE_2 = np.uint64(pow(0x94D049BB133111EB, -1, 1 << 64))
_IN_CACHE = 8192  # places of a table of uint32 that first-level caches hold beside what passes through them
_ORDERS = 64


class KeySet(NamedTuple):
    """Distinct keys grouped by block: keys: uint64[u], inverse: int32[n] (raw position -> position in keys),
    blocks: int32[m] in rank order, counts: int32[m]."""

    keys: NDArray[np.uint64]
    inverse: NDArray[np.int32]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]

    def occurrences(self) -> NDArray[np.int32]:
        """Return int32[u]: how often each distinct key stands among the raw keys."""
        out = np.empty(self.keys.shape[0], np.int32)
        count_positions(check_inverse(self.inverse, out.shape[0]), out)
        return out


@jit
def unmix64(x: np.uint64) -> np.uint64:
    """Return what mix64 makes ``x`` of: its steps undone, the last one first."""
    x = x ^ (x >> np.uint64(31)) ^ (x >> np.uint64(62))
    x = x * _INVERSE_2
    x = x ^ (x >> np.uint64(27)) ^ (x >> np.uint64(54))
    x = x * _INVERSE_1
    return x ^ (x >> np.uint64(30)) ^ (x >> np.uint64(60))


@jit
def group_keys(
    keys: NDArray[np.uint64],
    salt: np.uint64,
    bits: int,
    block_rank: NDArray[np.int32],
    ranks: NDArray[np.int32],
    by_rank: NDArray[np.int32],
    starts: NDArray[np.uint32],
    mixes: NDArray[np.uint64],
    parted: NDArray[np.uint64],
    positions: NDArray[np.uint32],
    numbers: NDArray[np.uint32],
    base: np.uint64,
    out: NDArray[np.uint64],
    inverse: NDArray[np.int32],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> tuple[Int, int]:
    """Fill a KeySet's arrays; return how many keys and blocks it has, or (-1, 0) if block_rank differs from ranks.

    The mixes are parted by block, and each block's distinct ones are numbered with a small table of their own, so that
    nearly every access finds its line in the first-level cache. ``numbers`` holds base + number, rising from block to
    block and from call to call: whatever is below a block's first number is free, and nothing is ever cleared.
    ``starts``: uint32[blocks]; mixes, parted and positions: of at least n; numbers: of table_size(n).
    """
    n = keys.shape[0]
    total = ranks.shape[0]
    same = block_rank.shape[0] == total
    if same:
        for b in range(total):
            same &= block_rank[b] == ranks[b]
    if not same:
        return -1, 0
    for i in range(n):
        mixes[i] = key_mix(salt, keys[i])
    for b in range(total):
        starts[b] = 0
    for i in range(n):
        starts[np.uint64(block_of_mix(mixes[i], bits))] += np.uint32(1)
    at = np.uint64(0)
    for b in range(total):
        block = np.uint64(by_rank[b])
        size = np.uint64(starts[block])
        starts[block] = np.uint32(at)
        at += size
    for i in range(n):
        mix = mixes[i]
        block = np.uint64(block_of_mix(mix, bits))
        at = np.uint64(starts[block])
        starts[block] = np.uint32(at + _ONE)
        parted[at] = mix
        positions[at] = np.uint32(i)
    count = base
    at = np.uint64(0)
    m = 0
    for b in range(total):
        end = np.uint64(starts[np.uint64(by_rank[b])])  # where the block begins has moved on to where it ends
        if at == end:
            continue
        mask = np.uint64(table_size(np.int64(end - at)) - 1)
        first = count
        while at < end:
            mix = parted[at]
            place = mix & mask
            number = np.uint64(numbers[place])
            # Without a branch on what is as random as the keys; another key's place, which is rare, has one.
            free = number < first
            number = count if free else number
            where = number - base
            if (not free) & (out[where] != mix):
                while True:
                    place = (place + _ONE) & mask
                    number = np.uint64(numbers[place])
                    free = number < first
                    number = count if free else number
                    where = number - base
                    if free:
                        break
                    if out[where] == mix:
                        break
            numbers[place] = np.uint32(number)
            out[where] = mix
            inverse[np.uint64(positions[at])] = np.int32(where)
            count += np.uint64(free)
            at += _ONE
        blocks[m] = by_rank[b]
        counts[m] = np.int32(count - first)
        m += 1
    unique = np.int64(count - base)
    # The mix is one to one, and vector units undo it faster than the keys could be fetched from where they stood.
    for i in range(unique):
        out[i] = unmix64(out[i]) ^ salt
    return unique, m


@jit
def table_size(n: Int) -> int:
    """Return the places of the table that numbers n keys: at least 4 for each, more while 32 KiB hold them."""
    size = 4
    while size < 4 * n:
        size += size
    return size + size if size <= _IN_CACHE // 2 else size


@jit
def count_positions(inverse: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """out[k] = how often k stands in inverse."""
    for i in range(out.shape[0]):
        out[i] = 0
    for i in range(inverse.shape[0]):
        out[np.uint64(inverse[i])] += np.int32(1)


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


class _Order(NamedTuple):
    """A checked order of blocks, and the scratch memory that is as long."""

    bits: int
    ranks: NDArray[np.int32]
    by_rank: NDArray[np.int32]
    starts: NDArray[np.uint32]


class KeySorter:
    """Builds KeySets; its scratch grows to the largest batch seen and is used again."""

    def __init__(self) -> None:
        self._room = 0
        self._base = 1
        self._mixes: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._parted: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._positions: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._numbers: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._orders: dict[int, _Order] = {}

    def build(self, keys: NDArray[np.uint64], salt: np.uint64, bits: int, block_rank: NDArray[np.int32]) -> KeySet:
        """Return the distinct keys of keys: uint64[n], grouped by block in rank order.

        ``salt`` from table_salt(); the table has 2^``bits`` blocks; block_rank: int32[blocks] is a permutation, the
        position of each block in the wanted order (by owner shard, then block).
        """
        keys = kernel_array("keys", keys, np.uint64)
        ranks = kernel_array("block_rank", block_rank, np.int32)
        n = keys.shape[0]
        if n >= 1 << 31:
            raise InvalidArgument(f"{n} keys in one batch are over the limit of 2^31 - 1")
        if n > self._room:
            self._reserve(n)
        if self._base + n >= 1 << 32:
            self._numbers[:] = 0
            self._base = 1
        base = np.uint64(self._base)
        self._base += n  # before the kernel: an interrupt must not leave numbers behind that count as of this call
        # A worker uses the arrays of its routes again and again. The kernel compares what they hold: an identity comes
        # back with another array, and an array may be written to.
        order = self._orders.get(id(block_rank))
        if order is None or order.bits != bits:
            order = self._order(block_rank, ranks, bits)
        inverse = np.empty(n, np.int32)
        out = np.empty(n, np.uint64)
        most = min(n, ranks.shape[0])
        blocks = np.empty(most, np.int32)
        counts = np.empty(most, np.int32)
        while True:
            unique, m = group_keys(
                keys,
                np.uint64(salt),
                bits,
                ranks,
                order.ranks,
                order.by_rank,
                order.starts,
                self._mixes,
                self._parted,
                self._positions,
                self._numbers,
                base,
                out,
                inverse,
                blocks,
                counts,
            )
            if unique >= 0:
                return KeySet(out[:unique], inverse, blocks[:m], counts[:m])
            order = self._order(block_rank, ranks, bits)

    def _order(self, given: NDArray[np.int32], ranks: NDArray[np.int32], bits: int) -> _Order:
        blocks = 1 << bits
        if ranks.shape[0] != blocks or not np.array_equal(np.sort(ranks), np.arange(blocks)):
            raise Malformed(f"block_rank must hold each of 0 to {blocks - 1} once")
        if len(self._orders) >= _ORDERS:
            self._orders.clear()
        order = _Order(bits, ranks.copy(), np.argsort(ranks).astype(np.int32), np.empty(blocks, np.uint32))
        self._orders[id(given)] = order
        return order

    def _reserve(self, n: int) -> None:
        room = max(16, 1 << (n - 1).bit_length())
        self._mixes = np.empty(room, np.uint64)
        self._parted = np.empty(room, np.uint64)
        self._positions = np.empty(room, np.uint32)
        # Zeros of pages that are never touched take no memory: this much is for a batch that is of one block.
        self._numbers = np.zeros(int(table_size(room)), np.uint32)
        self._base = 1
        self._room = room


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
    inverse = check_inverse(inverse, narrow.shape[0])
    if wide.shape != (inverse.shape[0], narrow.shape[1]):
        raise Malformed(f"{inverse.shape[0]} raw keys do not fit values of shape {wide.shape} and {narrow.shape}")
    return inverse


def check_inverse(inverse: NDArray[np.int32], unique: int) -> NDArray[np.int32]:
    """Return inverse: int32[n] for kernels, if it points at ``unique`` distinct keys only."""
    inverse = kernel_array("inverse", inverse, np.int32)
    if inverse.shape[0] and not 0 <= int(inverse.min()) <= int(inverse.max()) < unique:
        raise Malformed(f"inverse points outside the {unique} distinct keys")
    return inverse
