# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.worker`: one worker. SIGTERM has it leave in good order."""

import asyncio
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

from oarlock.client.entry import parser, run
from oarlock.client.telemetry import client_source, observed_as
from oarlock.data.reader import KINDS, open_reader
from oarlock.proto.rpc import GrpcTransport
from oarlock.worker.process import run_worker
from oarlock.worker.warmup import warm_up


def main() -> int:
    """Run a worker until its job needs no more work."""
    options = parser("oarlock.worker", "A worker: trains what the coordinator leases to it.")
    options.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    options.add_argument("--reader", default="auto", choices=KINDS)
    options.add_argument("--blas-threads", type=int, default=1, help="threads of a matrix product")
    given = options.parse_args()
    transport = GrpcTransport()

    async def body() -> None:
        leaving = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)
        with (
            observed_as("worker", given) as telemetry,
            ThreadPoolExecutor(1, thread_name_prefix="oarlock-read") as executor,
            threadpool_limits(given.blas_threads),
        ):
            telemetry.registry.add(client_source(transport))
            warm_up()
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
                )
            finally:
                await transport.close()

    return run(body, given)


if __name__ == "__main__":
    sys.exit(main())
