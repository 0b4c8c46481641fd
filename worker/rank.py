# SPDX-License-Identifier: Apache-2.0
"""A rank at work: the groups of its splits, one a step, from wherever another host of it left off (SEMANTICS section 5).

    pull of step t + 1     its commit of step t, of which every part was acknowledged; it waits until all blocks are at step t
    push of step t + 1     its part of the step: the gradients of the samples' losses, added up
    out of data            it takes part in what is left of the epoch with commits alone

Invariant: what a rank pushes at a step depends on the rows after the step before and on the data, not on who hosts it nor when.
Reading and encoding run ahead; rows are never pulled ahead. A split is reported closed after its last step is applied everywhere,
and before the step after that is committed, so a successor has at most the split of the last step to report. One event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from oarlock.client.client import Pushing
from oarlock.client.push import PushCounts, RowGradients, reads_occurrences
from oarlock.client.stage import Behind, Commit, News
from oarlock.data.ranks import RankPlan, Unit
from oarlock.proto.coordinator_pb2 import TRAIN
from oarlock.worker.blame import Blame
from oarlock.worker.compute import Trained, train_group
from oarlock.worker.prepare import Prepared
from oarlock.worker.progress import Progress
from oarlock.worker.recipe import Example
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit

logger = logging.getLogger(__name__)

# Groups of a rank that are encoded and wait for their step.
AHEAD = 2

Opening = Callable[[int], Awaitable[OpenSplit]]


class Group(NamedTuple):
    """A group that is encoded: of which split, its number there, its keys and inputs; ``pulling``: its rows, where they come
    ahead."""

    split: OpenSplit
    number: int
    prepared: Prepared
    pulling: "asyncio.Task[None] | None" = None


class Groups:
    """The groups of ``units``, read and encoded ahead, ``ahead`` of them, while the body of its ``async with`` runs."""

    def __init__(
        self, session: Session, blame: Blame, units: Sequence[Unit | None], opening: Opening, ahead: int = AHEAD
    ) -> None:
        self._session = session
        self._blame = blame
        self._units = [unit for unit in units if unit is not None]
        self._opening = opening
        self._ready: asyncio.Queue[Group | Exception] = asyncio.Queue(ahead)
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> "Groups":
        self._task = asyncio.ensure_future(self._make())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def next(self) -> Group:
        """Wait for the next group."""
        found = await self._ready.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def _make(self) -> None:
        split: OpenSplit | None = None
        try:
            for unit in self._units:
                if split is None or split.id != unit.split:
                    split = await self._blame.of(TRAIN, unit.split, self._opening(unit.split))
                prepared = await self._blame.of(TRAIN, unit.split, self._encoded(split, unit.group))
                await self._ready.put(self._made(split, unit.group, prepared))
        except Exception as error:
            await self._ready.put(error)

    def _made(self, split: OpenSplit, number: int, prepared: Prepared) -> Group:
        return Group(split, number, prepared)

    async def _encoded(self, split: OpenSplit, group: int) -> Prepared:
        encode = self._session.workload.encode

        def examples() -> list[Example]:
            return [encode(split.batch(n), epoch=split.epoch, split=split.id, batch=n) for n in split.batches_of(group)]

        return await self._session.encode(examples, split=split.id, group=group)


class Rank:
    """Rank ``number`` of a job. ``opening(split)`` reads one of its splits, ``closing(split)`` reports it."""

    # Whether what it pushes of rows is divided by the samples of all ranks, as all of it is under sync.
    _sums_rows = True

    def __init__(
        self,
        number: int,
        session: Session,
        plan: RankPlan,
        blame: Blame,
        progress: Progress,
        news: News,
        opening: Opening,
        closing: Callable[[OpenSplit], Awaitable[None]],
    ) -> None:
        self._number = number
        self._session = session
        self._spec = spec = session.member.spec
        self._plan = plan
        self._blame = blame
        self._progress = progress
        self._news = news
        self._opening = opening
        self._closing = closing
        self._counted = {table.name for table in spec.tables if reads_occurrences(table)}

    async def train(self, epoch: int) -> None:
        """Take part in an epoch's steps until all of them are applied."""
        while True:
            state = await self._session.client.latest_step(self._number)
            try:
                await self._go_on(epoch, state)
                return
            except Behind as passed:
                logger.info("event=rank_behind rank=%d %s", self._number, passed)

    async def _go_on(self, epoch: int, state: int) -> None:
        """Train the steps of ``epoch`` that come after step ``state`` of the job, which this rank may have to commit anew."""
        begin, units = self._plan.before(epoch), self._plan.units(self._number, epoch)
        done = min(max(state - begin, 0), len(units))
        before = units[done - 1] if done else None
        coming = units[done - 1 :] if before else units[done:]
        async with self._groups(coming) as ahead:
            # What it trained at the step that is behind it says its data, not its predecessor.
            last = await ahead.next() if before else None
            ended = before is not None and before.last
            if ended and last is not None:
                await self._learn_loss(last, begin + done)
            for step in range(begin + done + 1, begin + len(units) + 2):
                unit = units[step - begin - 1] if step <= begin + len(units) else None
                group = await ahead.next() if unit else None
                await self._pull(group, step - 1, last)
                async with asyncio.TaskGroup() as tasks:
                    if ended and last is not None:
                        tasks.create_task(self._closed(last.split))
                    if group is not None:
                        tasks.create_task(self._step(group, step))
                last, ended = group, unit is not None and unit.last

    def _groups(self, units: Sequence[Unit | None]) -> Groups:
        return Groups(self._session, self._blame, units, self._opening)

    async def _closed(self, split: OpenSplit) -> None:
        await self._closing(split)

    async def _pull(self, group: Group | None, state: int, last: Group | None) -> None:
        """Commit step ``state``, and pull what ``group`` needs of the rows after it."""
        samples = 0 if last is None else last.prepared.samples
        commit = Commit(self._number, state, samples, self._news)
        begun = time.perf_counter()
        if group is None:
            await self._session.client.pull({}, {}, commit=commit)
            return
        try:
            await self._pull_with(commit, group)
        except Behind:
            raise
        except Exception as error:
            self._blame.note(TRAIN, group.split.id, error)
            raise
        self._progress.pull_seconds.observe(time.perf_counter() - begun)

    async def _pull_with(self, commit: Commit, group: Group) -> None:
        """Pull what a group needs, with a commit."""
        prepared, about = group.prepared, {"split": group.split.id, "group": group.number}
        await self._session.client.pull(
            prepared.keys, prepared.rows, dense=prepared.dense, lossless=False, about=about, commit=commit
        )

    async def _step(self, group: Group, step: int) -> None:
        """Compute a group and have every block acknowledge its part."""
        loss_sum, push = await self._computed(group, step)
        group.split.loss_sum += loss_sum
        group.split.losses += group.prepared.samples
        progress = self._progress
        progress.batches += len(group.prepared.sizes)
        progress.samples += group.prepared.samples
        begun = time.perf_counter()

        async def pushed() -> PushCounts:
            return await push

        counts = await self._blame.of(TRAIN, group.split.id, pushed())
        progress.refused += counts.refused
        progress.push_seconds.observe(time.perf_counter() - begun)

    async def _learn_loss(self, group: Group, state: int) -> None:
        """Give a split's last group a loss, on the rows as they are now: who trained it cannot be asked any more."""
        await self._pull(group, state, group)
        group.split.loss_sum, _ = await self._computed(group, state)
        group.split.losses = group.prepared.samples

    async def _computed(self, group: Group, step: int) -> tuple[float, Pushing]:
        session, about = self._session, {"split": group.split.id, "group": group.number}
        program = await session.borrow()
        try:
            with self._progress.stages.time("compute", **about):
                work = session.compute(partial(self._train, program, group, step))
                return await self._blame.of(TRAIN, group.split.id, work)
        finally:
            session.give_back(program)

    def _train(self, program: Any, group: Group, step: int) -> tuple[float, Pushing]:
        """Train a group and make the messages of its push. In a compute thread."""
        split, spec, prepared = group.split, self._spec, group.prepared
        workload = self._session.workload
        trained: Trained = train_group(
            program,
            workload.model.lookups,
            prepared,
            # One rate for all ranks: they make one step together.
            workload.rates((step - 1) / self._plan.total),
            seed=spec.seed,
            draw=split.id << 32 | split.batches_of(group.number).start,
            local=False,
            summed_rows=self._sums_rows,
            summed_dense=True,
        )
        gradients = {}
        for table, found in trained.rows.items():
            keys = prepared.keys[table]
            counted = keys.occurrences().view("uint32") if table in self._counted else None
            gradients[table] = RowGradients(keys, found, trained.rates.rows, counted)
        with self._progress.stages.time("encode_push", split=split.id, group=group.number):
            push = self._session.client.push(
                split.id,
                group.number,
                gradients,
                dense=trained.dense,
                dense_rate=trained.rates.dense,
                step=step - 1,
                rank=1 + self._number,
                seen=prepared.seen,
                feedback=split.feedback,
                last=group.number == split.groups - 1,
            )
        return trained.loss_sum, push


async def ended(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it is over, whatever it met."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait([task])
