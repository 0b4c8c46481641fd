# SPDX-License-Identifier: Apache-2.0
"""Promotion: blocks whose owner is dead, or has no copy, and the members that are asked who has most of them.

    asked      every recorded member that is alive, again and again until it answers
    chosen     the one with the highest sequence becomes owner alone, once all have answered; or those that have, after a while
    lost       no recorded member is alive and has a copy

Invariant: only a recorded member is chosen, and every recorded member has every acknowledged operation: whom an answer is
still awaited from decides how much is kept that nobody was told of, no more. Until a choice is recorded it is taken anew from all
answers there are. Pure: time comes in as ``now``. The coordinator's lock covers it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from oarlock.cluster.record import Records

# So long a member that is alive is waited for, if another one has answered.
WAIT_SECONDS = 1.0
REPEAT_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Chosen:
    """What is to be recorded: block ``block`` belongs to ``owner`` alone. -1: it is lost."""

    block: int
    owner: int


class Promotion:
    """``blocks``: those that wait for an owner, with the time since when."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.blocks: dict[int, float] = {}
        # By block, of each member that answered the operations of its copy; -1: it has none.
        self._held: dict[int, dict[int, int]] = {}
        # By block, owners and members that said that they have no copy.
        self._lacking: dict[int, set[int]] = {}
        self._asked: dict[int, float] = {}

    def begin(self, blocks: Iterable[int], now: float) -> None:
        """Blocks have lost their owner."""
        for block in blocks:
            self.blocks.setdefault(block, now)
        self._asked.clear()

    def lacking(self, block: int, shard: int) -> None:
        """A recorded member has no copy."""
        self._lacking.setdefault(block, set()).add(shard)

    def may_own(self, block: int) -> list[int]:
        """Return the recorded members that are alive and did not say that they lack the block."""
        lacking = self._lacking.get(block, ())
        return [m for m in self._records.living(block) if m not in lacking]

    def recorded(self, blocks: Iterable[int]) -> None:
        """Records changed; a block that has an owner again is not asked about any more."""
        for block in blocks:
            lacking = self._lacking.get(block, set()) & set(self._records.members[block].tolist())
            owner = int(self._records.owners[block])
            if owner in self._records.shards and owner not in lacking:
                self.blocks.pop(block, None)
            self._held.pop(block, None)
            self._lacking.pop(block, None)
            if lacking:
                self._lacking[block] = lacking

    def ask(self, now: float) -> dict[int, list[int]]:
        """Return by shard the blocks that it is to be asked about now."""
        found: dict[int, list[int]] = {}
        for block in self.blocks:
            for member in self.may_own(block):
                if member not in self._held.get(block, ()):
                    found.setdefault(member, []).append(block)
        due = {shard: blocks for shard, blocks in found.items() if self._asked.get(shard, now) <= now}
        self._asked.update(dict.fromkeys(due, now + REPEAT_SECONDS))
        return due

    def answered(self, shard: int, blocks: list[int], generations: list[int], sequences: list[int]) -> None:
        """A member told what it has."""
        for block, generation, sequence in zip(blocks, generations, sequences, strict=True):
            if block in self.blocks and shard in self._records.members[block]:
                self._held.setdefault(block, {})[shard] = sequence if generation else -1

    def failed(self, shard: int, now: float) -> None:
        """A member did not answer."""
        self._asked[shard] = now + FIRST_PAUSE_SECONDS

    def step(self, now: float) -> list[Chosen]:
        """Return the choices that can be recorded now."""
        chosen = []
        for block, since in self.blocks.items():
            members = self.may_own(block)
            told = self._held.get(block, {})
            held = {m: told[m] for m in members if m in told}
            having = {m: sequence for m, sequence in held.items() if sequence >= 0}
            if len(held) == len(members):
                chosen.append(Chosen(block, max(having, key=lambda m: (having[m], -m), default=-1)))
            elif having and now - since >= WAIT_SECONDS:
                chosen.append(Chosen(block, max(having, key=lambda m: (having[m], -m))))
        return chosen
