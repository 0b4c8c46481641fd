# SPDX-License-Identifier: Apache-2.0
"""What a job whose pushes leave something out gives its rough rows and dense values, batch by batch.

Invariant: a pure function of the batch's number. All values are multiples of 1/256 below 2^15, and the first column of a row, or
value of a dense block, is 127 times the batches that gave it, which none of the others reaches: so float32 adds and subtracts
them without rounding, the scales of int8 are whole numbers, and what compression leaves out is a multiple of 1/256 again.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import blocks_of, table_salt

TABLE, DENSE = "rough", "rough_dense"
# Of each split so many keys, one in each block, of so many columns; and so many values of a dense block of its own.
KEYS, DIM, VALUES = 4, 4, 8
# Pushes by which a job's rough rows, or all its dense parameters, can travel.
FORMS = ("float16+feedback", "bfloat16+feedback", "int8+feedback", "topk:0.25")
_ANCHOR, _MOST = 127.0, 100


@lru_cache(maxsize=32)
def keys_by_block(table: str, blocks: int, count: int) -> NDArray[np.uint64]:
    """Return uint64[count, blocks]: so many keys of each block of a table, no key twice. ``blocks`` is a power of two."""
    found: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)] * blocks
    first = 0
    while min(map(len, found)) < count:
        keys = np.arange(first, first + 4096, dtype=np.uint64)
        numbers = np.empty(len(keys), np.int32)
        blocks_of(keys, table_salt(table), blocks.bit_length() - 1, numbers)
        found = [np.concatenate([f, keys[numbers == b]]) for b, f in enumerate(found)]
        first += len(keys)
    return np.stack([f[:count] for f in found], axis=1)


@lru_cache(maxsize=4096)
def rows_of(number: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return bool[KEYS], which of its split's keys a batch has, one at least, and float32[KEYS, DIM], their gradients."""
    rng = np.random.default_rng([1, number])
    present = rng.random(KEYS) < 0.6
    present[rng.integers(KEYS)] = True
    return present, np.where(present[:, None], _values(rng, (KEYS, DIM)), np.float32(0))


@lru_cache(maxsize=4096)
def dense_of(number: int) -> NDArray[np.float32]:
    """Return float32[VALUES]: a batch's gradient of its split's dense block."""
    return _values(np.random.default_rng([2, number]), (VALUES,))


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (rng.integers(-_MOST * 256, _MOST * 256, shape) / 256).astype(np.float32)
    found[..., 0] = _ANCHOR
    return found
