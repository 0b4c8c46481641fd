# SPDX-License-Identifier: Apache-2.0
"""Keys by part: a model in N parts has in part I of each table the blocks whose number modulo N is I.

Invariant: a key's part depends on the table's salt, its number of blocks, and N alone. Within a part keys stand in the order in
which they were given. Pure functions, any thread.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, kernel_array


@jit
def find_of_other(keys: NDArray[np.uint64], salt: np.uint64, bits: int, parts: int, part: int) -> tuple[Int, Int]:
    """Return the position of the first of keys: uint64[n] that is in another part, and which that is; -1 if none is."""
    for i in range(keys.shape[0]):
        found = block_of_mix(key_mix(salt, keys[i]), bits) % parts
        if found != part:
            return np.int64(i), np.int64(found)
    return np.int64(-1), np.int64(-1)


@jit
def group_by_part(
    keys: NDArray[np.uint64],
    salt: np.uint64,
    bits: int,
    parts_of: NDArray[np.int64],
    starts: NDArray[np.int64],
    grouped: NDArray[np.uint64],
    positions: NDArray[np.int64],
) -> None:
    """Write keys: uint64[n] to grouped: uint64[n], part after part, and where each stood to positions: int64[n].

    starts: int64[parts + 1], of zeros: where each part begins, and the end. parts_of: int64[n], for its own use.
    """
    n, parts = keys.shape[0], starts.shape[0] - 1
    for i in range(n):
        part: Int = block_of_mix(key_mix(salt, keys[i]), bits) % parts
        parts_of[i] = part
        starts[part] += 1
    # Where each part ends, which moves to where it begins as it is filled from behind.
    for part in range(1, parts + 1):
        starts[part] += starts[part - 1]
    for back in range(1, n + 1):
        i = n - back
        part = parts_of[i]
        at = starts[part] - 1
        starts[part] = at
        grouped[at] = keys[i]
        positions[at] = i


class Grouped(NamedTuple):
    """keys: uint64[n], part after part; positions: int64[n], where each stood; starts: int64[parts + 1] within both."""

    keys: NDArray[np.uint64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]


def grouped_by_part(keys: NDArray[np.uint64], salt: np.uint64, blocks: int, parts: int) -> Grouped:
    """Return keys: uint64[n] of a table with that salt and so many blocks (a power of two), part after part."""
    keys = kernel_array("keys", keys, np.uint64)
    n = len(keys)
    found = Grouped(np.empty(n, np.uint64), np.empty(n, np.int64), np.zeros(parts + 1, np.int64))
    bits, room = blocks.bit_length() - 1, np.empty(n, np.int64)
    group_by_part(keys, salt, bits, room, found.starts, found.keys, found.positions)
    return found


def find_other(keys: NDArray[np.uint64], salt: np.uint64, blocks: int, parts: int, part: int) -> tuple[int, int]:
    """Return the position of the first of keys: uint64[n] that is not in ``part``, and which it is in; -1, -1 if all are."""
    keys = kernel_array("keys", keys, np.uint64)
    at, other = find_of_other(keys, salt, blocks.bit_length() - 1, parts, part)
    return int(at), int(other)


def warm_up() -> None:
    """Compile, or load from the cache, the kernels of parts."""
    keys = np.arange(3, dtype=np.uint64)
    grouped_by_part(keys, np.uint64(1), 2, 2)
    find_other(keys, np.uint64(1), 2, 2, 0)


@cache
def warm_up_once() -> None:
    """Do so the first time."""
    warm_up()
