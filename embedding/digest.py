# SPDX-License-Identifier: Apache-2.0
"""The digest of a model: a number of 128 bits that is the same for the same rows and dense values, however they are stored.

    row             h = hash(table, key, weights, state, counters), of the bits that ``export_block`` gives
    dense block     the same with the parameter's name for the table, and the block's number for the key
    waiting key     hash(table, key, how often it has come); a block's sketch: hash(table, block, its bytes)
    digest          the sum of all of them modulo 2^128

Invariant: a sum has no order, so slots, blocks, shards and files are no part of it; neither is what no training reads (an undo's
ring is not among the counters). Two lanes of 64 bits are hashed by chains of ``mix64``, each begun by another constant and by
the number of values, so that values cannot change places with each other or with the end of a row. Any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import GOLDEN, mix64, table_salt
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import kernel_array

Words = NDArray[np.uint32]

ROWS, DENSE, WAITING, SKETCH = 1, 2, 3, 4
# Digits of pi beyond the point, as Blowfish takes them.
_LANE_1 = np.uint64(0x243F6A8885A308D3)
_LANE_2 = np.uint64(0x13198A2E03707344)
_NO_WORDS: Words = np.zeros((0, 0), np.uint32)


@jit
def hash_rows(
    begin: np.uint64,
    keys: NDArray[np.uint64],
    weights: NDArray[np.uint32],
    state: NDArray[np.uint32],
    counters: NDArray[np.uint32],
    total: NDArray[np.uint64],
) -> None:
    """Add the hashes of rows to total: uint64[2] (low, high); ``begin`` tells tables and kinds of content apart."""
    low, high = total[0], total[1]
    for i in range(keys.shape[0]):
        a = mix64((keys[i] ^ begin ^ _LANE_1) + GOLDEN)
        b = mix64((keys[i] ^ begin ^ _LANE_2) + GOLDEN)
        for part in range(3):
            line = weights[i] if part == 0 else (state[i] if part == 1 else counters[i])
            size = np.uint64(line.shape[0])
            a = mix64((a ^ size) + GOLDEN)
            b = mix64((b ^ size) + GOLDEN)
            for column in range(line.shape[0]):
                word = np.uint64(line[column])
                a = mix64((a ^ word) + GOLDEN)
                b = mix64((b ^ word) + GOLDEN)
        low += a
        high += b
        if low < a:
            high += np.uint64(1)
    total[0], total[1] = low, high


class Digest:
    """A digest in the making: add every block once, in any order."""

    def __init__(self) -> None:
        self._total: NDArray[np.uint64] = np.zeros(2, np.uint64)

    def _add(self, kind: int, name: str, keys: NDArray[np.uint64], *parts: NDArray[np.generic]) -> None:
        missing = (_NO_WORDS,) * (3 - len(parts))
        weights, state, counters = (_words(part, len(keys)) for part in (*parts, *missing))
        begin = mix64(np.uint64((int(table_salt(name)) + kind) % (1 << 64)))
        known = kernel_array("keys", keys, np.uint64)
        hash_rows(np.uint64(begin), known, weights, state, counters, self._total)

    def add_rows(
        self,
        table: str,
        block: int,
        keys: NDArray[np.uint64],
        weights: NDArray[np.float32],
        state: NDArray[np.float32],
        counters: NDArray[np.uint32],
        waiting: NDArray[np.uint64],
        waited: NDArray[np.uint32],
        sketch: bytes,
    ) -> None:
        """Add a table's block, given as the fields of its BlockRows."""
        self._add(ROWS, table, keys, weights, state, counters)
        if len(waiting):
            self._add(WAITING, table, waiting, waited.reshape(-1, 1))
        if sketch:
            padded = np.frombuffer(sketch + bytes(-len(sketch) % 4), "<u4").reshape(1, -1)
            self._add(SKETCH, table, np.array([block], np.uint64), padded)

    def add_dense(self, parameter: str, block: int, weights: NDArray[np.float32], state: NDArray[np.float32]) -> None:
        """Add a block of a dense parameter: weights float32[n], state float32[s]."""
        self._add(DENSE, parameter, np.array([block], np.uint64), weights.reshape(1, -1), state.reshape(1, -1))

    @property
    def value(self) -> int:
        """The number."""
        return int(self._total[1]) << 64 | int(self._total[0])

    def __str__(self) -> str:
        return f"{self.value:032x}"


def _words(values: NDArray[np.generic], rows: int) -> Words:
    """Return the bits of values of 4 bytes each, as uint32[rows, n]."""
    if values.size == 0:
        return np.zeros((rows, 0), np.uint32)
    return kernel_array("values", np.ascontiguousarray(values).view(np.uint32), np.uint32, 2)
