# SPDX-License-Identifier: Apache-2.0
"""A model of a cluster with copies: the real coordinator, and shards that keep of each block what the protocol is about.

Invariant: time is its own, and every message may be lost, doubled, late, or answered though nobody hears the answer.
After every event the promises of SEMANTICS section 6 are looked at: R1 as what was acknowledged against what members have, R2,
and that one owner alone can acknowledge.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from copies_shard import CLOSED, COPY, OPEN, Shard

from oarlock.client.job import OVER, JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.moving import COPY as COPY_ORDER
from oarlock.cluster.moving import HAND, Order
from oarlock.cluster.reports import report
from oarlock.cluster.store import Store
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import Placement
from oarlock.proto.errors import PSError


class Died(Exception):
    """The coordinator's process was killed."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Tearing(Store):
    """A store whose process dies ``tear`` statements from now."""

    tear = -1

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self.tear == 0:
            raise Died
        self.tear -= 1
        return super()._execute(statement, values)


def spec_of(replicas: int, servers: int, on_loss: str) -> JobSpec:
    return JobSpec(
        job="0123456789abcdef" * 2,
        name="job",
        seed=3,
        recipe="nowhere:recipe",
        tables=(TableSpec("user", 4, blocks=4),),
        dense=(DenseSpec("w", (4,), slice=2),),
        files=(),
        evaluation_files=(),
        splits=3,
        evaluation_splits=0,
        rows_per_split=10,
        evaluation_rows_per_split=10,
        batch_rows=5,
        epochs=2,
        servers=servers,
        workers=1,
        metrics=(),
        replicas=replicas,
        on_loss=on_loss,
        lease_seconds=2.0,
        heartbeat_seconds=0.25,
        moves_in_flight=3,
    )


class Model:
    """One schedule. ``rng`` draws everything."""

    def __init__(self, seed: int, path: Path, *, replicas: int, servers: int, on_loss: str = "rollback") -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.path = path
        self.spec = spec_of(replicas, servers, on_loss)
        self.store: Tearing
        self.c: Coordinator
        self.shards: dict[int, Shard] = {}
        self.mail: list[tuple[float, int, Any]] = []
        self.sent = 0
        self.losing = 0.0
        self.acknowledged: dict[int, set[int]] = defaultdict(set)
        self.next_operation = 0
        self.port = 0
        self.restarts = 0
        self.start()
        for _ in range(servers):
            self.join()

    # The coordinator

    def start(self) -> None:
        self.store = Tearing(self.path)
        self.store.open()
        # The machine does not die with the process.
        self.store._execute("PRAGMA synchronous = OFF")
        self.c = Coordinator(self.store, self.spec, clock=self.clock, rng=self.rng)
        self.c.open()

    def restart(self) -> None:
        self.restarts += 1
        self.store.close()
        self.start()

    def doing(self, call: Any) -> None:
        """Do something as the coordinator, which may die of it."""
        try:
            call()
        except Died:
            self.restart()

    def join(self) -> "Shard":
        self.port += 1
        nonce = self.rng.getrandbits(60) | 1
        try:
            member = self.c.join("shard", f"s:{self.port}", nonce, 1, "h", "")
        except Died:
            self.restart()
            member = self.c.join("shard", f"s:{self.port}", nonce, 1, "h", "")
        shard = Shard(self, member.id, member.incarnation)
        self.shards[member.incarnation] = shard
        return shard

    # Messages

    def post(self, call: Any) -> None:
        """Deliver a call some time, perhaps twice, perhaps never."""
        for _ in range(1 + (self.rng.random() < self.losing / 2)):
            if self.rng.random() >= self.losing:
                self.sent += 1
                late = self.rng.random() * (0.5 if self.rng.random() < 0.2 else 0.02)
                self.mail.append((self.clock.now + late, self.sent, call))

    def deliver(self) -> None:
        """Deliver what is due, in any order."""
        due = [m for m in self.mail if m[0] <= self.clock.now]
        self.mail = [m for m in self.mail if m[0] > self.clock.now]
        self.rng.shuffle(due)
        for _, _, call in due:
            self.doing(call)
            self.check_block(self.rng.randrange(self.c.layout.blocks))

    def step(self) -> None:
        """Let a moment pass: the coordinator looks, shards do what they have to do, messages arrive."""
        self.clock.now += 0.05
        self.doing(self._look)
        for shard in [s for s in self.shards.values() if s.alive]:
            shard.act()
        for _ in range(3):
            self.push(self.rng.randrange(self.c.layout.blocks))
        self.deliver()
        self.check()

    def _look(self) -> None:
        c = self.c
        for shard in self.shards.values():
            member = c.members.all.get(shard.incarnation)
            if shard.alive and shard.heard and member is not None and member.state == "alive":
                c.members.renew(shard.incarnation, self.clock.now)
                if c.scaling.dismissed(member) and self.rng.random() < 0.2:
                    shard.alive = False
                    c.member_gone(member, "left")
        c.tick()
        orders = c.copies.step()
        if c.phase in OVER:
            return
        for order in orders:
            self._order(order)
        now = self.clock.now
        for number in c.copies.adoption.due(now):
            self._adopt(c.shards[number].incarnation, number)
        for number, blocks in c.copies.promotion.ask(now).items():
            self._ask(c.shards[number].incarnation, number, blocks)

    def _order(self, order: Order) -> None:
        incarnation = self.c.shards[order.owner].incarnation
        life = self.c.term

        def call() -> None:
            shard = self.shards[incarnation]
            if not shard.alive:
                return
            if order.kind == COPY_ORDER:
                shard.copy(order.block, order.shard, order.generation)
            elif order.kind == HAND:
                shard.hand_over(order.block, order.shard, order.generation, (order.term, order.order))
            else:
                shard.reopen(order.block, order.generation, (order.term, order.order))
                if self.rng.random() >= self.losing and self.c.term == life:
                    self.c.copies.moving.reopened(order)

        self.post(call)

    def _adopt(self, incarnation: int, number: int) -> None:
        c, copies = self.c, self.c.copies
        message = copies.records.message(copies.adoption.since(number))
        told = Placement.FromString(message.SerializeToString())
        create = set(copies.creating) if c.phase != "gathering" else set(range(c.layout.blocks))
        generation, listed, life = c.generation, copies.adoption.listed, c.term
        done = False

        def call() -> None:
            nonlocal done
            shard = self.shards[incarnation]
            if shard.alive:
                shard.adopt(told, create)
                if self.rng.random() >= self.losing and self.c.term == life and not done:
                    done = True
                    self.c.copies.adoption.under_way.discard(number)
                    known = self.c.shards.get(number)
                    if known is not None and known.incarnation == incarnation:
                        self.c.has_adopted(number, generation, listed)

        self.post(call)

        def given_up() -> None:
            if not done and self.c.term == life:
                self.c.copies.adoption.under_way.discard(number)
                self.c.copies.adoption.failed(number, self.clock.now)

        self.sent += 1
        self.mail.append((self.clock.now + 0.6, self.sent, given_up))

    def _ask(self, incarnation: int, number: int, blocks: list[int]) -> None:
        life = self.c.term

        def call() -> None:
            shard = self.shards[incarnation]
            if not shard.alive:
                return
            found = [shard.held(b) for b in blocks]

            def answer() -> None:
                known = self.c.shards.get(number)
                if self.c.term == life and known is not None and known.incarnation == incarnation:
                    self.c.copies.promotion.answered(number, blocks, [g for g, _ in found], [s for _, s in found])

            self.post(answer)

        self.post(call)

    def tell(self, sender: Shard, told: int, block: int, generation: int, **other: Any) -> None:
        """Report to the coordinator; the answer may be lost."""
        request = pb.ReportRequest(
            told=told,
            blocks=pack(np.array([block], np.int32)),
            generations=pack(np.array([generation], np.uint64)),
            **other,
        )

        def call() -> None:
            member = self.c.members.all.get(sender.incarnation)
            if member is None or member.state != "alive":
                return
            try:
                with self.c.lock:
                    reply = report(self.c, member, request)
            except PSError:
                return
            if reply.HasField("record") and sender.alive:
                record = Placement.FromString(reply.record.SerializeToString())
                self.post(lambda: sender.alive and sender.adopt(record, set()))
            elif sender.alive and told == pb.CONFIRMED:
                self.post(lambda: sender.noted(block, generation))

        self.post(call)

    # Workers

    def push(self, block: int) -> None:
        """Push to whoever believes to own a block: a stale owner may do so, too."""
        owners = [s for s in self.shards.values() if s.alive and block in s.blocks and s.blocks[block].role == OPEN]
        if owners:
            self.next_operation += 1
            self.rng.choice(owners).push(block, self.next_operation)

    def acknowledge(self, shard: Shard, block: int, operations: list[int]) -> None:
        self.acknowledged[block].update(operations)

    def made(self, block: int) -> None:
        self.acknowledged[block].clear()

    def reach(self, shard: Shard, number: int) -> Shard | None:
        """Return the shard that listens where ``shard`` believes that ``number`` does."""
        return next((s for s in reversed(self.shards.values()) if s.id == number and s.alive), None)

    # The end

    def settle(self) -> None:
        """Let faults stop, and all come to rest."""
        self.losing, self.store.tear = 0.0, -1
        for shard in self.shards.values():
            shard.alive &= shard.heard
        self.c.copies.held = False
        rested = 0
        for _ in range(1500):
            self.step()
            c = self.c
            if c.phase in OVER:
                return
            missing = c.scaling.servers - sum(m.incarnation not in c.scaling.leaves for m in c.members.alive("shard"))
            if missing > 0:
                self.join()
            rested = rested + 1 if self.rests() else 0
            if rested == 20:
                break
        else:
            raise AssertionError(f"nothing comes to rest: {self.why()}")
        records = c.records
        living = np.array(sorted(records.shards), np.int32)
        assert (np.isin(records.members, living).sum(axis=1) == self.spec.replicas + 1).all(), records.members
        # Each table by itself, and dense slices, which are of one size here.
        base = c.layout.dense_base
        for owners in (records.owners[:base], records.owners[base:]):
            owned = [int((owners == s).sum()) for s in living]
            assert max(owned) - min(owned) <= 1, owned
        for block in range(c.layout.blocks):
            owner, members, _ = records.of(block)
            for member in members:
                state = self.shards[records.shards[member].incarnation].blocks[block]
                assert (state.role == OPEN) == (member == owner), (block, member, state)

    def rests(self) -> bool:
        return self.c.copies.at_rest and not self.c.recoveries.open and len(self.c.shards) == self.c.scaling.servers

    def why(self) -> str:
        c, copies = self.c, self.c.copies
        return (
            f"calm {copies.calm} flights {copies.moving.flights} gone {c.records.gone} promotion {copies.promotion.blocks} "
            f"shards {list(c.shards)} wanted {c.scaling.servers} recoveries {c.recoveries.open} told {copies.adoption.told} "
            f"generation {c.generation} members {c.records.members.tolist()}"
        )

    # Promises

    def check(self) -> None:
        for block in range(self.c.layout.blocks):
            self.check_block(block)

    def check_block(self, block: int) -> None:
        c, records = self.c, self.c.records
        if c.phase not in OVER:
            owner, members, generation = records.of(block)
            claim = [
                s
                for s in self.shards.values()
                if s.alive and block in s.blocks and s.blocks[block].role in (OPEN, CLOSED)
            ]
            for shard in claim:
                state = shard.blocks[block]
                # R2: whom the record names the owner of the same generation requires.
                if state.generation == generation and shard.id == owner:
                    required = state.required | {shard.id}
                    assert set(members) <= required, f"R2: {block}: {members} are recorded, {required} required"
            # R3, R1: whoever the record names has all that was acknowledged, or is dead.
            for member in members:
                known = records.shards.get(member)
                shard = self.shards.get(known.incarnation) if known else None
                if shard is None or not shard.alive or c.phase == "gathering" or c.spec.on_loss != "rollback":
                    continue
                state = shard.blocks.get(block)
                if state is None:
                    assert block in c.copies.creating, f"R2: {block}: member {member} has nothing"
                    continue
                missing = self.acknowledged[block] - set(state.operations)
                assert not missing, f"R1: {block}: member {member} lacks {missing}"
            if c.spec.on_loss == "rollback":
                self._one_can_acknowledge(block, claim)

    def _one_can_acknowledge(self, block: int, claim: list[Shard]) -> None:
        """At most one owner that is open finds all that it requires at its own generation."""
        able = []
        for shard in claim:
            state = shard.blocks[block]
            others = [self.reach(shard, m) for m in state.required]
            theirs = [o.blocks.get(block) if o is not None else None for o in others]
            takes = all(t is not None and (t.role, t.generation) == (COPY, state.generation) for t in theirs)
            if state.role == OPEN and takes:
                able.append((shard.id, state.generation))
        assert len(able) <= 1, f"one owner: {block}: {able} can acknowledge"
