# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.worker`: one worker. SIGTERM has it leave in good order."""

import asyncio
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from oarlock.client.entry import keep_what_is_loaded, parser, run
from oarlock.client.job import JobSpec
from oarlock.client.processors import announce, limit_blas, step_back
from oarlock.client.security import security_of
from oarlock.client.telemetry import client_source, observed_as
from oarlock.data.reader import KINDS, open_reader
from oarlock.proto.errors import PSError
from oarlock.proto.rpc import GrpcTransport
from oarlock.worker.process import run_worker
from oarlock.worker.warmup import warm_up

# A thread that has computed, or received, waits at most so long for another one to hand the interpreter on; by default it is
# 5 ms, longer than a pull takes.
SWITCH_SECONDS = 0.0002


def main() -> int:
    """Run a worker until its job needs no more work."""
    options = parser("oarlock.worker", "A worker: trains what the coordinator leases to it.")
    options.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    options.add_argument("--reader", default="auto", choices=KINDS)
    options.add_argument("--push-notes", type=Path, metavar="DIR", help="note there when each push was acknowledged")
    given = options.parse_args()
    try:
        security = security_of(given, own=True)
    except PSError as error:
        options.error(str(error))
    transport = GrpcTransport(security=security)

    def prepare(spec: JobSpec) -> None:
        # The job's, not the process's: threads of a product decide in which order its sums are made.
        limit_blas(spec.blas_threads)
        announce("worker", pinned=bool(given.pin_cores), compute_threads=spec.compute_threads)

    sys.setswitchinterval(SWITCH_SECONDS)
    step_back()

    async def body() -> None:
        leaving = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)
        with (
            observed_as("worker", given, security) as telemetry,
            ThreadPoolExecutor(1, thread_name_prefix="oarlock-read") as executor,
        ):
            telemetry.registry.add(client_source(transport))
            warm_up()
            keep_what_is_loaded()
            reader = open_reader(given.reader)
            try:
                await run_worker(
                    transport,
                    given.coordinator,
                    reader,
                    executor,
                    rng=random.SystemRandom(),
                    leaving=leaving,
                    telemetry=telemetry,
                    prepare=prepare,
                    compute_in_threads=True,
                    push_notes=given.push_notes,
                )
            finally:
                await transport.close()

    return run(body, given)


if __name__ == "__main__":
    sys.exit(main())
