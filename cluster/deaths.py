# SPDX-License-Identifier: Apache-2.0
"""Deaths: what becomes of records when shards die.

    a member is dead     it leaves the sets that it was in; blocks that it owned are promoted, or are lost
    a block is lost      ``on_loss`` says what follows: the whole job goes back, or the block is made anew

Invariant: what is to follow from a death is found on disk by a coordinator that is started again, and done once; what a copy was
on its way to is a new generation afterwards, so its owner waits for nobody. The coordinator's lock covers it.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from oarlock.client.job import ROLLBACK
from oarlock.cluster.holders import complete
from oarlock.cluster.losses import Loss
from oarlock.cluster.moving import Change
from oarlock.cluster.recoveries import PROMOTION, RELOAD, REPLICATION

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator
    from oarlock.cluster.copies import Copies
    from oarlock.cluster.members import Member

logger = logging.getLogger(__name__)


class Deaths:
    """Of shards of ``copies``. ``uncertain``: an earlier life may have begun copies of which nothing is recorded."""

    def __init__(self, coordinator: "Coordinator", copies: "Copies") -> None:
        self._c = coordinator
        self._copies = copies
        self._records = copies.records
        self.uncertain = False
        # By dead shard, blocks of which a copy may have been on its way there.
        self._required: dict[int, set[int]] = {}

    def shard_gone(self, member: "Member") -> None:
        """A shard that took part is dead."""
        self._records.shard_gone(member.id)
        self._copies.adoption.gone(member.id)
        self._required[member.id] = set(self._copies.moving.copies_to(member.id))
        self._copies.moving.gone(member.id)
        c = self._c
        if c.spec.on_loss == ROLLBACK:
            # Whatever stands in the way of other changes: nothing is recorded for it.
            owned = np.flatnonzero(self._records.owners == member.id)
            alive = np.isin(self._records.members[owned], list(self._records.shards)).any(axis=1)
            if not alive.all():
                c.lost(member, int((~alive).sum()))
                return
        if not self._copies.frozen:
            self.strike()
        c.wake()

    def strike(self) -> None:
        """Take dead shards out of the sets that they are members of, and look for new owners of what they owned."""
        for shard in list(self._records.gone):
            self._end_required(shard)
            blocks = self._records.named(shard)
            if not len(blocks):
                with self._c.store as store:
                    self._records.forget(store, shard)
                continue
            owns = self._records.owners[blocks] == shard
            changes = []
            for block in blocks[~owns].tolist():
                owner, members, _ = self._records.of(block)
                changes.append(Change(block, owner, tuple(m for m in members if m != shard)))
            if changes:
                with self._c.store as store:
                    self._copies.record(store, changes)
                    self._copies.look(store)
                logger.info("event=copies_lost shard=%d blocks=%d", shard, len(changes))
                self._begin_replication(shard, len(changes))
            orphans = [b for b in blocks[owns].tolist() if b not in self._copies.promotion.blocks]
            if orphans:
                # Who came while the dead one still counted is needed now.
                with self._c.store as store:
                    self._copies.look(store)
                self.lost_owner(shard, orphans)

    def _end_required(self, shard: int) -> None:
        """Make new generations of blocks whose owners may wait for a copy on a dead shard, though no record names it."""
        blocks = self._required.pop(shard, set())
        if self.uncertain:
            # What was begun before the last record of an earlier life is not known.
            owned = np.isin(self._records.owners, list(self._records.shards))
            blocks |= set(np.flatnonzero(owned & (self._records.generations <= self._copies.moving.opened)).tolist())
        told = ((block, *self._records.of(block)) for block in sorted(blocks))
        changes = [Change(block, owner, tuple(members)) for block, owner, members, _ in told]
        with self._c.store as store:
            self._copies.record(store, changes)

    def lost_owner(self, shard: int, blocks: list[int]) -> None:
        """Blocks have no owner any more: promote members where there are any. ``shard``: the last one, -1: not known."""
        if not blocks:
            return
        c, now = self._c, self._c.clock()
        self._copies.promotion.begin(blocks, now)
        kept = sum(bool(self._records.living(b)) for b in blocks)
        if kept:
            logger.info("event=owner_lost shard=%d blocks=%d", shard, kept)
            c.recoveries.begin(PROMOTION, shard, kept, now)
            self._begin_replication(shard, kept)
        c.wake()

    def _begin_replication(self, shard: int, blocks: int) -> None:
        if self._c.spec.replicas:
            self._c.recoveries.begin(REPLICATION, shard, blocks, self._c.clock())

    @property
    def recovered(self) -> dict[str, Callable[[], bool]]:
        """By kind of recovery, what says that it is over."""
        return {PROMOTION: self._all_told, RELOAD: self._all_told, REPLICATION: self._all_complete}

    def _all_told(self) -> bool:
        return not self._copies.promotion.blocks and not any(map(self._copies.adoption.owed, self._records.shards))

    def _all_complete(self) -> bool:
        if self._copies.promotion.blocks or not self._copies.moving.idle or self._copies.looks:
            return False
        return bool(complete(self._records, self._records.replicas).all())

    def promote(self) -> None:
        """Record new owners of blocks whose owner died, once it is known who has most; deal with those that nobody has."""
        if not self._copies.promotion.blocks:
            return
        chosen = self._copies.promotion.step(self._c.clock())
        made = [Change(each.block, each.owner, (each.owner,)) for each in chosen if each.owner >= 0]
        if made:
            with self._c.store as store:
                self._copies.record(store, made)
                self._copies.look(store)
            logger.info("event=promoted blocks=%d generation=%d", len(made), self._records.generation)
        lost = [each.block for each in chosen if each.owner < 0]
        for shard in sorted({int(self._records.owners[b]) for b in lost}):
            self._lose(shard, [b for b in lost if self._records.owners[b] == shard])

    def _lose(self, shard: int, blocks: list[int]) -> None:
        """No recorded member has these blocks."""
        c = self._c
        usable = [m.id for m in c.scaling.usable() if m.id in self._records.shards]
        if c.spec.on_loss == ROLLBACK:
            gone = self._records.gone.get(shard)
            c.lost(None if gone is None else c.members.all.get(gone.incarnation), len(blocks))
            return
        if not usable:
            # They wait for a shard that comes.
            return
        path = c.cuts.newest_path()
        held = {s: int((self._records.owners == s).sum()) for s in usable}
        changes = []
        for block in blocks:
            to = min(usable, key=lambda s: (held[s], s))
            held[to] += 1
            # Alone: what another one has of an earlier time may differ from what is loaded.
            changes.append(Change(block, to, (to,)))
        cut = f"cut {c.cuts.committed}" if c.cuts.committed else path or "the beginning"
        lost = f"pushes to {len(blocks)} blocks since {cut}"
        with c.store as store:
            self._copies.create(store, blocks, path)
            self._copies.record(store, changes)
            for block in blocks:
                self._copies.promotion.blocks.pop(block, None)
            self._copies.look(store)
        c.warn(f"shard {shard} is gone, and no copy of {len(blocks)} blocks is left: they go back; lost: {lost}")
        c.recoveries.begin(RELOAD, shard, len(blocks), c.clock(), lost=lost)
        self._begin_replication(shard, len(blocks))
        workers = [member.incarnation for member in c.members.alive("worker")]
        c.losses.begin(shard, self._records.generation, c.cuts.committed, np.array(blocks, np.int32), workers)

    def counted(self, loss: Loss) -> None:
        """The workers said how many pushes a shard took along."""
        self._c.recoveries.count(RELOAD, loss.shard, loss.pushes, loss.more)
        self._c.warn(f"shard {loss.shard} took {loss.words} pushes to {len(loss.blocks)} blocks along")
