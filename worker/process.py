# SPDX-License-Identifier: Apache-2.0
"""The life of a worker process: join, load the recipe, compile, train until there is no more, leave.

A job that goes back by itself is joined anew.

Invariant: it leaves in good order only after every push was acknowledged and unfinished splits were given back; asked to leave
while the coordinator or a shard is silent, it waits for them no longer than ``LEAVE_SECONDS``, which does no more harm than
being killed.
"""

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oarlock.client.client import Client
from oarlock.client.job import JobSpec
from oarlock.client.membership import Membership
from oarlock.client.push_notes import PushNotes
from oarlock.client.signature import compute_signature
from oarlock.client.telemetry import Telemetry
from oarlock.data.files import check_files, files_from_json
from oarlock.data.reader import Reader
from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import PSError, WrongRun
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.transport import Transport
from oarlock.worker.rank_trainer import RankTrainer
from oarlock.worker.recipe import Workload, load_recipe
from oarlock.worker.session import Session
from oarlock.worker.telemetry import worker_source
from oarlock.worker.trainer import Trainer

logger = logging.getLogger(__name__)

# What a worker that was asked to leave gives those that it waits for.
JOIN_SECONDS, LEAVE_SECONDS = 2.0, 20.0


async def run_worker(
    transport: Transport,
    coordinator: str,
    reader: Reader,
    executor: Executor,
    *,
    rng: random.Random,
    leaving: asyncio.Event | None = None,
    telemetry: Telemetry | None = None,
    prepare: Callable[[JobSpec], None] | None = None,
    compute_in_threads: bool = False,
    computing: Executor | None = None,
    push_notes: Path | None = None,
) -> Trainer | None:
    """Take part in the coordinator's job until it needs no more work; return the trainer, if it came to that.

    Once ``leaving`` is set it takes no new split, pushes what it has pulled, gives back what is unfinished, and leaves.
    ``prepare`` is called with the job that was joined, before anything is computed; a job that goes back by itself is joined
    anew, run after run. Without ``compute_in_threads`` one batch at a time is computed, on the event loop: nothing then depends
    on which of two threads is faster. ``computing`` computes instead of threads of the worker's own. ``push_notes``: the folder
    where acknowledged pushes are noted.
    """
    leaving, telemetry, signature, before = leaving or asyncio.Event(), telemetry or Telemetry(), compute_signature(), 0
    while True:
        member = Membership(transport, coordinator, WORKER, rng=rng, reader=reader.name, signature=signature)
        # A Join that is under way is heard out, or the coordinator would count on a member that went.
        if not await _done_before(leaving, JOIN_SECONDS, member.join()):
            logger.info("event=worker_over joined=false")
            return None
        if leaving.is_set():
            await member.leave()
            return None
        if member.run <= before:
            raise WrongRun(f"run {before} is over, and this worker is told to join run {member.run}", run=member.run)
        before = member.run
        if prepare is not None:
            prepare(member.spec)
        if push_notes is not None:
            member.push_notes = PushNotes(push_notes, member.layout.blocks, member.incarnation).open()
        try:
            return await _take_part(
                member,
                reader,
                executor,
                leaving,
                telemetry,
                compute_in_threads=compute_in_threads,
                computing=computing,
            )
        except WrongRun as refused:
            if leaving.is_set():
                return None
            if not await member.is_in_the_next_run(refused):
                raise
            logger.info("event=run_over id=%d run=%d", member.id, member.run)


async def _take_part(
    member: Membership,
    reader: Reader,
    executor: Executor,
    leaving: asyncio.Event,
    telemetry: Telemetry,
    *,
    compute_in_threads: bool,
    computing: Executor | None,
) -> Trainer | None:
    """Take part in one run of the job, until it needs no more work; WrongRun once it is over and another one has begun."""
    spec, client = member.spec, Client(member)
    client.stages.track = telemetry.track
    trainer: Trainer | None = None
    compute_threads = spec.compute_threads if compute_in_threads or computing is not None else 1

    async def train() -> None:
        nonlocal trainer
        async with member.kept(telemetry.told(lambda: trainer.stats() if trainer else {})):
            # Not on the loop: footers of many files and a recipe's imports take longer than a lease.
            workload = await asyncio.get_running_loop().run_in_executor(executor, _load, spec)
            programs = [workload.model.bind(workload.max_samples) for _ in range(compute_threads)]
            if await _placed(member):
                with _compute_threads(compute_threads if compute_in_threads else 0) as threads:
                    session = Session(workload, programs, client, member, reader, executor, computing or threads)
                    trainer = RankTrainer(session) if spec.ranks else Trainer(session)
                    trainer.progress.stages.track = trainer.evaluation_stages.track = telemetry.track
                    await trainer.run()

    stopping = asyncio.ensure_future(_pass_on(leaving, member))
    try:
        with telemetry.of_member(member, worker_source(lambda: trainer, client.stages)):
            if not await _done_before(leaving, LEAVE_SECONDS, train()):
                logger.warning("event=worker_left_early waited_seconds=%g", LEAVE_SECONDS)
    except Exception as error:
        cause = _first(error)
        if not isinstance(cause, WrongRun):
            # Whatever it is: the coordinator counts who failed on a split, and does not wait for a lease to end.
            await member.leave(str(cause) if isinstance(cause, PSError) else f"{type(cause).__name__}: {cause}")
        raise cause from None
    finally:
        stopping.cancel()
        if member.push_notes is not None:
            member.push_notes.close()
    logger.info("event=worker_over id=%d stats=%s", member.id, json.dumps(trainer.stats() if trainer else {}))
    await member.leave()
    return trainer


@contextlib.contextmanager
def _compute_threads(number: int) -> Iterator[Executor | None]:
    """Have so many threads to compute in; None for none."""
    if not number:
        yield None
        return
    with ThreadPoolExecutor(number, thread_name_prefix="oarlock-compute") as computing:
        yield computing


async def _pass_on(leaving: asyncio.Event, member: Membership) -> None:
    await leaving.wait()
    logger.info("event=worker_leaving id=%d", member.id)
    member.stopping.set()


async def _done_before(leaving: asyncio.Event, seconds: float, work: Coroutine[Any, Any, Any]) -> bool:
    """Await ``work``; return False if it was given up, ``seconds`` after ``leaving`` was set."""

    async def late() -> None:
        await leaving.wait()
        await asyncio.sleep(seconds)

    working, giving_up = asyncio.ensure_future(work), asyncio.ensure_future(late())
    try:
        await asyncio.wait([working, giving_up], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        giving_up.cancel()
        await asyncio.gather(working, giving_up, return_exceptions=True)


def _load(spec: JobSpec) -> Workload:
    check_files(files_from_json([*spec.files, *spec.evaluation_files]))
    workload = load_recipe(spec.recipe).workload(spec)
    workload.start()
    return workload


async def _placed(member: Membership) -> bool:
    """Wait until the shards have their blocks, however long they take to join and restore; False if the job ends first."""
    while member.routes is None and not member.stopping.is_set():
        try:
            await member.newer_routes(1)
        except PSError as error:
            if error.retryable:
                # A coordinator that still answers is waited for.
                await member.call("Coordinator.Hello", HelloRequest(protocol=PROTOCOL))
                continue
            # It may have refused because the job is over; the next heartbeat tells.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.stopping.wait(), 2 * member.spec.heartbeat_seconds)
            if not member.stopping.is_set():
                raise
    return not member.stopping.is_set()


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first in a group of tasks; the others were cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
