# SPDX-License-Identifier: Apache-2.0
"""The pipeline of training: while group n computes, group n + 1 is encoded and pulled, and n - 1 is pushed.

Invariant: at most ``prefetch`` groups, and one for each further compute thread, are between the pull and the push, one more is
encoded, and at most twice ``open_splits`` pushes are in flight; a split's group is pushed only after the one before it was
acknowledged by every block. One event loop; encoding runs in the session's thread, computing in its compute threads.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

from oarlock.client.client import Pushing
from oarlock.client.push import RowGradients, reads_occurrences
from oarlock.nn import Program
from oarlock.proto.coordinator_pb2 import TRAIN
from oarlock.worker.blame import Blame
from oarlock.worker.clock import WorkerClock
from oarlock.worker.compute import train_group
from oarlock.worker.prepare import Prepared
from oarlock.worker.progress import Progress
from oarlock.worker.recipe import Example
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit

# Turns of the event loop until a push is with the transport: its own task's, and that of the task for each shard.
HAND_OVER_TURNS = 2

T = TypeVar("T")
# Set once the group before this one of a split has been encoded, and once this one has.
Turns = tuple[asyncio.Event | None, asyncio.Event]


class Group(NamedTuple):
    """A group on its way: of which split, its number there, its turn among all groups of this worker."""

    split: OpenSplit
    number: int
    turn: int


class Pipeline:
    """Takes groups in and hands them on from stage to stage; ``closing(split)`` is started after a split's last group."""

    def __init__(
        self,
        session: Session,
        clock: WorkerClock,
        blame: Blame,
        progress: Progress,
        closing: Callable[[OpenSplit], Coroutine[Any, Any, None]],
    ) -> None:
        self._session = session
        self._workload = session.workload
        self._spec = spec = session.member.spec
        self._clock = clock
        self._blame = blame
        self._progress = progress
        self._closing = closing
        self._counted = {table.name for table in spec.tables if reads_occurrences(table)}
        # Groups between the lease and the push, and those of them whose rows are pulled: one more is encoded.
        pulled = spec.prefetch + spec.compute_threads - 1
        self._depth = asyncio.Semaphore(pulled + 1)
        self._pulled = asyncio.Semaphore(pulled)
        self._fetched: asyncio.Queue[tuple[Group, asyncio.Task[Prepared]] | None] = asyncio.Queue()
        # Splits of few groups would otherwise pile up behind a slow shard: only pushes of one split wait for each other.
        self._in_flight = asyncio.Semaphore(2 * spec.open_splits)

    async def _charged(self, split: OpenSplit, work: Callable[[], Awaitable[T]]) -> T:
        """Return what ``work`` gives; an error of it is the split's."""
        return await self._blame.of(TRAIN, split.id, work())

    # First half: encoded and pulled

    async def take_in(self, tasks: asyncio.TaskGroup, split: OpenSplit) -> None:
        """Schedule a split's next group, once there is room."""
        await self._depth.acquire()
        group = Group(split, split.scheduled, self._clock.number())
        split.scheduled += 1
        fetching = tasks.create_task(self._charged(split, partial(self._fetch, group)))
        await self._fetched.put((group, fetching))

    async def end(self) -> None:
        """Say that no group follows."""
        await self._fetched.put(None)

    async def _fetch(self, group: Group) -> Prepared:
        """Encoding runs ahead; the pull waits for its turn, so that what is computed on is no older than it has to be."""
        split = group.split

        def encode() -> list[Example]:
            return [
                self._workload.encode(split.batch(n), epoch=split.epoch, split=split.id, batch=n)
                for n in split.batches_of(group.number)
            ]

        about = {"split": split.id, "group": group.number}
        prepared = await self._session.encode(encode, **about)
        await self._pulled.acquire()
        await self._clock.may_pull(group.turn)
        prepared.probe = self._session.probing.probe(group.turn)
        begun = time.perf_counter()
        number = self._clock.on_wire(group.turn)
        await self._session.pull(prepared, number, lossless=False, cached=True, dense=True, **about)
        self._progress.pull_seconds.observe(time.perf_counter() - begun)
        return prepared

    # Second half: computed and pushed

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Compute and push what was taken in, until no group follows."""
        while (fetched := await self._fetched.get()) is not None:
            group, fetching = fetched
            program = await self._session.borrow()
            with self._progress.stages.time("wait_for_pull", split=group.split.id, group=group.number):
                prepared = await fetching
            # Groups of a split are pushed in their order, whoever has computed first.
            split = group.split
            before, split.pushed = split.pushed, asyncio.Event()
            encoding = None
            if split.feedback is not None:
                encoding = split.encoded, asyncio.Event()
                split.encoded = encoding[1]
            training = partial(self._train, tasks, group, prepared, program, before, split.pushed, encoding)
            tasks.create_task(self._charged(split, training))
            if group.number == group.split.groups - 1:
                tasks.create_task(self._closing(group.split))
            # Everything above may have been at hand: let what was begun get under way.
            await asyncio.sleep(0)

    async def _train(
        self,
        tasks: asyncio.TaskGroup,
        group: Group,
        prepared: Prepared,
        program: Program,
        before: asyncio.Event | None,
        acknowledged: asyncio.Event,
        encoding: Turns | None,
    ) -> None:
        split, progress = group.split, self._progress
        # Groups that compute at once were taken up one after the other, and none of them has another one's step.
        step = progress.step()
        progress.begins(split.id)
        # What the groups before it left out goes along, so they come first; they have their programs already.
        waits = encoding is not None and encoding[0] is not None and not encoding[0].is_set()
        try:
            with progress.stages.time("compute", split=split.id, group=group.number):
                if not waits:
                    loss_sum, push = await self._session.compute(
                        partial(self._computed, program, group, prepared, step)
                    )
                else:
                    computing = partial(self._trained, program, group, prepared, step)
                    loss_sum, encode = await self._session.compute(computing)
            if encoding is not None:
                if encoding[0] is not None and waits:
                    await encoding[0].wait()
                    push = await self._session.compute(encode)
                encoding[1].set()
        finally:
            self._session.give_back(program)
        if prepared.probe is not None:
            self._session.probing.learn(prepared.probe, prepared.excess)
        split.loss_sum += loss_sum
        split.losses += prepared.samples
        progress.batches += len(prepared.sizes)
        progress.samples += prepared.samples
        with progress.stages.time("wait_for_push", split=split.id, group=group.number):
            if before is not None:
                await before.wait()
            await self._in_flight.acquire()
        pushing = tasks.create_task(self._push(group, push, acknowledged))
        # Nobody's pull overtakes it, or what a worker that is alone computes would depend on how long encoding took.
        for _ in range(HAND_OVER_TURNS):
            await asyncio.sleep(0)
        self._depth.release()
        self._pulled.release()
        await pushing

    def _computed(self, program: Program, group: Group, prepared: Prepared, step: int) -> tuple[float, Pushing]:
        """Train a group and make the messages of its push. In a compute thread."""
        loss_sum, encode = self._trained(program, group, prepared, step)
        return loss_sum, encode()

    def _trained(
        self, program: Program, group: Group, prepared: Prepared, step: int
    ) -> tuple[float, Callable[[], Pushing]]:
        """Train a group; return its loss and what makes the messages, as long as nobody else has the program."""
        split, spec = group.split, self._spec
        done = (split.id + group.number / split.groups) / (spec.splits * spec.epochs)
        # A number of each batch alone, the same when another worker trains it again.
        draw = split.id << 32 | split.batches_of(group.number).start
        if prepared.probe is not None:
            prepared.excess = self._session.probing.excess(program, prepared)
        trained = train_group(
            program,
            self._workload.model.lookups,
            prepared,
            self._workload.rates(done),
            seed=spec.seed,
            draw=draw,
            local=spec.mode == "geo",
        )
        gradients = {}
        for table, found in trained.rows.items():
            keys = prepared.keys[table]
            counted = keys.occurrences().view("uint32") if table in self._counted else None
            gradients[table] = RowGradients(keys, found, trained.rates.rows, counted)

        def encode() -> Pushing:
            with self._progress.stages.time("encode_push", split=split.id, group=group.number):
                return self._session.client.push(
                    split.id,
                    group.number,
                    gradients,
                    dense=trained.dense,
                    dense_rate=trained.rates.dense,
                    step=step,
                    number=self._clock.on_wire(group.turn),
                    seen=prepared.seen,
                    feedback=split.feedback,
                    last=group.number == split.groups - 1,
                )

        return trained.loss_sum, encode

    async def _push(self, group: Group, push: Pushing, acknowledged: asyncio.Event) -> None:
        begun = time.perf_counter()
        try:
            # For a cut it may be shut.
            async with self._session.member.gate.passed():
                counts = await push
        except Exception as error:
            self._blame.note(TRAIN, group.split.id, error)
            raise
        finally:
            self._in_flight.release()
        self._progress.push_seconds.observe(time.perf_counter() - begun)
        self._progress.refused += counts.refused
        self._clock.acknowledged(group.turn)
        acknowledged.set()
