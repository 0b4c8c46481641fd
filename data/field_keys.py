# SPDX-License-Identifier: Apache-2.0
"""From the codes of a categorical field to its keys.

A code says which value of the field a row has: a value's hash, NULL_CATEGORY, OTHER_CATEGORY, or FIRST_HASH plus the number
of a bucket. Invariant: key = mix64(code ^ salt of the field's name), one-to-one within a field and never changed, since
rows in checkpoints are found by it; equal codes of two fields have keys that agree by chance only. Any thread.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from oarlock.data.categories import FIRST_HASH, NULL_CATEGORY, Hashes
from oarlock.data.draws import below
from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit

_NULL = NULL_CATEGORY
_FIRST = FIRST_HASH


def field_salt(name: str) -> np.uint64:
    """Return what tells this field's keys from another's: 8 bytes of SHA-256 of "field " and its name, little-endian."""
    return np.uint64(int.from_bytes(hashlib.sha256(b"field " + name.encode()).digest()[:8], "little"))


@jit
def bucket_codes(values: npt.NDArray[np.float32], bounds: npt.NDArray[np.float32], out: Hashes) -> None:
    """Write FIRST_HASH plus how many of the ascending bounds each value reaches; NaN becomes NULL_CATEGORY."""
    for i in range(values.shape[0]):
        x = values[i]
        if np.isnan(x):
            out[i] = _NULL
            continue
        low = 0
        high = bounds.shape[0]
        while low < high:
            middle = (low + high) // 2
            if bounds[middle] <= x:
                low = middle + 1
            else:
                high = middle
        out[i] = _FIRST + np.uint64(low)


@jit
def fold_codes(codes: Hashes, buckets: np.uint64, out: Hashes) -> None:
    """Write FIRST_HASH plus a bucket of each code, evenly spread; null stays null."""
    for i in range(codes.shape[0]):
        code = codes[i]
        out[i] = _FIRST + below(mix64(code), buckets) if code != _NULL else code


@jit
def begin_cross(parts: np.uint64, out: Hashes) -> None:
    """Write the code of a cross of ``parts`` columns before the first is added."""
    out[:] = mix64(parts)


@jit
def add_to_cross(codes: Hashes, out: Hashes) -> None:
    """Absorb the next column's codes into those of a cross; the order of columns counts."""
    for i in range(codes.shape[0]):
        h = mix64(out[i] ^ codes[i])
        out[i] = h + _FIRST if h < _FIRST else h


@jit
def write_keys(codes: Hashes, salt: np.uint64, out: Hashes, column: int) -> None:
    """Write the keys of a field's codes to ``out[:, column]``."""
    for i in range(codes.shape[0]):
        out[i, column] = mix64(codes[i] ^ salt)


@jit
def write_plain_keys(codes: Hashes, replaced: Hashes, by: np.uint64, salt: np.uint64, out: Hashes, column: int) -> None:
    """Write the keys of a field's codes to ``out[:, column]``, with ``by`` in place of those among ``replaced``, a few."""
    for i in range(codes.shape[0]):
        code = codes[i]
        for j in range(replaced.shape[0]):
            if code == replaced[j]:
                code = by
        out[i, column] = mix64(code ^ salt)
