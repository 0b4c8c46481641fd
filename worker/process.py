# SPDX-License-Identifier: Apache-2.0
"""The life of a worker process: join, load the recipe, compile, train until there is no more, leave.

Invariant: it leaves in good order only after every push was acknowledged and unfinished splits were given back.
"""

import asyncio
import json
import logging
import random
from concurrent.futures import Executor

from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.data.files import check_files, files_from_json
from oarlock.data.reader import Reader
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import PSError
from oarlock.proto.transport import Transport
from oarlock.worker.recipe import load_recipe
from oarlock.worker.trainer import Trainer

logger = logging.getLogger(__name__)


async def run_worker(
    transport: Transport, coordinator: str, reader: Reader, executor: Executor, *, rng: random.Random
) -> Trainer:
    """Take part in the coordinator's job until it needs no more work; return the trainer for its counts."""
    member = Membership(transport, coordinator, WORKER, rng=rng, reader=reader.name)
    spec = await member.join()
    trainer: Trainer | None = None
    loop = asyncio.get_running_loop()
    try:
        async with member.kept(lambda: trainer.stats() if trainer else {}):
            check_files(files_from_json([*spec.files, *spec.evaluation_files]))
            workload = load_recipe(spec.recipe).workload(spec)
            await loop.run_in_executor(executor, workload.start)
            program = workload.model.bind(workload.max_samples)
            await member.newer_routes(1)
            trainer = Trainer(workload, program, Client(member), member, reader, executor)
            await trainer.run()
    except (PSError, BaseExceptionGroup) as error:
        cause = _first(error)
        if isinstance(cause, PSError):
            await member.leave(str(cause))
        raise cause from None
    logger.info("event=worker_over id=%d stats=%s", member.id, json.dumps(trainer.stats()))
    await member.leave()
    return trainer


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first in a group of tasks; the others were cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
