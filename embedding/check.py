# SPDX-License-Identifier: Apache-2.0
"""Whether a request is what it says: kernels that look, change nothing, and say where the first fault is.

Invariant: a request that ``check_groups`` found fine reads and writes only its own arrays and the blocks it names. Kernels
only; policy and messages are in ``embedding/table.py``.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS
from oarlock.embedding.hashing import block_of_mix, key_mix
from oarlock.embedding.jit import jit

# What was found; the place of the fault comes beside it.
FINE = 0
BAD_COUNT = 1
OUT_OF_RANGE = 2
REPEATED_BLOCK = 3
NOT_STORED = 4
WRONG_SUM = 5
WRONG_BLOCK = 6
REPEATED_KEY = 7

_ONE = np.uint64(1)


@jit
def check_groups(
    descriptors: NDArray[np.int64],
    n: int,
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    seen: NDArray[np.uint8],
    fault: NDArray[np.int64],
) -> int:
    """Check how a request is grouped; return FINE or a code, with the group's number in fault[0].

    ``seen``: uint8[blocks of the table], zero before and after.
    """
    code = FINE
    total = np.int64(0)
    done = 0
    for group in range(blocks.shape[0]):
        block = np.int64(blocks[group])
        fault[0] = group
        if block < 0 or block >= descriptors.shape[0]:
            code = OUT_OF_RANGE
        elif counts[group] <= 0:
            code = BAD_COUNT
        elif seen[block] != 0:
            code = REPEATED_BLOCK
        elif descriptors[block, BUCKETS] == 0:
            code = NOT_STORED
        if code != FINE:
            break
        seen[block] = 1
        done += 1
        total += counts[group]
    for group in range(done):
        seen[blocks[group]] = 0
    if code == FINE and total != n:
        fault[0] = total
        return WRONG_SUM
    return code


@jit
def check_keys(
    salt: np.uint64,
    bits: int,
    keys: NDArray[np.uint64],
    blocks: NDArray[np.int32],
    counts: NDArray[np.int32],
    places: NDArray[np.int32],
    fault: NDArray[np.int64],
) -> int:
    """Check that each key hashes to its group's block and, if ``places`` is not empty, that no key comes twice.

    ``places``: int32[power of two > n] of zeros, used up. Returns FINE or a code, with the key's position in fault[0].
    """
    unique = places.shape[0] > 0
    mask = np.uint64(max(places.shape[0], 1) - 1)
    begin = 0
    for group in range(blocks.shape[0]):
        end = begin + counts[group]
        for i in range(begin, end):
            mix = key_mix(salt, keys[i])
            fault[0] = i
            if block_of_mix(mix, bits) != blocks[group]:
                return WRONG_BLOCK
            if unique:
                place = mix & mask
                while places[place] != 0:
                    if keys[places[place] - 1] == keys[i]:
                        return REPEATED_KEY
                    place = (place + _ONE) & mask
                places[place] = i + 1
        begin = end
    return FINE
