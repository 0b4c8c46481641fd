# SPDX-License-Identifier: Apache-2.0
"""A shard of the model of copies: for each block its role, generation and operations; and what it does about orders.

Invariant: nothing but what docs and SEMANTICS section 6 ask of a shard; all that it sends may be lost.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import unpack
from oarlock.proto.common_pb2 import Placement

COPY, OPEN, CLOSED = "copy", "open", "closed"


@dataclass
class Block:
    """What a shard has of a block; of an owner also whom it requires, and what each of them confirmed."""

    role: str
    generation: int
    operations: list[int]
    required: set[int] = field(default_factory=set)
    confirmed: dict[int, tuple[int, int]] = field(default_factory=dict)
    order: tuple[int, int] = (0, 0)
    heir: int = -1
    adding: set[int] = field(default_factory=set)
    # Members, of the record; operations at its adoption; whether the coordinator heard that all members are there.
    members: set[int] = field(default_factory=set)
    begun: int = 0
    told: bool = False
    waiting: list[int] = field(default_factory=list)

    def has_all(self, member: int, operations: int) -> bool:
        generation, done = self.confirmed.get(member, (0, 0))
        return generation == self.generation and done >= operations


class Shard:
    """``model`` carries messages. ``alive``: it goes on; ``heard``: the coordinator hears its heartbeats."""

    def __init__(self, model: Any, number: int, incarnation: int) -> None:
        self.model = model
        self.id = number
        self.incarnation = incarnation
        self.alive = self.heard = True
        self.blocks: dict[int, Block] = {}

    # Orders

    def adopt(self, told: Placement, create: set[int]) -> None:
        owners = unpack(told.owners, np.int32, "owners")
        blocks = unpack(told.blocks, np.int32, "blocks") if told.HasField("blocks") else np.arange(len(owners))
        generations = (
            unpack(told.generations, np.uint64, "generations")
            if told.HasField("generations")
            else np.full(len(owners), told.generation, np.uint64)
        )
        members = unpack(told.members, np.int32, "members", dims=2) if told.HasField("members") else owners[:, None]
        for block, owner, generation, row in zip(
            blocks.tolist(), owners.tolist(), generations.tolist(), members.tolist(), strict=True
        ):
            self._adopt(block, owner, int(generation), {m for m in row if m >= 0}, create)

    def _adopt(self, block: int, owner: int, generation: int, members: set[int], create: set[int]) -> None:
        mine = self.blocks.get(block)
        if self.id not in members:
            if mine is not None and (
                mine.generation < generation or (mine.generation == generation and mine.role != COPY)
            ):
                del self.blocks[block]
            return
        if mine is None and block not in create:
            self.model.tell(self, pb.LACKING, block, generation)
            return
        if mine is None:
            # Made anew: what was acknowledged before is lost, and was counted so.
            mine = self.blocks[block] = Block(COPY, 0, [])
            self.model.made(block)
        if generation <= mine.generation and not (
            generation == mine.generation and self.id == owner and mine.role == COPY
        ):
            return
        mine.generation = generation
        mine.adding, mine.confirmed, mine.told, mine.waiting = set(), {}, False, mine.waiting
        if self.id == owner:
            mine.role, mine.members = OPEN, set(members)
            mine.required = members - {self.id}
            mine.begun = len(mine.operations)
        else:
            mine.role, mine.required, mine.waiting = COPY, set(), []

    def copy(self, block: int, to: int, generation: int) -> None:
        mine = self.blocks.get(block)
        if mine is not None and mine.role == OPEN and mine.generation == generation and to not in mine.required:
            mine.adding.add(to)

    def hand_over(self, block: int, to: int, generation: int, order: tuple[int, int]) -> None:
        mine = self.blocks.get(block)
        if mine is None or mine.role == COPY or mine.generation != generation or order <= mine.order:
            return
        mine.role, mine.order, mine.heir = CLOSED, order, to

    def reopen(self, block: int, generation: int, order: tuple[int, int]) -> None:
        mine = self.blocks.get(block)
        if mine is not None and mine.role == CLOSED and mine.generation == generation and mine.order == order:
            mine.role = OPEN

    def held(self, block: int) -> tuple[int, int]:
        mine = self.blocks.get(block)
        return (mine.generation, len(mine.operations)) if mine is not None else (0, 0)

    def noted(self, block: int, generation: int) -> None:
        mine = self.blocks.get(block)
        if mine is not None and mine.generation == generation:
            mine.told = True

    # What it does by itself

    def push(self, block: int, operation: int) -> None:
        mine = self.blocks[block]
        mine.operations.append(operation)
        mine.waiting.append(operation)
        self._acknowledge(block, mine)

    def _acknowledge(self, block: int, mine: Block) -> None:
        if mine.role == COPY:
            return
        done = min(
            (mine.confirmed.get(m, (0, 0))[1] if mine.has_all(m, 0) else 0 for m in mine.required), default=1 << 60
        )
        acknowledged = [op for op in mine.waiting if mine.operations.index(op) < done]
        self.model.acknowledge(self, block, acknowledged)
        mine.waiting = [op for op in mine.waiting if op not in acknowledged]

    def act(self) -> None:
        """Send what members lack, and tell what is due; each of it now and then."""
        for block, mine in list(self.blocks.items()):
            if mine.role == COPY:
                continue
            for member in mine.required:
                if not mine.has_all(member, len(mine.operations)) and self.model.rng.random() < 0.7:
                    self._replicate(block, mine, member, whole=member not in mine.members)
            for member in set(mine.adding):
                if self.model.rng.random() < 0.7:
                    self._replicate(block, mine, member, whole=True)
            if self.model.rng.random() < 0.5:
                self._tell(block, mine)

    def _tell(self, block: int, mine: Block) -> None:
        everything = len(mine.operations)
        for member in mine.required - mine.members:
            if mine.has_all(member, everything):
                self.model.tell(self, pb.ADDED, block, mine.generation, shard=member)
        if mine.role == CLOSED and all(mine.has_all(m, everything) for m in mine.required):
            term, order = mine.order
            self.model.tell(self, pb.HANDED, block, mine.generation, shard=mine.heir, order=order, term=term)
        others = mine.members - {self.id}
        if others and not mine.told and all(mine.has_all(m, mine.begun) for m in others):
            self.model.tell(self, pb.CONFIRMED, block, mine.generation)

    def _replicate(self, block: int, mine: Block, member: int, *, whole: bool) -> None:
        generation, operations = mine.generation, list(mine.operations)
        target = self.model.reach(self, member)
        if target is None:
            return

        def call() -> None:
            if not target.alive:
                return
            done = target.take(block, generation, operations, whole=whole)
            if done is not None:
                self.model.post(lambda: self.confirm(block, target.id, generation, done))

        self.model.post(call)

    def take(self, block: int, generation: int, operations: list[int], *, whole: bool) -> int | None:
        """Take operations in order, or a whole copy; return how many are there now, None: refused."""
        mine = self.blocks.get(block)
        if whole and (mine is None or (mine.generation, len(mine.operations)) < (generation, len(operations))):
            if mine is not None and mine.role != COPY and mine.generation >= generation:
                return None
            self.blocks[block] = mine = Block(COPY, generation, list(operations))
        if mine is None or mine.role != COPY or mine.generation != generation:
            return None
        if mine.operations != operations[: len(mine.operations)]:
            # Later already: what it has begins with these.
            assert operations == mine.operations[: len(operations)], f"R4: {block}: {mine.operations} and {operations}"
            return len(mine.operations)
        mine.operations = list(operations)
        return len(operations)

    def confirm(self, block: int, member: int, generation: int, done: int) -> None:
        mine = self.blocks.get(block)
        if mine is None or not self.alive or mine.role == COPY or mine.generation != generation:
            return
        mine.confirmed[member] = max(mine.confirmed.get(member, (0, 0)), (generation, done))
        if member in mine.adding:
            mine.adding.discard(member)
            mine.required.add(member)
            # What it required without it was acknowledged then; what is added later waits for it, too.
        self._acknowledge(block, mine)
