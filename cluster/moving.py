# SPDX-License-Identifier: Apache-2.0
"""Moving: copies that are added, owners that hand over, members that leave; one move of a block at a time, step by step.

    copy       the owner gives `to` a copy and requires it, then reports; the record names it
    wait       the copy waits for others that are under way: what is closed together costs those who push one wait for all
    hand       the owner closes the block and reports once all members have all; the record names `heir` as the owner
    confirm    a member too many leaves once those that stay have confirmed the record as it is

Invariant: what a move does next follows from the block's record alone, so a record that changed by whatever way begins that step
anew, and so does a coordinator that was restarted. At most ``most_closed`` blocks are closed at once. An order that was given up
is never accepted again; one that was repeated has a number for each time, and any of them counts until then. Pure: time comes in
as ``now``. The coordinator's lock covers it.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from oarlock.cluster.record import Records

# Copies under way per owner.
MOST_COPIES = 32
# An order of which nothing was heard is given again.
REPEAT_SECONDS = 1.0
# A block is closed so long at most before it is opened again: somebody does not answer.
HAND_SECONDS = 5.0
# A copy that is there waits so long at most for others, to be handed over together with them.
GATHER_SECONDS = 2.0
# After blocks were closed, before others are: those who push get on in between.
BREATH_SECONDS = 0.25

COPY, WAIT, HAND, CONFIRM, REOPEN = "copy", "wait", "hand", "confirm", "reopen"


@dataclass(frozen=True)
class Move:
    """A row of a plan: ``to`` gets a copy, then ``heir`` takes the block over, then ``leaves`` gives it up. -1: nobody."""

    block: int
    leaves: int
    to: int
    heir: int = -1


@dataclass(frozen=True)
class Order:
    """What an owner is told about a block: ``kind`` copy, hand or reopen. ``order`` and ``term`` of the last two.

    ``leisurely``: a copy that is one more than the job asks for, so that nothing is lost if it comes late.
    """

    kind: str
    owner: int
    block: int
    generation: int
    shard: int = -1
    term: int = 0
    order: int = 0
    leisurely: bool = False


@dataclass(frozen=True)
class Change:
    """A record that is to be made: the owner, and all members."""

    block: int
    owner: int
    members: tuple[int, ...]


@dataclass
class Flight:
    """A move under way. ``orders``: numbers under which the block may be closed now."""

    move: Move
    generation: int = 0
    stage: str = ""
    owner: int = -1
    since: float = 0.0
    # When it is looked at by itself.
    due: float = 0.0
    orders: list[int] = field(default_factory=list)


class Moving:
    """``flights``: moves under way, by block. ``opened``: the newest generation that an earlier life recorded."""

    def __init__(self, records: Records, most_closed: int, term: int) -> None:
        self._records = records
        self._most_closed = most_closed
        self._term = term
        self.opened = records.generation
        self.flights: dict[int, Flight] = {}
        self.held = False
        # Whether a move came to nothing since moves were wanted.
        self.dropped = False
        self._waiting: dict[int, deque[Move]] = {}
        self._copies: Counter[int] = Counter()
        # The last number of an order; and those of this step, by owner and heir: they go out together.
        self._numbers = 0
        self._numbered: dict[tuple[int, int], int] = {}
        # Blocks whose copy is recorded and whose turn to be closed has not come, in this order.
        self._ready: dict[int, None] = {}
        self.closed: set[int] = set()
        # When something was closed last.
        self._closed_at = -BREATH_SECONDS
        self._confirmed: dict[int, int] = {}
        self._look: set[int] = set()
        self._timers: list[tuple[float, int]] = []
        # With the time at which each is given again. Of one block there may be several: it is closed under whichever came last.
        self._reopen: dict[Order, float] = {}

    # What is wanted

    def want(self, moves: Iterable[Move]) -> None:
        """Take moves in the place of those that have not begun; a block whose move is under way ends that one first."""
        self._waiting, self.dropped = {}, False
        for move in moves:
            if move.block not in self.flights:
                owner = int(self._records.owners[move.block])
                self._waiting.setdefault(owner, deque()).append(move)

    @property
    def idle(self) -> bool:
        """Whether nothing moves, or waits to."""
        return not self.flights and not any(self._waiting.values())

    @property
    def left(self) -> int:
        """How many blocks move, or wait to."""
        return len(self.flights) + sum(map(len, self._waiting.values()))

    # What happens

    def recorded(self, blocks: Iterable[int]) -> None:
        """Records changed."""
        for block in blocks:
            self._confirmed.pop(block, None)
            if block in self.flights:
                self._look.add(block)

    def gone(self, shard: int) -> None:
        """A shard is dead: moves to it and from it are looked at again."""
        self._waiting.pop(shard, None)
        self._look.update(
            b for b, f in self.flights.items() if shard in (f.owner, f.move.to, f.move.heir, f.move.leaves)
        )
        self._reopen = {order: again for order, again in self._reopen.items() if order.owner != shard}

    def copies_to(self, shard: int) -> list[int]:
        """Return the blocks whose owners may require a copy on a shard that no record names yet."""
        return [b for b, f in self.flights.items() if f.stage == COPY and f.move.to == shard]

    def confirmed(self, block: int, generation: int) -> None:
        """The owner said that all members have all operations of this generation's beginning."""
        self._confirmed[block] = generation
        if block in self.flights:
            self._look.add(block)

    def handed(self, block: int, term: int, order: int) -> int | None:
        """A block is closed, and all members have all of it; return its new owner, None: it is to be opened again."""
        owner, _, generation = self._records.of(block)
        flight = self.flights.get(block)
        if (
            flight is not None
            and (flight.stage, flight.generation, term) == (HAND, generation, self._term)
            and order in flight.orders
            and flight.move.heir in self._records.shards
        ):
            return flight.move.heir
        self._reopen[Order(REOPEN, owner, block, generation, term=term, order=order)] = 0.0
        return None

    def leaves(self, block: int) -> int:
        """Return who is to give a block up, -1: nobody."""
        flight = self.flights.get(block)
        return flight.move.leaves if flight is not None else -1

    def reopened(self, order: Order) -> None:
        """The owner has heard that a hand-over came to nothing."""
        self._reopen.pop(order, None)

    def hold(self, held: bool) -> None:
        """Begin nothing that closes a block, or changes a record, while ``held``."""
        if self.held and not held:
            self._look.update(self.flights)
        self.held = held

    def give_up_closed(self) -> None:
        """Have all blocks that are closed opened again; their moves go on later."""
        for block in sorted(self.closed):
            self._open_again(self.flights[block])
            self.flights[block].stage = WAIT
            self._ready[block] = None

    def drop(self, block: int) -> None:
        """A move does not go on for now; whoever wants it asks again."""
        flight = self.flights.get(block)
        if flight is not None:
            if flight.orders:
                self._open_again(flight)
            self._leave_stage(flight)
            del self.flights[block]
            self.dropped = True

    def _open_again(self, flight: Flight) -> None:
        block, owner = flight.move.block, flight.owner
        # Each of them may be the last that came there.
        for number in flight.orders:
            self._reopen[Order(REOPEN, owner, block, flight.generation, term=self._term, order=number)] = 0.0
        self._leave_stage(flight)

    # What follows

    def step(self, now: float) -> tuple[list[Order], list[Change]]:
        """Return the orders to give now, and the records to make; call again after the records were made."""
        orders: list[Order] = []
        changes: list[Change] = []
        self._numbered.clear()
        if self.closed:
            self._closed_at = now
        while self._timers and self._timers[0][0] <= now:
            at, block = heapq.heappop(self._timers)
            if block in self.flights and self.flights[block].due == at:
                self._look.add(block)
        self._look_at_all(now, orders, changes)
        if not self.held:
            self._begin()
            self._look_at_all(now, orders, changes)
        if not self.held:
            for flight in self._gathered(now):
                self._close(flight, now, orders)
        for order, again in list(self._reopen.items()):
            if order.generation != int(self._records.generations[order.block]):
                del self._reopen[order]
            elif again <= now:
                self._reopen[order] = now + REPEAT_SECONDS
                orders.append(order)
        return orders, changes

    def _gathered(self, now: float) -> list[Flight]:
        """Return the moves whose blocks are to be closed now, together: none as long as others soon could be, too."""
        if self.closed or now - self._closed_at < BREATH_SECONDS or not self._ready:
            return []
        ready = [b for b in self._ready if b in self.flights and self.flights[b].stage == WAIT]
        there = [self.flights[b] for b in ready if self._is_there(self.flights[b], now)]
        more = len(there) < len(ready) or any(self._copies.values()) or any(self._waiting.values())
        full = len(there) >= self._most_closed
        if not there or (more and not full and now - min(f.since for f in there) < GATHER_SECONDS):
            return []
        chosen = there[: self._most_closed]
        gone = {flight.move.block for flight in chosen}
        self._ready = dict.fromkeys(b for b in ready if b not in gone)
        return chosen

    def _is_there(self, flight: Flight, now: float) -> bool:
        """Whether nothing is left to drain but what was done just now: the owner has said so, or has had time to."""
        confirmed = self._confirmed.get(flight.move.block) == flight.generation
        return confirmed or flight.generation <= self.opened or now - flight.since >= REPEAT_SECONDS

    def _look_at_all(self, now: float, orders: list[Order], changes: list[Change]) -> None:
        for block in sorted(self._look & self.flights.keys()):
            self._look_at(self.flights[block], now, orders, changes)
        self._look.clear()

    def _begin(self) -> None:
        """Take moves from those that wait, as many as their owners may copy."""
        for owner in list(self._waiting):
            queue = self._waiting[owner]
            while queue and self._copies[owner] < MOST_COPIES:
                move = queue.popleft()
                if move.block not in self.flights:
                    self.flights[move.block] = Flight(move)
                    self._look_at(self.flights[move.block], 0.0, [], [], begin=True)
            if not queue:
                del self._waiting[owner]

    def _look_at(
        self, flight: Flight, now: float, orders: list[Order], changes: list[Change], *, begin: bool = False
    ) -> None:
        move, records = flight.move, self._records
        owner, members, generation = records.of(move.block)
        if flight.generation != generation or flight.owner != owner:
            self._leave_stage(flight)
            flight.generation, flight.owner = generation, owner
        stage = self._stage(move, owner, members)
        if not stage:
            self.dropped |= (move.to >= 0 and move.to not in members) or (move.heir >= 0 and move.heir != owner)
            self._leave_stage(flight)
            del self.flights[move.block]
            return
        if stage != flight.stage and not (stage == WAIT and flight.stage == HAND):
            self._leave_stage(flight)
            flight.stage, flight.since = stage, now
            if stage == COPY:
                self._copies[owner] += 1
            if stage == WAIT:
                self._ready[move.block] = None
        if begin:
            # Its orders go out with the others.
            self._look.add(move.block)
            return
        if flight.stage == COPY and now >= flight.due:
            leisurely = len(members) > records.replicas
            orders.append(Order(COPY, owner, move.block, generation, move.to, leisurely=leisurely))
            self._wake(flight, now + REPEAT_SECONDS)
        elif flight.stage == HAND and now - flight.since >= HAND_SECONDS:
            self.drop(move.block)
        elif flight.stage == HAND and now >= flight.due:
            self._hand(flight, now, orders)
        elif flight.stage == CONFIRM and not self.held:
            self._confirm(flight, members, changes)

    def _stage(self, move: Move, owner: int, members: list[int]) -> str:
        """Return what a move is at; empty: it is over, or cannot go on."""
        shards, most = self._records.shards, self._records.replicas + 1
        if owner not in shards or any(s >= 0 and s not in shards for s in (move.to, move.heir)):
            return ""
        if move.to >= 0 and move.to not in members:
            return COPY if len(members) < self._records.width else ""
        if move.heir >= 0 and move.heir != owner:
            return WAIT if move.heir in members else ""
        return CONFIRM if move.leaves in members and move.leaves != owner and len(members) > most else ""

    def _leave_stage(self, flight: Flight) -> None:
        if flight.stage == COPY:
            self._copies[flight.owner] -= 1
        self.closed.discard(flight.move.block)
        flight.stage, flight.orders, flight.due = "", [], 0.0

    def _close(self, flight: Flight, now: float, orders: list[Order]) -> None:
        flight.stage, flight.since = HAND, now
        self.closed.add(flight.move.block)
        self._hand(flight, now, orders)

    def _hand(self, flight: Flight, now: float, orders: list[Order]) -> None:
        block, to = flight.move.block, flight.move.heir
        if (flight.owner, to) not in self._numbered:
            self._numbers += 1
            self._numbered[flight.owner, to] = self._numbers
        number = self._numbered[flight.owner, to]
        flight.orders.append(number)
        orders.append(Order(HAND, flight.owner, block, flight.generation, to, self._term, number))
        self._wake(flight, now + REPEAT_SECONDS)

    def _confirm(self, flight: Flight, members: list[int], changes: list[Change]) -> None:
        block = flight.move.block
        if self._confirmed.get(block) == flight.generation:
            changes.append(Change(block, flight.owner, tuple(m for m in members if m != flight.move.leaves)))
        elif flight.generation <= self.opened:
            # It was said to an earlier life, once; of a newer generation it is said again.
            changes.append(Change(block, flight.owner, tuple(members)))

    def _wake(self, flight: Flight, at: float) -> None:
        flight.due = at
        heapq.heappush(self._timers, (at, flight.move.block))
