# SPDX-License-Identifier: Apache-2.0
"""A sliding counting sketch: about how often each key of a block has occurred lately, in a fixed amount of memory.

    one block's sketch:  64 bytes of header | line 0 of all windows | line 1 of all windows | ...
    header (int64):      windows | lines | capacity | current window | added to it | 0 0 0
    line:                32 counters of 16 bits

A key's mix picks one line, the same in every window, and three different counters of it; its count is the sum over the
windows of the least of the three (a blocked count-min sketch). Only the current window counts. Once ``capacity``
occurrences were added to it, the next window is cleared and becomes current, so that an occurrence is forgotten after
between ``windows - 1`` and ``windows`` times ``capacity`` later ones.

Invariant: the estimate is never below the number of a key's occurrences that are not forgotten (up to 65535); the state
is a pure function of the sequence of additions, however these were grouped. It is too high when other keys
share all three counters: ``Sketch`` sizes the lines so that this happens to a new key in a window with ``capacity``
different keys with a chance of at most ``error``, hence at most ``windows * error`` in all of them. Kernels without
bounds checks; the caller holds the block's lock.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import GOLDEN, mix64
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    address_of,
    kernel_array,
    load_i64,
    load_u16,
    prefetch,
    store_i64,
    store_u16,
    store_u64,
)
from oarlock.proto.errors import InvalidArgument, Malformed

MOST = 65535  # what a counter can hold, and an estimate
WINDOWS = (2, 64)  # least and most
CAPACITY = (1, 1 << 30)  # so that there are less than 2^32 lines
ERROR = (1e-3, 0.5)

AHEAD = 8  # keys asked for before they are counted

# Places in the header.
_WINDOWS = 0
_LINES = 1
_CAPACITY = 2
_CURRENT = 3
_ADDED = 4
_HEADER = 8

_32 = np.uint64(32)
_5 = np.uint64(5)
_13 = np.uint64(13)
_18 = np.uint64(18)
_SHARE = np.uint64((1 << 13) - 1)  # 13 bits, of which multiplying and shifting makes a number below 31
_GRID = 64  # loads are multiples of 1/64, so that no last bit of exp() decides the shape


@jit
def _scramble(mix: np.uint64) -> np.uint64:
    """Return bits for line and counters that neither the choice of the block nor the index has used."""
    return mix64(mix + GOLDEN)


@jit
def sketch_line(base: Int, windows: int, lines: int, mix: np.uint64) -> Int:
    """Return the address of a key's line in window 0; window w's is 64 * w bytes further."""
    line = ((_scramble(mix) >> _32) * np.uint64(lines)) >> _32
    return base + np.int64(line) * (windows * LINE)


@jit
def _counters(mix: np.uint64) -> tuple[Int, Int, Int]:
    """Return the numbers of a key's three counters, all different."""
    bits = _scramble(mix)
    first = np.int64(bits & np.uint64(31))
    # how far the others are from the first: one of 31 places, and one of the 30 that are left
    second = 1 + np.int64((((bits >> _5) & _SHARE) * np.uint64(31)) >> _13)
    third = 1 + np.int64((((bits >> _18) & _SHARE) * np.uint64(30)) >> _13)
    if third >= second:
        third += 1
    return first, (first + second) & 31, (first + third) & 31


@jit
def _least(line: Int, first: Int, second: Int, third: Int) -> Int:
    """Return the count of three counters of one window's line."""
    least: Int = min(np.int64(load_u16(line, first)), np.int64(load_u16(line, second)))
    return min(least, np.int64(load_u16(line, third)))


@jit
def sketch_estimate(base: Int, windows: int, lines: int, mix: np.uint64) -> Int:
    """Return the estimate of a key's occurrences, 0 to 65535; ``base`` = address of line 0, after the header."""
    line = sketch_line(base, windows, lines, mix)
    first, second, third = _counters(mix)
    total: Int = 0
    for window in range(windows):
        total += _least(line + window * LINE, first, second, third)
    return min(total, MOST)


@jit
def sketch_add(base: Int, windows: int, lines: int, current: int, mix: np.uint64, amount: int) -> Int:
    """Add ``amount`` >= 0 occurrences of a key to window ``current`` and return the new estimate.

    Counters are only raised as far as the key's own new count needs it (conservative update).
    """
    line: Int = sketch_line(base, windows, lines, mix) + current * LINE
    first, second, third = _counters(mix)
    before: Int = _least(line, first, second, third)
    count = np.int64(min(before + min(amount, MOST), MOST))
    for counter in (first, second, third):
        if np.int64(load_u16(line, counter)) < count:
            store_u16(line, counter, np.uint16(count))
    return sketch_estimate(base, windows, lines, mix)


@jit
def rotate(address: Int) -> None:
    """Clear the oldest window of the sketch at ``address`` and make it current.

    That writes lines * 64 bytes: 0.2 to 0.7 ns for each occurrence of the capacity, all at once.
    """
    windows = load_i64(address, _WINDOWS)
    current = (load_i64(address, _CURRENT) + 1) % windows
    for number in range(load_i64(address, _LINES)):
        line: Int = address + (1 + number * windows + current) * LINE
        for word in range(8):
            store_u64(line, word, np.uint64(0))
    store_i64(address, _CURRENT, current)
    store_i64(address, _ADDED, 0)


@jit
def count_key(address: Int, mix: np.uint64, amount: int) -> Int:
    """Add ``amount`` occurrences to the sketch at ``address`` (its header) and return the new estimate.

    Rotates first when the current window is full; an amount of 0 or less only reads.
    """
    windows = load_i64(address, _WINDOWS)
    lines = load_i64(address, _LINES)
    base: Int = address + LINE
    if amount <= 0:
        return sketch_estimate(base, windows, lines, mix)
    capacity = load_i64(address, _CAPACITY)
    if load_i64(address, _ADDED) >= capacity:
        rotate(address)
    added = load_i64(address, _ADDED)
    store_i64(address, _ADDED, added + min(np.int64(amount), capacity - added))
    return sketch_add(base, windows, lines, load_i64(address, _CURRENT), mix, amount)


@jit
def prefetch_key(address: Int, mix: np.uint64) -> None:
    """Ask for the cache lines that count_key will read."""
    windows = load_i64(address, _WINDOWS)
    line: Int = sketch_line(address + LINE, windows, load_i64(address, _LINES), mix)
    for window in range(windows):
        prefetch(line + window * LINE)


@jit
def count_keys(address: Int, mixes: NDArray[np.uint64], amounts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """count_key for each of mixes: uint64[n] in order, estimates to out: int64[n]."""
    for i in range(mixes.shape[0]):
        if i + AHEAD < mixes.shape[0]:
            prefetch_key(address, mixes[i + AHEAD])
        out[i] = count_key(address, mixes[i], amounts[i])


def too_high(load: float) -> float:
    """Return the chance that a new key finds all its three counters touched, at ``load`` keys per line on average.

    Keys per line are Poisson; a key leaves k given counters of 32 alone with chance C(29, k) / C(32, k).
    """
    untouched = [math.exp(-load * (1 - math.comb(29, k) / math.comb(32, k))) for k in range(4)]
    return untouched[0] - 3 * untouched[1] + 3 * untouched[2] - untouched[3]


@cache
def sketch_lines(capacity: int, error: float) -> int:
    """Return the number of lines of one window."""
    grid = 1
    while too_high((grid + 1) / _GRID) <= error:
        grid += 1
    return -(-capacity * _GRID // grid)


def sketch_bytes(capacity: int, windows: int = 4, error: float = 0.05) -> int:
    """Return how much memory a sketch takes, and how long its exported state is."""
    for name, value, (least, most) in (("capacity", capacity, CAPACITY), ("windows", windows, WINDOWS)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidArgument(f"a sketch's {name} = {value!r}: give an integer from {least} to {most}")
    if isinstance(error, bool) or not isinstance(error, int | float) or not ERROR[0] <= error <= ERROR[1]:
        raise InvalidArgument(f"a sketch's error = {error!r}: give a number from {ERROR[0]} to {ERROR[1]}")
    return LINE * (1 + windows * sketch_lines(capacity, error))


class Sketch:
    """The memory of one block's sketch. ``address`` is what kernels take; the object keeps it alive."""

    def __init__(self, capacity: int, windows: int = 4, error: float = 0.05) -> None:
        words = sketch_bytes(capacity, windows, error) // 8
        whole = np.zeros(words + LINE // 8, np.int64)  # memory of zeros is taken up when it is first used
        begin = -address_of(whole) % LINE // 8
        self._memory: NDArray[np.int64] = whole[begin : begin + words]
        self._memory[:3] = windows, sketch_lines(capacity, error), capacity
        self.address = address_of(self._memory)

    @property
    def windows(self) -> int:
        return int(self._memory[_WINDOWS])

    @property
    def lines(self) -> int:
        return int(self._memory[_LINES])

    @property
    def current(self) -> int:
        return int(self._memory[_CURRENT])

    @property
    def added(self) -> int:
        """Occurrences in the current window."""
        return int(self._memory[_ADDED])

    @property
    def nbytes(self) -> int:
        return int(self._memory.nbytes)

    def add(self, mixes: NDArray[np.uint64], amounts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add amounts: int64[n] of mixes: uint64[n] in order; return the estimate after each."""
        mixes = kernel_array("mixes", mixes, np.uint64)
        amounts = kernel_array("amounts", amounts, np.int64)
        if len(mixes) != len(amounts):
            raise Malformed(f"{len(mixes)} mixes and {len(amounts)} amounts: give one for each")
        out = np.empty(len(mixes), np.int64)
        count_keys(self.address, mixes, amounts, out)
        return out

    def estimate(self, mixes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the estimates of mixes: uint64[n]."""
        return self.add(mixes, np.zeros(len(mixes), np.int64))

    def rotate(self) -> None:
        """Forget the oldest window now."""
        rotate(self.address)

    def export(self) -> bytes:
        """Return the whole state, for a sketch of the same capacity, windows and error to load."""
        return self._memory.tobytes()

    def load(self, state: bytes) -> None:
        """Replace the whole state. Malformed, and nothing changes, when it is not one of a sketch of this shape."""
        if len(state) != self.nbytes:
            raise Malformed(f"a sketch's state of {len(state)} bytes where {self.nbytes} were expected")
        given = np.frombuffer(state, np.int64)
        header = given[:_HEADER].tolist()
        if header[:_CURRENT] != self._memory[:_CURRENT].tolist() or any(header[_ADDED + 1 :]):
            raise Malformed(
                f"a sketch's state begins with {header}: expected (windows, lines, capacity) = "
                f"{tuple(self._memory[:_CURRENT].tolist())}, current, added, and zeros"
            )
        if not (0 <= header[_CURRENT] < header[_WINDOWS] and 0 <= header[_ADDED] <= header[_CAPACITY]):
            raise Malformed(
                f"a sketch's state says window {header[_CURRENT]} with {header[_ADDED]} added, of {header[:3]}"
            )
        self._memory[:] = given
