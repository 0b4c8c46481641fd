# SPDX-License-Identifier: Apache-2.0
"""Adoption: up to which generation each shard has been told the records, and who is told next.

    owed       a record that names the shard, or did, changed: it is told at once, and again until it answers
    behind     other records changed, or other shards came: it is told when there is time, some shards at once

Invariant: what a shard is told begins where it was last known to be (or is all), so that it knows all records of the generation
that it answered. What an earlier life of the coordinator told nobody knows: all is told again. Pure; the coordinator's lock
covers it.
"""

from oarlock.cluster.record import Records

# Shards that are only behind are told so many at once: what is urgent does not wait for them.
LAZY = 64
# What is not urgent is told to a shard so often at most: records that are made one by one travel together.
LAZY_SECONDS = 0.1
# An order that came to nothing is given again after these pauses.
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.05, 1.0


class Adoption:
    """``told``: by shard, the generation it has adopted."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.told: dict[int, int] = {}
        # Which list of shards each has.
        self._lists: dict[int, int] = {}
        self._again: dict[int, tuple[float, float]] = {}
        # When each was told something last.
        self._told_at: dict[int, float] = {}
        self.under_way: set[int] = set()

    def begin_anew(self) -> None:
        """Nobody has adopted anything."""
        self.told.clear()
        self._lists.clear()
        self._again.clear()

    def gone(self, shard: int) -> None:
        for known in (self.told, self._lists, self._again, self._told_at):
            known.pop(shard, None)

    def owed(self, shard: int) -> bool:
        """Whether a shard has to hear of a record that concerns it."""
        return shard not in self.told or self.told[shard] < self._records.concerned.get(shard, 0)

    def behind(self, shard: int) -> bool:
        """Whether a shard has not heard of all records, and all shards."""
        told = self.told.get(shard, -1)
        return told < self._records.generation or self._lists.get(shard, 0) < self._records.listed

    def knows(self, shard: int, other: int) -> bool:
        """Whether a shard has been told where ``other`` listens; of a list that is not the newest nothing is known."""
        return shard == other or self._lists.get(shard, 0) >= self._records.listed

    @property
    def settled(self) -> bool:
        """Whether every shard has been told all."""
        return not any(map(self.behind, self._records.shards))

    def due(self, now: float) -> list[int]:
        """Return the shards to tell now; they count as under way until ``adopted`` or ``failed``."""
        waits = {s for s, (again, _) in self._again.items() if again > now} | self.under_way
        behind = [s for s in self._records.shards if s not in waits and self.behind(s)]
        found = [s for s in behind if self.owed(s)]
        lazy = [s for s in behind if not self.owed(s) and now - self._told_at.get(s, -LAZY_SECONDS) >= LAZY_SECONDS]
        found += lazy[: max(0, LAZY - len(self.under_way))]
        self.under_way.update(found)
        self._told_at.update(dict.fromkeys(found, now))
        return found

    def since(self, shard: int) -> int:
        """Return the generation after which records are to be told; 0: all."""
        return self.told.get(shard, 0)

    @property
    def listed(self) -> int:
        return self._records.listed

    def adopted(self, shard: int, generation: int, listed: int) -> None:
        """A shard has adopted all records up to ``generation``."""
        if shard in self._records.shards:
            self.told[shard] = max(self.told.get(shard, 0), generation)
            self._lists[shard] = max(self._lists.get(shard, 0), listed)
            self._again.pop(shard, None)

    def failed(self, shard: int, now: float) -> None:
        """An Adopt came to nothing: it is told again after a pause."""
        _, pause = self._again.get(shard, (0.0, FIRST_PAUSE_SECONDS))
        self._again[shard] = (now + pause, min(2 * pause, MOST_PAUSE_SECONDS))
