# SPDX-License-Identifier: Apache-2.0
"""Copies: what becomes of records when shards come, die and leave; all that changes a record goes through here.

    a member is dead     it leaves the sets that it was in; blocks that it owned are promoted, or are lost
    a block is lost      ``on_loss`` says what follows
    a set is short       moves add members, as long as there are shards; and so they drain, and balance

Invariant: a record is on disk before anybody is told. While a gate stands, or a table goes back, no record changes: what is to
follow from a death waits. What is still to do follows from what is on disk, so a coordinator that is started again does it. The
coordinator's lock covers it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from oarlock.client.job import GATHERING, OVER, ROLLBACK, TRAINING, WRITING
from oarlock.client.router import ShardAddress
from oarlock.cluster.adoption import Adoption
from oarlock.cluster.burdens import Burdens
from oarlock.cluster.holders import complete, wanted
from oarlock.cluster.moving import Change, Moving, Order
from oarlock.cluster.placement import balanced
from oarlock.cluster.planning import place
from oarlock.cluster.promotion import Promotion
from oarlock.cluster.record import Records
from oarlock.cluster.recoveries import PROMOTION, RELOAD, REPLICATION
from oarlock.cluster.store import Store

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator
    from oarlock.cluster.members import Member

logger = logging.getLogger(__name__)

CREATING, BALANCING = "creating", "balancing"
# Between two looks at what is wanted, where moves came to nothing.
LOOK_SECONDS = 1.0


class Copies:
    """``creating``: blocks that no shard has and that are made anew, from the checkpoint ``created_from``."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._c = coordinator
        self.records = Records(coordinator.layout.blocks, coordinator.spec.replicas)
        self.adoption = Adoption(self.records)
        self.promotion = Promotion(self.records)
        self.moving = Moving(self.records, coordinator.spec.moves_in_flight, 0)
        self.burdens = Burdens(coordinator.layout, coordinator.spec.rebalance_seconds)
        self.creating: set[int] = set()
        self.created_from = ""
        # By dead shard, blocks of which a copy may have been on its way there; and whether an earlier life may have begun more.
        self._required: dict[int, set[int]] = {}
        self._uncertain = False
        # When moves that are wanted are looked for; None: when somebody comes or goes.
        self._look_at: float | None = None
        # Whether they are looked for though others are under way: what was wanted may be no more.
        self._anew = False
        # Whether something is about to begin that moves have to wait for.
        self.held = False

    # Lives

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.records.take_up(store)
        self._begin_anew()
        found = store.fact(CREATING) or {"path": "", "blocks": []}
        self.creating, self.created_from = set(found["blocks"]), found["path"]
        self._uncertain = store.fact(BALANCING, False)
        if self._uncertain:
            self._look_at = self._c.clock()
        if self.records.shards:
            self.promotion.begin(np.flatnonzero(self.records.owners < 0).tolist(), self._c.clock())

    def _begin_anew(self) -> None:
        self.adoption.begin_anew()
        self.promotion = Promotion(self.records)
        self.moving = Moving(self.records, self._c.spec.moves_in_flight, self._c.term)

    def go_back(self, store: Store) -> None:
        """A new run begins: nobody has any block."""
        self.records.clear(store)
        self._begin_anew()
        self.creating, self.created_from, self._look_at = set(), "", None
        store.set_fact(CREATING, None)
        store.set_fact(BALANCING, False)

    def place(self, shards: Sequence["Member"]) -> None:
        """Give all blocks to shards that have none."""
        c = self._c
        addresses = [ShardAddress(m.id, m.address, m.incarnation) for m in shards]
        ids = [s.id for s in addresses]
        if c.spec.replicas:
            hosts = {m.id: m.host for m in shards}
            members = place(self.burdens.blocks(), ids, replicas=c.spec.replicas, hosts=hosts)
        else:
            members = balanced(c.layout, ids)[:, None]
        with c.store as store:
            self.records.place(store, members[:, 0], members, addresses)
        self.adoption.begin_anew()
        logger.info("event=placed generation=%d shards=%d blocks=%d", self.records.generation, len(ids), len(members))

    # What happens

    def shard_came(self) -> None:
        """A shard joined a job that trains: moves may be possible that were not."""
        whole = complete(self.records, self.records.replicas).all()
        with self._c.store as store:
            self.look(store, self._c.scaling.patience if whole else 0.0)

    def look(self, store: Store, wait: float = 0.0) -> None:
        """Have moves looked for that are wanted; those that have not begun are looked for anew with the others."""
        self._look_at, self._anew = self._c.clock() + wait, True
        self.moving.want(())
        store.set_fact(BALANCING, True)

    def shard_gone(self, member: "Member") -> None:
        """A shard that took part is dead."""
        self.records.shard_gone(member.id)
        self.adoption.gone(member.id)
        self._required[member.id] = set(self.moving.copies_to(member.id))
        self.moving.gone(member.id)
        c = self._c
        if c.spec.on_loss == ROLLBACK:
            # Whatever stands in the way of other changes: nothing is recorded for it.
            owned = np.flatnonzero(self.records.owners == member.id)
            alive = np.isin(self.records.members[owned], list(self.records.shards)).any(axis=1)
            if not alive.all():
                c.lost(member, int((~alive).sum()))
                return
        if not self.frozen:
            self._strike_dead()
        c.wake()

    def lacking(self, shard: int, blocks: Iterable[int]) -> None:
        """A recorded member has no copies of blocks: it leaves their sets, or another one owns them."""
        changes = []
        for block in blocks:
            owner, members, _ = self.records.of(block)
            # Of what is being made it heard in another way than by the order to make it.
            if shard in members and block not in self.creating:
                rest = tuple(m for m in members if m != shard)
                changes.append(Change(block, -1 if owner == shard else owner, rest))
        if not changes:
            return
        with self._c.store as store:
            self.record(store, changes)
            self.look(store)
        self._c.warn(f"shard {shard} has no copy of {len(changes)} blocks that it is recorded to have")
        self._lost_owner(shard, [change.block for change in changes if change.owner < 0])

    @property
    def frozen(self) -> bool:
        """Whether no record may change now."""
        return self._c.cuts.gate is not None

    def record(self, store: Store, changes: Iterable[Change]) -> None:
        """Make records, in one generation."""
        if not (made := list(changes)):
            return
        blocks = np.array([change.block for change in made], np.int32)
        owners = np.array([change.owner for change in made], np.int32)
        members = np.full((len(made), self.records.width), -1, np.int32)
        for row, change in zip(members, made, strict=True):
            row[: len(change.members)] = change.members
        self.records.change(store, blocks, owners, members)
        self.moving.recorded(blocks.tolist())
        self.promotion.recorded(blocks.tolist())
        self._c.wake()

    # What follows of it

    def step(self) -> list[Order]:
        """Record what is to be recorded now; return the orders about moves that are to be given."""
        c, now = self._c, self._c.clock()
        if c.phase in (GATHERING, *OVER):
            return []
        self.moving.hold(self.held or self.frozen or not c.placed)
        if not self.frozen:
            self._enlist()
            self._strike_dead()
            self._promote()
            self._balance(now)
            self._want(now)
        orders, changes = self.moving.step(now)
        if changes:
            with c.store as store:
                self.record(store, changes)
            more, _ = self.moving.step(now)
            orders += more
        if not self.frozen:
            self._let_go()
            c.recoveries.look(c.store, c.run, now)
        return orders

    def _strike_dead(self) -> None:
        """Take dead shards out of the sets that they are members of, and look for new owners of what they owned."""
        for shard in list(self.records.gone):
            self._end_required(shard)
            blocks = self.records.named(shard)
            if not len(blocks):
                with self._c.store as store:
                    self.records.forget(store, shard)
                continue
            owns = self.records.owners[blocks] == shard
            changes = []
            for block in blocks[~owns].tolist():
                owner, members, _ = self.records.of(block)
                changes.append(Change(block, owner, tuple(m for m in members if m != shard)))
            if changes:
                with self._c.store as store:
                    self.record(store, changes)
                    self.look(store)
                logger.info("event=copies_lost shard=%d blocks=%d", shard, len(changes))
                self._begin_replication(shard, len(changes))
            orphans = [b for b in blocks[owns].tolist() if b not in self.promotion.blocks]
            if orphans:
                self._lost_owner(shard, orphans)

    def _end_required(self, shard: int) -> None:
        """Make new generations of blocks whose owners may wait for a copy on a dead shard, though no record names it."""
        blocks = self._required.pop(shard, set())
        if self._uncertain:
            # What was begun before the last record of an earlier life is not known.
            owned = np.isin(self.records.owners, list(self.records.shards))
            blocks |= set(np.flatnonzero(owned & (self.records.generations <= self.moving.opened)).tolist())
        told = ((block, *self.records.of(block)) for block in sorted(blocks))
        changes = [Change(block, owner, tuple(members)) for block, owner, members, _ in told]
        with self._c.store as store:
            self.record(store, changes)

    def _lost_owner(self, shard: int, blocks: list[int]) -> None:
        """Blocks have no owner any more: promote members where there are any. ``shard``: the last one, -1: not known."""
        if not blocks:
            return
        c, now = self._c, self._c.clock()
        self.promotion.begin(blocks, now)
        kept = sum(bool(self.records.living(b)) for b in blocks)
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
        return not self.promotion.blocks and not any(map(self.adoption.owed, self.records.shards))

    def _all_complete(self) -> bool:
        if self.promotion.blocks or not self.moving.idle or self._look_at is not None:
            return False
        return bool(complete(self.records, self.records.replicas).all())

    def _promote(self) -> None:
        if not self.promotion.blocks:
            return
        chosen = self.promotion.step(self._c.clock())
        made = [Change(each.block, each.owner, (each.owner,)) for each in chosen if each.owner >= 0]
        if made:
            with self._c.store as store:
                self.record(store, made)
                self.look(store)
            logger.info("event=promoted blocks=%d generation=%d", len(made), self.records.generation)
        lost = [each.block for each in chosen if each.owner < 0]
        for shard in sorted({int(self.records.owners[b]) for b in lost}):
            self._lose(shard, [b for b in lost if self.records.owners[b] == shard])

    def _lose(self, shard: int, blocks: list[int]) -> None:
        """No recorded member has these blocks."""
        c = self._c
        usable = [m.id for m in c.scaling.usable() if m.id in self.records.shards]
        if c.spec.on_loss == ROLLBACK:
            gone = self.records.gone.get(shard)
            c.lost(None if gone is None else c.members.all[gone.incarnation], len(blocks))
            return
        if not usable:
            # They wait for a shard that comes.
            return
        path = c.cuts.newest_path()
        held = {s: int((self.records.owners == s).sum()) for s in usable}
        changes = []
        for block in blocks:
            to = min(usable, key=lambda s: (held[s], s))
            held[to] += 1
            # Alone: what another one has of an earlier time may differ from what is loaded.
            changes.append(Change(block, to, (to,)))
        cut = f"cut {c.cuts.committed}" if c.cuts.committed else path or "the beginning"
        lost = f"pushes to {len(blocks)} blocks since {cut}"
        with c.store as store:
            self.creating |= set(blocks)
            self.created_from = path
            store.set_fact(CREATING, {"path": path, "blocks": sorted(self.creating)})
            self.record(store, changes)
            for block in blocks:
                self.promotion.blocks.pop(block, None)
            self.look(store)
        c.warn(f"shard {shard} is gone, and no copy of {len(blocks)} blocks is left: they go back; lost: {lost}")
        c.recoveries.begin(RELOAD, shard, len(blocks), c.clock(), lost=lost)
        self._begin_replication(shard, len(blocks))

    def _enlist(self) -> None:
        """Let shards take part that may have blocks and do not yet: all are told where they listen."""
        c = self._c
        if self._look_at is None or self.held:
            return
        for member in c.scaling.usable():
            if not c.scaling.takes_part(member):
                with c.store as store:
                    self.records.list_shard(store, ShardAddress(member.id, member.address, member.incarnation))
                logger.info("event=takes_part shard=%d", member.id)

    def _balance(self, now: float) -> None:
        """Look once in a while whether a shard has much more than others; while anything is under way it is only measured."""
        c = self._c
        if not self.burdens.due(now):
            return
        told = self.burdens.look(self.records, {m.id: m for m in c.members.alive("shard")}, now)
        if told and c.phase == TRAINING and not self.held and self.at_rest and self.burdens.uneven(self.records):
            with c.store as store:
                self.look(store)

    def _want(self, now: float) -> None:
        """Begin the moves that are wanted, once those before have ended and all shards know each other."""
        c = self._c
        if self._look_at is None or not (self.moving.idle or self._anew):
            return
        if self.moving.dropped:
            # What came to nothing would do so again at once.
            self.moving.dropped, self._look_at = False, now + LOOK_SECONDS
        if now < self._look_at:
            return
        if self.held or not c.placed or c.phase not in (TRAINING, WRITING):
            return
        if not self.adoption.settled or self.promotion.blocks:
            return
        usable = c.scaling.usable()
        moves = wanted(
            self.records,
            self.burdens.blocks(),
            [m.id for m in usable],
            hosts={m.id: m.host for m in usable},
            under_way=[flight.move for flight in self.moving.flights.values()],
            waiting=self.promotion.blocks,
        )
        self._anew = False
        self.moving.want(moves)
        if moves:
            logger.info("event=moves_wanted moves=%d", len(moves))
        elif self.moving.idle:
            self._look_at = None
            with c.store as store:
                store.set_fact(BALANCING, False)

    def _let_go(self) -> None:
        """Let drained shards leave, and forget what has been created."""
        c = self._c
        if self.creating and all(not self.adoption.owed(s) for s in self.records.shards):
            owners = self.records.owners[sorted(self.creating)]
            if np.isin(owners, list(self.records.shards)).all():
                with c.store as store:
                    self.creating, self.created_from = set(), ""
                    store.set_fact(CREATING, None)
        # Views that are being written are those of the shards at the cut.
        if c.scaling.leaves and not c.cuts.begun and not self.held and self.adoption.settled:
            for shard in c.scaling.drained():
                with c.store as store:
                    self.records.dismiss(store, shard)
                self.adoption.gone(shard)
                logger.info("event=drained shard=%d", shard)

    # Asked

    @property
    def looks(self) -> bool:
        """Whether it will be looked for moves that are wanted."""
        return self._look_at is not None

    @property
    def calm(self) -> bool:
        """Whether all blocks have owners that know it, and none is closed: a cut may begin."""
        if self.moving.closed or self.promotion.blocks or self.records.gone or self.creating:
            return False
        return self.adoption.settled

    @property
    def at_rest(self) -> bool:
        """Whether nothing is under way, nor wanted."""
        return self.calm and self.moving.idle and self._look_at is None and not self._c.scaling.drained()
