# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.end_to_end_inprocess`: a shard and its workers as threads of one process.

As `launch/inprocess.py` has it, except that the coordinator is the benchmark's, which opens the windows: questions for splits and
their closing travel, pulls and pushes do not. Invariant: what is sent to this process's own shard is a function call.
"""

import asyncio
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from oarlock.benchmarks.end_to_end_fill import fill
from oarlock.client.entry import parser, run
from oarlock.client.processors import limit_blas
from oarlock.client.telemetry import Telemetry, observed_as
from oarlock.data.reader import open_reader
from oarlock.launch.kernels import compile_or_load
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.transport import InProcess
from oarlock.ps.process import run_shard
from oarlock.ps.service import ShardService
from oarlock.worker.process import run_worker


class Near:
    """A transport that calls this process's handlers directly and everybody else over the wire."""

    def __init__(self, here: InProcess, address: str) -> None:
        self._here, self._address = here, address
        self._wire = GrpcTransport()

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        way = self._here if address == self._address else self._wire
        return await way.call(address, method, request, timeout_seconds=timeout_seconds)

    async def close(self) -> None:
        await self._wire.close()


def main() -> int:
    """Serve and train until the parent is gone."""
    options = parser("oarlock.benchmarks.end_to_end_inprocess", __doc__.split("\n")[0])
    options.add_argument("--coordinator", required=True)
    options.add_argument("--data", type=Path, required=True)
    given = options.parse_args()
    service, here = ShardService(), InProcess()
    # The coordinator's orders to the shard come over the wire.
    server = GrpcServer(service, "Shard", listen="127.0.0.1:0")

    def work(address: str, telemetry: Telemetry) -> None:
        async def body() -> None:
            transport = Near(here, address)
            rng = random.SystemRandom()
            with ThreadPoolExecutor(1, thread_name_prefix="oarlock-read") as executor:
                try:
                    reader = open_reader("arrow")
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

        asyncio.run(body())

    async def body() -> None:
        with observed_as("job", given) as telemetry, limit_blas(1):
            compile_or_load()
            address = here.serve(service, server.start())
            transport = Near(here, address)
            rng = random.SystemRandom()
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    run_shard(transport, given.coordinator, service, address, rng=rng, telemetry=telemetry)
                )
                await fill(transport, given.coordinator, given.data)
                # A daemon: the process ends with its parent, whatever it waits for.
                threading.Thread(target=work, args=(address, telemetry), daemon=True).start()

    try:
        return run(body, given)
    finally:
        server.stop()
        service.end()


if __name__ == "__main__":
    sys.exit(main())
