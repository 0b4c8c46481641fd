# SPDX-License-Identifier: Apache-2.0
"""Bugs of copies, moves and promotion, planted on purpose as in planted.py: each breaks one rule of SEMANTICS section 6.

Some rules are kept twice over (a stream has positions, and copies have sequences): those plants take both away.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oarlock.client.closed import ClosedSet
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.moving import Moving
from oarlock.cluster.promotion import Chosen, Promotion
from oarlock.cluster.record import Records
from oarlock.proto.coordinator_pb2 import ADDED, HANDED
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PushReply
from oarlock.ps import adopting, following, operations
from oarlock.ps.following import Following
from oarlock.ps.holdings import Holdings, Numbers
from oarlock.ps.images import take
from oarlock.ps.leading import Leading
from oarlock.ps.rank_marks import STEP_MARK
from oarlock.ps.staged import Staged
from oarlock.simulation.faults import ECHO, HANDED_OVER

Patch = pytest.MonkeyPatch


def acknowledged_before_the_copies_have_it(patch: Patch) -> None:
    """A push is answered once its owner has it."""
    patch.setattr(Leading, "answer", lambda self, reply, numbers: reply)


def skipped_duplicates_are_acknowledged_at_once(patch: Patch) -> None:
    """A push that changes nothing waits for nobody, though what set the mark is on its way to the copies."""
    original = Leading.answer

    def answer(self: Leading, reply: PushReply, numbers: Numbers) -> Any:
        return original(self, reply, numbers) if reply.applied else reply

    patch.setattr(Leading, "answer", answer)


def who_is_behind_is_waited_for_no_more(patch: Patch) -> None:
    """An owner lets a member go that does not keep up, before the record says that it left."""
    original = Leading._tail

    def tail(self: Leading, numbers: Any) -> dict[int, int]:
        for shard, mask in self._requires.items():
            if self.streams[shard].next - self.streams[shard].first > 3:
                mask[:] = False
        return original(self, numbers)

    patch.setattr(Leading, "_tail", tail)


def added_before_it_is_confirmed(patch: Patch) -> None:
    """A copy is reported when it begins to travel."""
    original = Leading.add

    def add(self: Leading, shard: int, image: Any) -> None:
        original(self, shard, image)
        self._report(ADDED, image.numbers, self._known(image.numbers), shard)

    patch.setattr(Leading, "add", add)


def added_before_it_is_required(patch: Patch) -> None:
    """A copy is reported when it has come, and waited for once the record names it."""

    def require(self: Leading, shard: int, numbers: Numbers, known: Any) -> None:
        self._report(ADDED, numbers, known, shard)

    patch.setattr(Leading, "_require", require)


def handed_over_before_all_have_all(patch: Patch) -> None:
    """A block is reported as soon as it is closed."""

    def hand_over(self: Leading, numbers: Numbers, to: int, order: Any) -> None:
        with self.lock:
            self._report(HANDED, numbers, self._known(numbers), to, order)
        self.wake()

    patch.setattr(Leading, "hand_over", hand_over)


def closed_blocks_go_on(patch: Patch) -> None:
    """A block that is to be handed over is answered for until the record names its heir."""
    original = Holdings.close

    def close(self: Holdings, numbers: Numbers, order: Any) -> Numbers:
        found = original(self, numbers, order)
        self.owned[found] = True
        return found

    patch.setattr(Holdings, "close", close)


def an_heir_waits_for_nobody(patch: Patch) -> None:
    """Who becomes the owner begins without members, as if it were promoted."""
    original = Leading.lead
    patch.setattr(Leading, "lead", lambda self, members, numbers: original(self, {}, numbers))


def refusals_end_with_their_record(patch: Patch) -> None:
    """A copy that refused an operation is taken to have it, once another record names it still."""
    original = Leading.lead

    def lead(self: Leading, members: Any, numbers: Numbers) -> None:
        with self.lock:
            self._broken.clear()
        original(self, members, numbers)

    patch.setattr(Leading, "lead", lead)


def a_deposed_owner_goes_on(patch: Patch) -> None:
    """Who hears that another one owns its block answers for it again, though it had closed it."""
    original = adopting._leave

    def leave(shard: Any, others: Numbers, gone: Any) -> None:
        led = shard.holdings.leads
        original(shard, others, gone)
        shard.holdings.owned |= led & shard.holdings.here

    patch.setattr(adopting, "_leave", leave)


def operations_of_any_generation(patch: Patch) -> None:
    """A copy does what whoever owned it tells it, whatever its record says since."""
    original = Following._step

    def step(self: Following, sender: int, operation: Any, generations: Any, ready: Any) -> Any:
        holdings, numbers = self._shard.holdings, operation.numbers
        owners = holdings.owners[numbers].copy()
        if isinstance(operation.does, operations.Image):
            return original(self, sender, operation, generations, ready)
        holdings.owners[numbers] = sender
        try:
            return original(self, sender, operation, holdings.generations[numbers].copy(), ready)
        finally:
            holdings.owners[numbers] = owners

    patch.setattr(Following, "_step", step)


def operations_are_done_as_they_come(patch: Patch) -> None:
    """Neither positions in a stream nor sequences of copies are looked at: what comes twice is done twice."""
    patch.setattr(Following, "_at", lambda self, request: request.first)
    patch.setattr(following, "lead_of", lambda shard, operation: np.ones(len(operation.numbers), np.int64))
    patch.setattr(operations, "_same", lambda operation, found, wanted: None)


def images_take_the_place_of_newer_copies(patch: Patch) -> None:
    """A full copy that comes late replaces one that has done more since."""
    patch.setattr(Following, "_at", lambda self, request: request.first)
    original = Following._image

    def image(self: Following, sender: int, operation: Any, does: Any, generation: int, ready: Any) -> Any:
        if self._shard.holdings.is_copy(operation.numbers)[0]:
            take(self._shard, does)
            return []
        return original(self, sender, operation, does, generation, ready)

    patch.setattr(Following, "_image", image)


def opened_again_under_any_order(patch: Patch) -> None:
    """Word of a hand-over that came to nothing opens what is closed under another order."""
    original = Holdings.reopen

    def reopen(self: Holdings, numbers: Any, order: Any) -> Numbers:
        named = list(numbers)
        for number in named:
            if number in self.closed:
                self.closed[number] = order
        return original(self, named, order)

    patch.setattr(Holdings, "reopen", reopen)


def handed_over_under_any_order(patch: Patch) -> None:
    """A report of a block that was closed under an order that was given up makes an heir of who is meant now."""

    def handed(self: Moving, block: int, term: int, order: int) -> int | None:
        flight = self.flights.get(block)
        return flight.move.heir if flight is not None and flight.move.heir in self._records.shards else None

    patch.setattr(Moving, "handed", handed)


def whoever_is_alive_is_promoted(patch: Patch) -> None:
    """The owner of a block is dead: any shard becomes its owner."""

    def step(self: Promotion, now: float) -> list[Chosen]:
        shards = sorted(self._records.shards)
        return [Chosen(block, shards[block % len(shards)]) for block in self.blocks] if shards else []

    patch.setattr(Promotion, "step", step)


def _taken(patch: Patch, change: Callable[[Any], Any]) -> None:
    for module in (following, operations):
        patch.setattr(module, "take", lambda shard, image, ready=None: take(shard, change(image), ready))


def the_closed_set_does_not_travel(patch: Patch) -> None:
    """A copy knows splits as open that had ended when it was made, and neither do records tell it."""
    _taken(patch, lambda image: replace(image, closed=ClosedSet()))
    original = adopting.adopt

    def adopt(shard: Any, me: int, told: Any, closed: ClosedSet, *arguments: Any, **named: Any) -> None:
        original(shard, me, told, ClosedSet(), *arguments, **named)

    from oarlock.ps import replicating, service

    patch.setattr(service, "adopt", adopt)
    patch.setattr(replicating, "adopt", adopt)


def marks_do_not_travel(patch: Patch) -> None:
    """A copy has the values of groups, and not which they are of."""
    _taken(patch, lambda i: replace(i, marks={s: g for s, g in i.marks.items() if s == STEP_MARK}))


def staged_parts_do_not_travel(patch: Patch) -> None:
    """A copy that is made in the middle of a step lacks the parts that had come."""
    _taken(patch, lambda image: replace(image, staged=()))


def parts_are_acknowledged_before_the_copies_have_them(patch: Patch) -> None:
    """sync: a part that is lost with its owner was acknowledged; its rank has committed the step, which is made without it."""
    original = Staged.push

    def push(self: Staged, sent: Any) -> Any:
        reply = original(self, sent)
        return reply.so_far if isinstance(reply, Pending) else reply

    patch.setattr(Staged, "push", push)


def steps_are_told_before_the_copies_made_them(patch: Patch) -> None:
    """A rank's pull is answered once the owner has made the step."""
    patch.setattr(Leading, "everywhere", lambda self, numbers: True)


def records_are_told_and_not_kept(patch: Patch) -> None:
    """What a move makes of a record is told without being on disk."""
    original = Records.change

    class Nowhere:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

    def change(self: Records, store: Any, *what: Any) -> None:
        original(self, Nowhere(), *what)  # type: ignore[arg-type]

    patch.setattr(Records, "change", change)


def a_shards_number_is_given_again(patch: Patch) -> None:
    """Who joins gets the number of one that is dead, though records name it still."""
    patch.setattr(Coordinator, "_next_id", lambda self, role: self.members.next_id(role))


# What a schedule must have for a plant to show: the course of things in which the rule matters is rare without it.
AIMED_AT: dict[Callable[[Patch], None], set[tuple[str, str]]] = {
    operations_of_any_generation: {("freeze", "Shard.Replicate"), ("hold", "Shard.Replicate")},
    images_take_the_place_of_newer_copies: {(ECHO, "Shard.Copy")},
    opened_again_under_any_order: {("hold", HANDED_OVER)},
    handed_over_under_any_order: {("hold", HANDED_OVER)},
}

PLANTED: tuple[Callable[[Patch], None], ...] = (
    acknowledged_before_the_copies_have_it,
    skipped_duplicates_are_acknowledged_at_once,
    who_is_behind_is_waited_for_no_more,
    added_before_it_is_confirmed,
    added_before_it_is_required,
    handed_over_before_all_have_all,
    closed_blocks_go_on,
    refusals_end_with_their_record,
    an_heir_waits_for_nobody,
    a_deposed_owner_goes_on,
    operations_of_any_generation,
    operations_are_done_as_they_come,
    images_take_the_place_of_newer_copies,
    opened_again_under_any_order,
    handed_over_under_any_order,
    whoever_is_alive_is_promoted,
    the_closed_set_does_not_travel,
    marks_do_not_travel,
    staged_parts_do_not_travel,
    parts_are_acknowledged_before_the_copies_have_them,
    steps_are_told_before_the_copies_made_them,
    records_are_told_and_not_kept,
    a_shards_number_is_given_again,
)
