# SPDX-License-Identifier: Apache-2.0
"""Which records of a spill file are live, and where the next ones go: the decisions, without the file.

The file is a row of segments of equally many records. Records are written one after the other into the open segment; then
the lowest free segment is opened. A segment of which no record is live is free again, once nobody holds a pin that is as
old as its last record. A segment's life is the number of the opening that it is in, 0 = free.

Invariant: a record's place is not written again before its segment was free. One thread at a time: the file's lock.
"""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.jit import jit
from oarlock.proto.errors import InvalidArgument, OutOfMemory

Records = NDArray[np.int64]


class Piece(NamedTuple):
    """``length`` records from number ``first`` on, all in one segment in this life."""

    first: int
    length: int
    life: int


@jit
def mark_live(bits: NDArray[np.uint8], first: int, n: int) -> None:
    """Set bits first, first + 1, ... of bits."""
    for record in range(first, first + n):
        bits[record >> 3] |= np.uint8(1 << (record & 7))


@jit
def mark_dead(bits: NDArray[np.uint8], live: Records, segment: int, records: Records) -> int:
    """Clear the bits of records: int64[n] and count them off live: int64[segments].

    Return -1; or the index of the first that was not live, and nothing is changed.
    """
    bad = -1
    for i in range(records.shape[0]):
        record = records[i]
        mask = np.uint8(1 << (record & 7))
        if record < 0 or record >= 8 * bits.shape[0] or bits[record >> 3] & mask == 0:
            bad = i
            break
        bits[record >> 3] ^= mask
        live[record // segment] -= 1
    for i in range(bad):
        bits[records[i] >> 3] |= np.uint8(1 << (records[i] & 7))
        live[records[i] // segment] += 1
    return bad


class Space:
    """The segments of a file of at most ``segments`` segments of ``segment`` records."""

    def __init__(self, segments: int, segment: int, slack: int = 1) -> None:
        self.segment = segment
        self._slack = slack
        self.lives: Records = np.zeros(segments, np.int64)  # read by kernels, so it never moves
        self.live_records = 0
        self.written_records = 0  # of the segments that are not free
        self._live: Records = np.zeros(segments, np.int64)
        self._bits: NDArray[np.uint8] = np.zeros(512, np.uint8)
        self._openings = 0
        self._open = -1
        self._used = 0
        self._end = 0
        self._free: list[int] = []
        self._waiting: list[tuple[int, int]] = []  # (newest pin of that time, segment)
        self._pins: set[int] = set()
        self._newest_pin = 0

    def plan(self, n: int) -> list[Piece]:
        """Return where the next n records go; nothing is changed. OutOfMemory when the file is full."""
        pieces = []
        life = self._openings
        if self._open >= 0 and n:
            count = min(n, self.segment - self._used)
            pieces.append(Piece(self._open * self.segment + self._used, count, int(self.lives[self._open])))
            n -= count
        needed = -(-n // self.segment)
        fresh = heapq.nsmallest(needed, self._free)
        fresh += range(self._end, self._end + needed - len(fresh))
        if fresh and fresh[-1] >= len(self.lives):
            raise OutOfMemory(
                f"the spill file holds its limit of {len(self.lives) * self.segment} records: "
                "raise limit_bytes, or give the tables more memory"
            )
        for place in fresh:
            life += 1
            pieces.append(Piece(place * self.segment, min(n, self.segment), life))
            n -= self.segment
        return pieces

    def take(self, pieces: list[Piece]) -> None:
        """Record that the pieces of the plan just made are written and live."""
        for first, length, life in pieces:
            place, used = divmod(first, self.segment)
            if used == 0:
                if self._free and place == self._free[0]:
                    heapq.heappop(self._free)
                else:
                    self._end = place + 1
                self._openings = life
                self.lives[place] = life
            end = used + length
            self._open, self._used = (place, end) if end < self.segment else (-1, 0)
            if first + length > 8 * len(self._bits):
                more = max(len(self._bits), (first + length) // 8 + 1 - len(self._bits))
                self._bits = np.concatenate([self._bits, np.zeros(more, np.uint8)])
            mark_live(self._bits, first, length)
            self._live[place] += length
            self.live_records += length
            self.written_records += length

    def drop(self, records: Records) -> list[int]:
        """Mark records dead; return the segments to ``give_back``. InvalidArgument, and no change, if one is not live."""
        bad = int(mark_dead(self._bits, self._live, self.segment, records))
        if bad >= 0:
            raise InvalidArgument(f"spill record {records[bad]} is not live, or is named twice: nothing was freed")
        self.live_records -= len(records)
        touched = np.unique(records // self.segment)
        empty = [int(place) for place in touched[self._live[touched] == 0] if place != self._open]
        if not self._pins:
            return empty
        self._waiting += [(self._newest_pin, place) for place in empty]
        return []

    def pin(self) -> int:
        """Keep the content of all records of now until ``unpin``."""
        self._newest_pin += 1
        self._pins.add(self._newest_pin)
        return self._newest_pin

    def unpin(self, token: int) -> list[int]:
        """End a pin; return the segments to ``give_back``."""
        if token not in self._pins:
            raise InvalidArgument(f"spill pin {token} is not held")
        self._pins.remove(token)
        oldest = min(self._pins, default=self._newest_pin + 1)
        ready = [place for stamp, place in self._waiting if stamp < oldest]
        self._waiting = [entry for entry in self._waiting if entry[0] >= oldest]
        return ready

    def give_back(self, place: int) -> None:
        """Make a segment free that ``drop`` or ``unpin`` named."""
        self.lives[place] = 0
        self.written_records -= self.segment
        heapq.heappush(self._free, place)

    def sparse_segment(self) -> Records | None:
        """Return the live records of the emptiest segment if ``slack`` times as many are dead as live, else None.

        Segments that wait for a pin are left out: moving records does not make them free.
        """
        held = self.written_records - len(self._waiting) * self.segment
        if held <= (1 + self._slack) * self.live_records + self.segment:
            return None
        waiting = [place for _, place in self._waiting]
        counts = np.where(self.lives[: self._end] > 0, self._live[: self._end], self.segment + 1)
        counts[waiting] = self.segment + 1
        if self._open >= 0:
            counts[self._open] = self.segment + 1
        return self.live_of(int(np.argmin(counts)))

    def live_of(self, place: int) -> Records:
        """Return the live records of a segment, ascending."""
        first = place * self.segment
        start = first >> 3
        bits = np.unpackbits(self._bits[start : (first + self.segment + 7) >> 3], bitorder="little")
        return start * 8 + np.flatnonzero(bits[first & 7 :][: self.segment]) + (first & 7)
