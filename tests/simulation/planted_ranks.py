# SPDX-License-Identifier: Apache-2.0
"""Bugs of sync, planted on purpose as in planted.py: of staging, commits, successors, updates and cuts."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.client import client, stage
from oarlock.client.stage import Commit
from oarlock.cluster import cutting
from oarlock.cluster.cutting import Cutting
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import PSError
from oarlock.ps import staged
from oarlock.ps.staged import Staged
from oarlock.worker import rank
from oarlock.worker.rank import Rank
from oarlock.worker.rank_trainer import RankTrainer

Patch = pytest.MonkeyPatch


def applied_without_the_last_rank(patch: Patch) -> None:
    """A step is applied once all ranks but one have committed it."""
    original = Staged._advance

    def advance(self: Staged) -> None:
        known = self.commits.copy()
        if self.ranks > 1:
            self.commits[known.argmin()] = np.sort(known)[1]
        try:
            original(self)
        finally:
            self.commits[:] = known

    patch.setattr(Staged, "_advance", advance)


def committed_before_acknowledged(patch: Patch) -> None:
    """A rank commits its step while its parts are on their way."""
    original = Rank._step

    async def step(self: Rank, group: Any, number: int) -> None:
        pushing = asyncio.ensure_future(original(self, group, number))
        await asyncio.wait([pushing], timeout=0.02)

    patch.setattr(Rank, "_step", step)


def added_in_order_of_arrival(patch: Patch) -> None:
    """Parts are added up as they came, and not by rank."""
    original = Staged.__init__

    def init(self: Staged, *arguments: Any) -> None:
        original(self, *arguments)
        self._parts.rows, self._parts.dense = [[]] * self.ranks, [[]] * self.ranks

    patch.setattr(Staged, "__init__", init)


def repeated_part_is_staged_again(patch: Patch) -> None:
    """A push that comes twice counts twice."""
    original = Staged.push

    def push(self: Staged, sent: Any) -> Any:
        self._parts.have[:] = False
        return original(self, sent)

    patch.setattr(Staged, "push", push)


def divided_by_the_ranks(patch: Patch) -> None:
    """Each rank counts the same, however few samples it has."""
    original = Staged._apply

    def apply(self: Staged, step: int) -> None:
        known = self.samples.copy()
        self.samples[:] = np.where(known > 0, -(-known.sum() // max(1, (known > 0).sum())), 0)
        try:
            original(self, step)
        finally:
            self.samples[:] = known

    patch.setattr(Staged, "_apply", apply)


def successor_commits_no_samples(patch: Patch) -> None:
    """A successor commits its predecessor's step anew without the samples that it trained."""
    pull, step = Rank._pull, Rank._step

    async def noted(self: Rank, group: Any, number: int) -> None:
        self.__dict__.setdefault("pushed", []).append(group)
        await step(self, group, number)

    async def pull_noted(self: Rank, group: Any, state: int, last: Any) -> None:
        known = any(last is one for one in self.__dict__.get("pushed", []))
        await pull(self, group, state, last if known else None)

    patch.setattr(Rank, "_step", noted)
    patch.setattr(Rank, "_pull", pull_noted)


def successor_believes_blocks_alone(patch: Patch) -> None:
    """A successor goes on from the step that blocks are at, whatever the rank had committed, and from the least of them."""

    async def latest_step(member: Any, routes: Any, number: int) -> int:
        found = []
        for shard in routes.shards.values():

            async def attempt(timeout: float, shard: Any = shard) -> Any:
                request = stage.RanksRequest(header=member.header(shard.incarnation))
                return await member.transport.call(shard.address, "Shard.Ranks", request, timeout_seconds=timeout)

            reply = await member.retry.run(attempt, rng=member.rng)
            unpack(reply.commits.steps, np.uint64, "commits")
            found.append(int(reply.lowest))
        return min(found)

    patch.setattr(client, "latest_step", latest_step)
    patch.setattr(Staged, "_without_rows", lambda self, state: None if self.range()[0] >= state else _waits(self))


def _waits(self: Staged) -> Any:
    lowest, highest = self.range()
    return staged.PullReply(waits=True, lowest=lowest, highest=highest, generation=self._shard.generation)


def commits_go_where_keys_are(patch: Patch) -> None:
    """A shard that a rank wants no rows of does not hear of its commit."""
    patch.setattr(Commit, "missing", lambda self, routes: [])


def waits_where_another_shard_was_not_told(patch: Patch) -> None:
    """A rank waits at one shard for a step though its word to another one was lost, and tells that when the wait is over."""
    original = Commit._tell

    async def tell(self: Commit, *arguments: Any) -> Any:
        try:
            return await original(self, *arguments)
        finally:
            self._untold.clear()

    patch.setattr(Commit, "_tell", tell)


def rows_are_answered_before_the_step(patch: Patch) -> None:
    """A pull is answered at once, with the rows of the step before."""
    patch.setattr(Staged, "_without_rows", lambda self, state: None)

    def check(self: Commit, member: Any, shard: Any, sent: Any, reply: Any) -> None:
        self._reported[shard] = reply.generation
        self._news.tell()

    patch.setattr(Commit, "_check", check)


def update_that_failed_begins_anew(patch: Patch) -> None:
    """An update that met the end of memory in its second table is made in the first one once more."""
    original = Staged.apply

    def apply(self: Staged, numbers: Any, step: int, samples: int, **named: Any) -> None:
        parts = self._parts
        before = [list(of) for of in parts.rows], [list(of) for of in parts.dense], parts.have.copy()
        try:
            original(self, numbers, step, samples, **named)
        except (PSError, MemoryError):
            parts.rows, parts.dense, parts.have = before
            self._marks.steps[numbers] = step - 1
            raise

    patch.setattr(Staged, "apply", apply)


def draws_of_the_process(patch: Patch) -> None:
    """Draws count what this process has computed, and not which batch it is."""
    original, count = rank.train_group, iter(range(1 << 30))

    def train_group(*arguments: Any, draw: int, **named: Any) -> Any:
        return original(*arguments, draw=next(count), **named)

    patch.setattr(rank, "train_group", train_group)


def split_reported_when_there_is_time(patch: Patch) -> None:
    """A rank goes on while its report of a split is on its way, and forgets it when it ends."""
    original = RankTrainer._report

    async def report(self: RankTrainer, split: Any) -> None:
        reporting = asyncio.ensure_future(original(self, split))
        self.__dict__.setdefault("reports", []).append(reporting)

    patch.setattr(RankTrainer, "_report", report)


def views_without_holding_still(patch: Patch) -> None:
    """Shards begin their views at whatever step they are."""
    patch.setattr(Staged, "hold", lambda self, cut: None)
    patch.setattr(Staged, "level", lambda self, cut, commits, at: True)


def moment_before_shards_hold_still(patch: Patch) -> None:
    """What a manifest says of splits is of before the last steps that are in its blocks."""
    original, moment_of, early = Cutting._gathered, cutting.moment_of, {}

    async def gathered(self: Cutting, gate: Any) -> None:
        early[gate.cut] = moment_of(self._c, gate.cut)
        await original(self, gate)

    patch.setattr(Cutting, "_gathered", gathered)
    patch.setattr(cutting, "moment_of", lambda c, cut: early[cut])


PLANTED: tuple[Callable[[Patch], None], ...] = (
    applied_without_the_last_rank,
    committed_before_acknowledged,
    added_in_order_of_arrival,
    repeated_part_is_staged_again,
    divided_by_the_ranks,
    successor_commits_no_samples,
    commits_go_where_keys_are,
    rows_are_answered_before_the_step,
    update_that_failed_begins_anew,
    draws_of_the_process,
    split_reported_when_there_is_time,
    views_without_holding_still,
    moment_before_shards_hold_still,
)
