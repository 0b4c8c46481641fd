# SPDX-License-Identifier: Apache-2.0
"""Copies: what becomes of records when shards come and leave; all that changes a record goes through here.

    a member is dead     cluster/deaths.py
    a set is short       moves add members, as long as there are shards; and so they drain, and balance

Invariant: a record is on disk before anybody is told. While a gate stands, or a table goes back, no record changes: what is to
follow from a death waits. What is still to do follows from what is on disk, so a coordinator that is started again does it. The
coordinator's lock covers it.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from oarlock.client.job import GATHERING, OVER, TRAINING, WRITING
from oarlock.client.router import ShardAddress
from oarlock.cluster.adoption import Adoption
from oarlock.cluster.burdens import Burdens
from oarlock.cluster.deaths import Deaths
from oarlock.cluster.holders import complete, wanted
from oarlock.cluster.moving import Change, Moving, Order
from oarlock.cluster.placement import balanced
from oarlock.cluster.planning import place
from oarlock.cluster.promotion import Promotion
from oarlock.cluster.record import Records
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
        self.deaths = Deaths(coordinator, self)
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
        self.deaths.uncertain = store.fact(BALANCING, False)
        if self.deaths.uncertain:
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
        self.deaths.lost_owner(shard, [change.block for change in changes if change.owner < 0])

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

    def create(self, store: Store, blocks: Iterable[int], path: str) -> None:
        """Have blocks that no shard has made anew, from the checkpoint at ``path`` (empty: of first values)."""
        self.creating |= set(blocks)
        self.created_from = path
        store.set_fact(CREATING, {"path": path, "blocks": sorted(self.creating)})

    # What follows of it

    def step(self) -> list[Order]:
        """Record what is to be recorded now; return the orders about moves that are to be given."""
        c, now = self._c, self._c.clock()
        if c.phase in (GATHERING, *OVER):
            return []
        self.moving.hold(self.held or self.frozen or not c.placed)
        if not self.frozen:
            self._enlist()
            self.deaths.strike()
            self.deaths.promote()
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
