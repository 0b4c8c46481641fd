# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.end_to_end_delayed`: a worker whose every call takes ``--delay-seconds`` longer.

Invariant: nothing but the time of calls differs from `python -m oarlock.worker`.
"""

import asyncio
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf.message import Message

from oarlock.client.entry import parser, run
from oarlock.client.processors import limit_blas
from oarlock.client.telemetry import client_source, observed_as
from oarlock.data.reader import open_reader
from oarlock.proto.rpc import GrpcTransport
from oarlock.worker.process import run_worker
from oarlock.worker.warmup import warm_up


class Delayed:
    """A transport that holds back every request for a while; requests do not wait for each other."""

    def __init__(self, inner: GrpcTransport, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        await asyncio.sleep(self._seconds)
        return await self._inner.call(address, method, request, timeout_seconds=timeout_seconds)

    async def close(self) -> None:
        await self._inner.close()


def main() -> int:
    """Run a worker until its job needs no more work."""
    options = parser("oarlock.benchmarks.end_to_end_delayed", __doc__.split("\n")[0])
    options.add_argument("--coordinator", required=True)
    options.add_argument("--delay-seconds", type=float, default=0.002)
    given = options.parse_args()

    async def body() -> None:
        inner = GrpcTransport()
        transport = Delayed(inner, given.delay_seconds)
        with (
            observed_as("worker", given) as telemetry,
            ThreadPoolExecutor(1, thread_name_prefix="oarlock-read") as executor,
            limit_blas(1),
        ):
            telemetry.registry.add(client_source(inner))
            warm_up()
            rng, reader = random.SystemRandom(), open_reader("arrow")
            try:
                await run_worker(
                    transport,
                    given.coordinator,
                    reader,
                    executor,
                    rng=rng,
                    telemetry=telemetry,
                    compute_in_threads=True,
                )
            finally:
                await transport.close()

    return run(body, given)


if __name__ == "__main__":
    sys.exit(main())
