# SPDX-License-Identifier: Apache-2.0
"""The identity of a categorical value: a 64-bit hash of its text, the same in every file format.

Invariant: the hash of a value never changes, on any machine, since rows in checkpoints are found by it; tests pin it. An
integer is hashed as its decimal digits, so 17 in Parquet and "17" in a text file are one value. No value has a hash below
``FIRST_HASH``: codes below it mean what no value is. Callable from any thread.

    start = mix64(length);  for every 8 bytes, little-endian, the last ones filled up with zeros:  h = mix64(h ^ word)
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit

NULL_CATEGORY = np.uint64(0)
OTHER_CATEGORY = np.uint64(1)
FIRST_HASH = np.uint64(16)

Hashes = npt.NDArray[np.uint64]

_ZERO, _ONE = np.uint64(0), np.uint64(1)
_MOST_POSITIVE = np.uint64(2**63 - 1)
_TEN = np.uint64(10)
_100 = np.uint64(100)
_10_4 = np.uint64(10**4)
_10_8 = np.uint64(10**8)
_8 = np.uint64(8)
_10 = np.uint64(10)
_16 = np.uint64(16)
_20 = np.uint64(20)
_32 = np.uint64(32)
_64 = np.uint64(64)
_BY_10 = np.uint64(103)
_BY_100 = np.uint64(10486)
_LANES_OF_32 = np.uint64(0x0000007F0000007F)
_LANES_OF_16 = np.uint64(0x000F000F000F000F)
_NOUGHTS = np.uint64(0x3030303030303030)
_NOUGHT_TO_MINUS = np.uint64(ord("0") ^ ord("-"))


@jit
def hash_bytes(data: npt.NDArray[np.uint8], start: int, stop: int) -> np.uint64:
    """Return the hash of ``data[start:stop]``."""
    h = mix64(np.uint64(stop - start))
    position = start
    while position < stop:
        word = np.uint64(0)
        count = min(8, stop - position)
        for i in range(count):
            word |= np.uint64(data[position + i]) << np.uint64(8 * i)
        h = mix64(h ^ word)
        position += 8
    return h + FIRST_HASH if h < FIRST_HASH else h


@jit
def hash_texts(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], out: Hashes) -> None:
    """Write the hash of each ``data[offsets[i]:offsets[i + 1]]`` to ``out: uint64[n]``."""
    for i in range(out.shape[0]):
        out[i] = hash_bytes(data, offsets[i], offsets[i + 1])


@jit
def _eight_digits(value: np.uint64) -> np.uint64:
    """Return the characters of a value below 10^8 with leading noughts, the first one in the lowest byte."""
    high = value // _10_4
    x = high | ((value - high * _10_4) << _32)
    # Two lanes below 10^4, then four below 100: n * 10486 >> 20 is n / 100 and n * 103 >> 10 is n / 10 there.
    high = ((x * _BY_100) >> _20) & _LANES_OF_32
    x = high | ((x - high * _100) << _16)
    high = ((x * _BY_10) >> _10) & _LANES_OF_16
    x = high | ((x - high * _TEN) << _8)
    return x + _NOUGHTS


@jit
def _count_digits(value: np.uint64) -> int:
    """Return how many digits a value below 10^8 has; 1 for 0."""
    count = 1
    power = _TEN
    for _ in range(7):
        count += 1 if value >= power else 0
        power *= _TEN
    return count


@jit
def hash_digits(magnitude: np.uint64, negative: bool) -> np.uint64:
    """Return ``hash_bytes`` of an integer's decimal digits, of which there are at most 20, and of its sign."""
    upper = magnitude // _10_8
    low = magnitude - upper * _10_8
    top = upper // _10_8
    middle = upper - top * _10_8
    # The text stands at the end of three words of 8 characters.
    third = _eight_digits(low)
    first = _ZERO
    if top != _ZERO:
        length = 16 + _count_digits(top)
    elif middle != _ZERO:
        length = 8 + _count_digits(middle)
    else:
        length = _count_digits(low)
    length += 1 if negative else 0
    gap = np.uint64(8 * (-length & 7))
    minus = _NOUGHT_TO_MINUS << gap if negative else _ZERO
    if length <= 8:
        third ^= minus
        h = mix64(mix64(np.uint64(length)) ^ (third >> gap))
        return h + FIRST_HASH if h < FIRST_HASH else h
    second = _eight_digits(middle)
    rest = _64 - gap
    if length <= 16:
        second ^= minus
    else:
        first = _eight_digits(top) ^ minus
    if gap != _ZERO:
        # A shift by 64 has no defined result.
        first = (first >> gap) | (second << rest)
        second = (second >> gap) | (third << rest)
        third = third >> gap
    h = mix64(np.uint64(length))
    if length > 16:
        h = mix64(h ^ first)
    h = mix64(mix64(h ^ second) ^ third)
    return h + FIRST_HASH if h < FIRST_HASH else h


@jit
def hash_integers(words: Hashes, signed: bool, out: Hashes) -> None:
    """Write the hash of each integer's decimal digits to ``out: uint64[n]``; ``signed``: words are two's complements."""
    for i in range(out.shape[0]):
        word = words[i]
        negative = signed and word > _MOST_POSITIVE
        # So that -2^63 has a magnitude, too.
        out[i] = hash_digits(~word + _ONE if negative else word, negative)


@jit
def replace_codes(codes: Hashes, replaced: Hashes, by: np.uint64, out: Hashes) -> None:
    """Write codes: uint64[n] to ``out``, with ``by`` in place of those among ``replaced``, a few."""
    for i in range(codes.shape[0]):
        code = codes[i]
        for j in range(replaced.shape[0]):
            if code == replaced[j]:
                code = by
        out[i] = code


def is_category(kind: Any) -> bool:
    """Tell whether an Arrow type can hold categorical values."""
    if pa.types.is_dictionary(kind):
        return is_category(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def hash_text(text: str) -> int:
    """Return the hash of one value, given as text."""
    return int(hash_array(pa.array([text], pa.string()))[0])


def hash_array(chunk: Any) -> Hashes:
    """Return the hashes of an Arrow array whose type ``is_category``; null becomes NULL_CATEGORY."""
    if pa.types.is_dictionary(chunk.type):
        # The place after the last value stands for null.
        values = np.append(hash_array(chunk.dictionary), NULL_CATEGORY)
        codes = pc.fill_null(chunk.indices.cast(pa.int64()), values.size - 1).to_numpy(zero_copy_only=False)
        picked: Hashes = values[codes]
        return picked
    if pa.types.is_null(chunk.type):
        return np.full(len(chunk), NULL_CATEGORY)
    out = np.empty(len(chunk), np.uint64)
    if pa.types.is_integer(chunk.type) or pa.types.is_boolean(chunk.type):
        _hash_integers(chunk, out)
    else:
        _hash_texts(chunk, out)
    if chunk.null_count:
        out[chunk.is_null().to_numpy(zero_copy_only=False)] = NULL_CATEGORY
    return out


def _hash_texts(chunk: Any, out: Hashes) -> None:
    wide = pa.types.is_large_string(chunk.type) or pa.types.is_large_binary(chunk.type)
    _, offsets, data = chunk.buffers()
    if offsets is None or not len(chunk):
        out[:] = NULL_CATEGORY
        return
    begins = np.frombuffer(offsets, np.int64 if wide else np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    octets = np.frombuffer(data if data is not None and data.size else b"\0", np.uint8)
    # Some of Arrow's buffers are read-only: all are, so that there is one compiled kernel.
    octets.flags.writeable = False
    hash_texts(octets, begins.astype(np.int64), out)


def _hash_integers(chunk: Any, out: Hashes) -> None:
    if pa.types.is_boolean(chunk.type):
        chunk = chunk.cast(pa.uint8())
    hash_numbers((pc.fill_null(chunk, 0) if chunk.null_count else chunk).to_numpy(zero_copy_only=False), out)


def hash_numbers(values: npt.NDArray[Any], out: Hashes) -> None:
    """Write the hashes of integers or bools of numpy to ``out: uint64[n]``."""
    signed = values.dtype.kind == "i"
    words = values.astype(np.int64, copy=False).view(np.uint64) if signed else values.astype(np.uint64, copy=False)
    if not (words.flags.c_contiguous and words.flags.writeable):
        # There is one compiled kernel.
        words = np.array(words)
    hash_integers(words, signed, out)
