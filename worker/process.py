# SPDX-License-Identifier: Apache-2.0
"""The life of a worker process: join, load the recipe, compile, train until there is no more, leave.

Invariant: it leaves in good order only after every push was acknowledged and unfinished splits were given back.
"""

import asyncio
import contextlib
import json
import logging
import random
from concurrent.futures import Executor

from oarlock.client.client import Client
from oarlock.client.job import JobSpec
from oarlock.client.membership import Membership
from oarlock.data.files import check_files, files_from_json
from oarlock.data.reader import Reader
from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.transport import Transport
from oarlock.worker.recipe import Workload, load_recipe
from oarlock.worker.session import Session
from oarlock.worker.trainer import Trainer

logger = logging.getLogger(__name__)


async def run_worker(
    transport: Transport, coordinator: str, reader: Reader, executor: Executor, *, rng: random.Random
) -> Trainer | None:
    """Take part in the coordinator's job until it needs no more work; return the trainer, if it came to that."""
    member = Membership(transport, coordinator, WORKER, rng=rng, reader=reader.name)
    spec = await member.join()
    trainer: Trainer | None = None
    try:
        async with member.kept(lambda: trainer.stats() if trainer else {}):
            # Not on the loop: footers of many files and a recipe's imports take longer than a lease.
            workload = await asyncio.get_running_loop().run_in_executor(executor, _load, spec)
            program = workload.model.bind(workload.max_samples)
            if await _placed(member):
                trainer = Trainer(Session(workload, program, Client(member), member, reader, executor))
                await trainer.run()
    except Exception as error:
        cause = _first(error)
        # Whatever it is: the coordinator counts who failed on a split, and does not wait for a lease to end.
        await member.leave(str(cause) if isinstance(cause, PSError) else f"{type(cause).__name__}: {cause}")
        raise cause from None
    logger.info("event=worker_over id=%d stats=%s", member.id, json.dumps(trainer.stats() if trainer else {}))
    await member.leave()
    return trainer


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
