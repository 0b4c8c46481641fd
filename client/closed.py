# SPDX-License-Identifier: Apache-2.0
"""The closed set: splits that are finished for good, as a floor and what is closed above it.

Invariant: a split once closed stays closed; the set only grows, except when a restore replaces it. Not thread-safe: the
owner's lock covers it.
"""

from collections.abc import Iterable, Iterator

from oarlock.proto.common_pb2 import ClosedSplits
from oarlock.proto.errors import Malformed

# Splits are leased at most this far above the floor (SEMANTICS section 2), so a longer bitmap is no closed set of ours; but for
# jobs with ranks, which are leased in place of splits (``JobSpec.closed_window``).
SPLIT_WINDOW = 1024
# Numbers of splits stay far below what files and messages can hold.
MAX_SPLIT = 1 << 62


class ClosedSet:
    """All splits below ``floor`` and those in ``above``."""

    def __init__(self, floor: int = 0, above: Iterable[int] = ()) -> None:
        self.floor = floor
        self.above = {s for s in above if s >= floor}
        self._settle()

    def __contains__(self, split: int) -> bool:
        return split < self.floor or split in self.above

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClosedSet) and (self.floor, self.above) == (other.floor, other.above)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        yield from sorted(self.above)

    def add(self, split: int) -> None:
        if split >= self.floor:
            self.above.add(split)
            self._settle()

    def merge(self, other: "ClosedSet") -> None:
        self.floor = max(self.floor, other.floor)
        self.above = {s for s in self.above | other.above if s >= self.floor}
        self._settle()

    def _settle(self) -> None:
        while self.floor in self.above:
            self.above.remove(self.floor)
            self.floor += 1

    def pack(self) -> ClosedSplits:
        bits = 0
        for split in self.above:
            bits |= 1 << (split - self.floor)
        return ClosedSplits(floor=self.floor, bitmap=bits.to_bytes((bits.bit_length() + 7) // 8, "little"))

    @staticmethod
    def unpack(message: ClosedSplits, window: int = SPLIT_WINDOW) -> "ClosedSet":
        if len(message.bitmap) > window // 8 + 1:
            raise Malformed(
                f"a closed set reaches {len(message.bitmap) * 8} splits above its floor, at most {window} can be"
            )
        if message.floor > MAX_SPLIT:
            raise Malformed(f"a closed set with the floor {message.floor}: no job has so many splits")
        bits = int.from_bytes(message.bitmap, "little")
        return ClosedSet(message.floor, (message.floor + i for i in range(bits.bit_length()) if bits >> i & 1))
