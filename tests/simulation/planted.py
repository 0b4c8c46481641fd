# SPDX-License-Identifier: Apache-2.0
"""Bugs, planted on purpose: each breaks one rule of the protocol in the way in which it would be broken by mistake.

A test runs schedules over each until an invariant breaks: what cannot fail proves nothing.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.client.client import Client, Pushing
from oarlock.client.closed import ClosedSet
from oarlock.client.exchange import Message
from oarlock.client.membership import Membership
from oarlock.cluster import recovery, service
from oarlock.cluster.clocks import Clocks
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.members import Members
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.work import Work
from oarlock.proto.errors import DeadlineExceeded
from oarlock.proto.shard_pb2 import PushReply
from oarlock.ps.marks import Marks
from oarlock.ps.shard import Shard
from oarlock.worker.clock import WorkerClock
from oarlock.worker.trainer import Trainer

Patch = pytest.MonkeyPatch


def mark_before_apply(patch: Patch) -> None:
    """A push that fails in the middle leaves a mark that claims it."""

    original = Shard._push_rows

    def push_rows(self: Shard, to: Any, part: Any, reply: PushReply) -> None:
        self.marks.record(to.split, to.group, part.keys.numbers)
        original(self, to, part, reply)

    patch.setattr(Shard, "_push_rows", push_rows)


def duplicate_acknowledged_early(patch: Patch) -> None:
    """A push that was seen counts as one that was applied."""
    original = Shard.push

    def push(self: Shard, request: Any) -> PushReply:
        seen: set[bytes] = self.__dict__.setdefault("seen", set())
        key = b"%d %d" % (request.split, request.group) + b"".join(t.keys.blocks.data for t in request.tables)
        if key in seen:
            return PushReply(skipped=1)
        seen.add(key)
        return original(self, request)

    patch.setattr(Shard, "push", push)


def successor_starts_one_late(patch: Patch) -> None:
    """A successor takes the last group that some block has for one that all have."""
    original = Client.next_group

    async def next_group(self: Client, split: int) -> int:
        return await original(self, split) + 1

    patch.setattr(Client, "next_group", next_group)


def marks_dropped_without_a_closed_set(patch: Patch) -> None:
    """A late duplicate of a closed split looks new."""
    patch.setattr(Shard, "close_splits", lambda self, closed: self.marks.drop_closed(closed))


def closed_set_replaced(patch: Patch) -> None:
    """An older word of the closed splits undoes a newer one."""

    def close_splits(self: Shard, closed: ClosedSet) -> None:
        self.closed = closed
        self.marks.drop_closed(closed)

    patch.setattr(Shard, "close_splits", close_splits)


def block_cut_in_two(patch: Patch) -> None:
    """What a group adds to one block travels in two messages; the second passes for a repetition."""
    from oarlock.client import client, push

    original = push.cut_push

    def halves(part: Any) -> list[Any]:
        keys, out = part.keys, []
        ends = np.cumsum(keys.counts)
        for odd in (0, 1):
            rows = np.concatenate([np.arange(e - c + odd, e, 2) for e, c in zip(ends, keys.counts, strict=True)])
            counts = (keys.counts + 1 - odd) // 2
            kept = counts > 0
            half = type(keys)(keys.keys[rows], keys.inverse, keys.blocks[kept], counts[kept].astype(np.int32))
            out.append(push.RowGradients(half, part.gradients[rows], part.rate))
        return out

    def cut(layout: Any, routes: Any, identity: Any, gradients: Any, dense: Any, rate: float, **named: Any) -> Any:
        cut_parts = {name: halves(part) for name, part in gradients.items()}
        first = original(layout, routes, identity, {n: p[0] for n, p in cut_parts.items()}, dense, rate, **named)
        others = {n: p[1] for n, p in cut_parts.items()}
        return first + original(layout, routes, identity, others, None, rate, **named)

    patch.setattr(client, "cut_push", cut)


def acknowledged_by_the_first_shard(patch: Patch) -> None:
    """A group counts as acknowledged when one shard has answered."""
    from oarlock.client import push

    original = push.exchange

    async def exchange(member: Any, messages: list[Message], send: Any, recut: Any) -> None:
        tasks = [asyncio.ensure_future(original(member, [m], send, recut)) for m in messages]
        for task in tasks:
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    patch.setattr(push, "exchange", exchange)


def only_equal_marks_are_skipped(patch: Patch) -> None:
    """A group that is older than the mark is applied again."""

    def missing(self: Marks, split: int, group: int, blocks: Any) -> Any:
        found = self._marks.get(split)
        return np.ones(len(blocks), np.bool_) if found is None else found[blocks] != group

    patch.setattr(Marks, "missing", missing)


def bytes_made_when_sent(patch: Patch) -> None:
    """A push reads buffers that the next batch has filled again."""
    original = Client.push

    def push(self: Client, *arguments: Any, **named: Any) -> Any:
        async def late() -> Any:
            await asyncio.sleep(0.05)
            return await original(self, *arguments, **named)

        return Pushing(late)

    patch.setattr(Client, "push", push)


def told_before_recorded(patch: Patch) -> None:
    """A split is said to be closed and not on disk before the epoch ends."""

    def close_split(c: Coordinator, worker: int, split: int, samples: int, loss_sum: float, groups: int = 0) -> None:
        with c.lock:
            c.work.close(worker, split, samples, loss_sum, groups)

    patch.setattr(service, "close_split", close_split)


def only_the_floor_is_taken_up(patch: Patch) -> None:
    """A coordinator that was started again forgets the splits that were closed above the floor."""
    patch.setattr(recovery, "ClosedSet", lambda floor, above: ClosedSet(floor))


def closed_before_the_last_answer(patch: Patch) -> None:
    """A worker reports a split as closed while its last group is on its way."""
    original = Trainer._close

    async def close(self: Trainer, split: Any) -> None:
        split.pushed = None
        await original(self, split)

    patch.setattr(Trainer, "_close", close)


def judged_at_once(patch: Patch) -> None:
    """A coordinator that was away holds the silence against its members."""
    patch.setattr(Members, "grant_full_term", lambda self, now: None)


def evaluated_twice(patch: Patch) -> None:
    """The sums of an evaluation split are added again when its report is repeated."""
    original = Work.evaluate

    def evaluate(self: Work, worker: int, split: int, sums: list[float]) -> bool:
        if split in self.results:
            self.results[split] = [a + b + 1 for a, b in zip(self.results[split], sums, strict=True)]
            return True
        return original(self, worker, split, sums)

    patch.setattr(Work, "evaluate", evaluate)


def leases_outlive_their_worker(patch: Patch) -> None:
    """The splits of a dead worker are given to nobody."""
    patch.setattr(Work, "leased_to", lambda self, worker: [])


def clock_counts_what_was_sent(patch: Patch) -> None:
    """ssp: a group counts before it was acknowledged."""
    original = WorkerClock.number

    def number(self: WorkerClock) -> int:
        found = original(self)
        self.acknowledged(found)
        return found

    patch.setattr(WorkerClock, "number", number)


def joiner_holds_nobody_back(patch: Patch) -> None:
    """ssp: a worker that was given splits is not waited for before it first tells of itself."""
    original = CoordinatorService._answer

    def answer(self: CoordinatorService, member: Any, request: Any, held: Any) -> Any:
        reply = original(self, member, request, held)
        if not request.clock.active:
            self._coordinator.clocks.idle(member.incarnation)
        return reply

    patch.setattr(CoordinatorService, "_answer", answer)


def restarted_minimum_ignores_the_silent(patch: Patch) -> None:
    """ssp: a coordinator that was started again takes the clocks that it knows for all there are."""
    patch.setattr(Clocks, "begin", lambda self, workers: None)


def timeout_counts_as_acknowledged(patch: Patch) -> None:
    """A push whose answer does not come in time is taken for done."""
    from oarlock.client import push

    original = push.exchange

    async def exchange(member: Any, messages: list[Message], send: Any, recut: Any) -> None:
        async def once(message: Message, timeout: float) -> Any:
            try:
                return await send(message, timeout)
            except DeadlineExceeded:
                return np.empty(0, np.int32)

        await original(member, messages, once, recut)

    patch.setattr(push, "exchange", exchange)


def steps_counted_again(patch: Patch) -> None:
    """The groups of a split count again when its report is repeated."""
    original = Work.close

    def close(self: Work, worker: int, split: int, samples: int, loss_sum: float, groups: int = 0) -> bool:
        if split in self.closed:
            self.steps += groups
        return original(self, worker, split, samples, loss_sum, groups)

    patch.setattr(Work, "close", close)


def answers_without_a_lease(patch: Patch) -> None:
    """A shard that nobody has heard of for long answers all the same."""
    patch.setattr(Membership, "holds_lease", lambda self: True)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    mark_before_apply,
    duplicate_acknowledged_early,
    successor_starts_one_late,
    marks_dropped_without_a_closed_set,
    closed_set_replaced,
    block_cut_in_two,
    acknowledged_by_the_first_shard,
    only_equal_marks_are_skipped,
    bytes_made_when_sent,
    told_before_recorded,
    only_the_floor_is_taken_up,
    closed_before_the_last_answer,
    judged_at_once,
    evaluated_twice,
    leases_outlive_their_worker,
    clock_counts_what_was_sent,
    joiner_holds_nobody_back,
    restarted_minimum_ignores_the_silent,
    timeout_counts_as_acknowledged,
    steps_counted_again,
    answers_without_a_lease,
)
