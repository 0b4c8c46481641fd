# SPDX-License-Identifier: Apache-2.0
"""A whole job in one process: the coordinator and shards on one event loop, each worker on a thread with its own.

Invariant: the same classes as in processes, over the in-process transport; no thread is left behind.
"""

import asyncio
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oarlock.checkpoint.place import place_of
from oarlock.client.autoscale import Autoscale
from oarlock.client.job import OVER, JobSpec
from oarlock.client.processors import Cores, allowed_cores, announce, limit_blas, on_cores
from oarlock.client.telemetry import Telemetry, observed
from oarlock.client.trace import recorded
from oarlock.cluster.beginning import begin
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.cluster.telemetry import coordinator_source
from oarlock.data.reader import open_reader
from oarlock.launch.folder import STATE_FILE
from oarlock.launch.kernels import compile_or_load
from oarlock.launch.processors import Processors
from oarlock.proto.errors import InvalidArgument, PSError
from oarlock.proto.security import Security
from oarlock.proto.transport import InProcess
from oarlock.ps.process import run_shard
from oarlock.ps.service import ShardService
from oarlock.worker.process import run_worker

logger = logging.getLogger(__name__)

COORDINATOR = "in-process:coordinator"

# Shards that read or write their blocks at a time.
MOST_WRITERS = 8


def refuse_scaler(autoscale: Autoscale) -> None:
    """Raise InvalidArgument for a job with a scaler: it would wait for members that nobody starts."""
    if autoscale:
        raise InvalidArgument(
            "a job in one process keeps the shards and workers that it begins with: leave out --in-process, or the table "
            "[autoscale] of the job file"
        )


def run_in_process(
    spec: JobSpec,
    folder: Path,
    *,
    restore: str = "",
    accept_signature: bool = False,
    watch: Callable[[dict[str, Any]], bool],
    watch_seconds: float = 0.2,
    metrics_port: int | None = None,
    processors: Processors | None = None,
    trace: Path | None = None,
    security: Security | None = None,
) -> dict[str, Any]:
    """Run the job to its end; return the coordinator's last status.

    ``watch(status)`` is called every ``watch_seconds``; once it returns False the job is asked to stop with a checkpoint.
    ``trace``: the file that the job is recorded into, its members as if they were processes.
    Nothing is pulled ahead, whatever ``spec.prefetch`` says: there is no wire to wait for, and older rows would train worse.
    The event loop runs on the cores that ``processors`` has for all shards, a worker's threads on the worker's.
    """
    refuse_scaler(spec.autoscale)
    processors = processors or Processors()
    spec = dataclasses.replace(spec, prefetch=1)
    # No thread compiles while others have leases to keep.
    compile_or_load()
    store = Store(folder / STATE_FILE).open()
    try:
        coordinator = Coordinator(store, spec, clock=time.monotonic, rng=random.SystemRandom())
        coordinator.open()
        begin(coordinator, restore, place_of(spec).open(folder), accept_signature=accept_signature)
        with (
            ThreadPoolExecutor(min(spec.servers, MOST_WRITERS), thread_name_prefix="oarlock-blocks") as executor,
            observed("job", metrics_port, trace=trace, security=security) as telemetry,
            limit_blas(spec.blas_threads),
        ):
            transport = InProcess(executor)
            if telemetry.track is not None:
                telemetry.track.name = "coordinator"
            transport.serve(recorded(CoordinatorService(coordinator), telemetry.track), COORDINATOR)
            coordinator.metrics_address = telemetry.address
            announce(
                "job",
                pinned=any((*processors.servers, *processors.workers)),
                compute_threads=spec.compute_threads,
            )
            anywhere = allowed_cores()
            with on_cores(processors.server_cores):
                return asyncio.run(
                    _run(coordinator, transport, folder, telemetry, watch, watch_seconds, processors, anywhere)
                )
    finally:
        store.close()


async def _run(
    coordinator: Coordinator,
    transport: InProcess,
    folder: Path,
    telemetry: Telemetry,
    watch: Callable[[dict[str, Any]], bool],
    watch_seconds: float,
    processors: Processors,
    anywhere: Cores,
) -> dict[str, Any]:
    spec = coordinator.spec
    failures: list[str] = []
    services: list[ShardService] = []

    def work(number: int) -> None:
        mine = telemetry.beside("worker")
        # The thread is made by the event loop's, whose cores it would inherit.
        cores = processors.of("worker", number) or anywhere
        with ThreadPoolExecutor(1, thread_name_prefix=f"oarlock-read-{number}") as executor, on_cores(cores):
            try:
                reader = open_reader(spec.reader)
                rng = random.SystemRandom()
                asyncio.run(
                    run_worker(
                        transport,
                        COORDINATOR,
                        reader,
                        executor,
                        rng=rng,
                        telemetry=mine,
                        compute_in_threads=spec.compute_threads > 1,
                    )
                )
            except PSError as error:
                failures.append(str(error))
            except BaseException as error:
                logger.exception("event=worker_failed number=%d", number)
                failures.append(f"{type(error).__name__}: {error}")

    async def shard(service: ShardService, address: str, mine: Telemetry) -> None:
        try:
            rng = random.SystemRandom()
            await run_shard(transport, COORDINATOR, service, address, rng=rng, telemetry=mine)
        except PSError:
            # A job that was stopped before it began takes nobody in.
            if coordinator.phase not in OVER:
                raise

    threads = [threading.Thread(target=work, args=(n,), name=f"oarlock-worker-{n}") for n in range(spec.workers)]
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(spec.servers):
                service, address = ShardService(spill_folder=folder), f"in-process:shard-{number}"
                services.append(service)
                mine = telemetry.beside("shard")
                transport.serve(recorded(service, mine.track), address)
                group.create_task(shard(service, address, mine))
            orders = Orders(coordinator, transport, folder / "checkpoints")
            telemetry.registry.add(coordinator_source(coordinator, orders))
            group.create_task(run_coordinator(coordinator, orders, telemetry.track))
            for thread in threads:
                thread.start()
            while coordinator.phase not in OVER:
                if failures:
                    coordinator.fail(f"a worker failed: {failures[0]}")
                elif not watch(coordinator.status()) and coordinator.stop_wanted is None:
                    coordinator.stop(True, "interrupted")
                await asyncio.sleep(watch_seconds)
            await _joined(threads)
    except BaseExceptionGroup as group_error:
        raise _first(group_error) from None
    finally:
        # Whatever went wrong, the workers hear that it is over, and none is left behind.
        coordinator.abandon("the job was ended by an error")
        await _joined(threads)
        for service in services:
            service.end()
    return coordinator.status()


async def _joined(threads: list[threading.Thread]) -> None:
    while any(thread.is_alive() for thread in threads):
        await asyncio.sleep(0.01)


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first in a group of tasks; the others were cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
