# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.checkpoint_peer shard|worker`: the processes of a job that is checkpointed while it trains.

    shard    as `python -m oarlock.ps`, but the blocks that it adopts are full before it says so
    worker   as `python -m oarlock.worker`, and a line of ``--pushes`` is written for every push that was acknowledged

Invariant: beside that, nothing differs from the product's own processes. A line is PUSH: when it was sent and acknowledged by
``time.monotonic``, its split and group, and the cut that it carries, which is the last one whose gate had opened for it.
"""

import random
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import Message

from oarlock.client.entry import keep_what_is_loaded, parser, run
from oarlock.client.processors import limit_blas, step_back
from oarlock.client.telemetry import client_source, observed_as, server_source
from oarlock.data.reader import open_reader
from oarlock.embedding.content import NO_COUNTS, NO_KEYS, BlockRows
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.table import Table
from oarlock.proto.bulk import opened
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.shard_pb2 import AdoptReply, AdoptRequest, PushRequest
from oarlock.ps import warmup
from oarlock.ps.process import SWITCH_SECONDS, run_shard
from oarlock.ps.service import ShardService
from oarlock.worker.process import run_worker
from oarlock.worker.warmup import warm_up

MODULE = "oarlock.benchmarks.checkpoint_peer"
PUSH = struct.Struct("<ddqqq")


class FilledService(ShardService):
    """A shard whose tables have the rows of ``existing-TABLE.npy`` in ``data`` as soon as it has blocks."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self._data = data

    def adopt(self, request: AdoptRequest) -> AdoptReply:
        reply = super().adopt(request)
        _, shard = self._shard(request.header)
        for table in shard.tables:
            if isinstance(table, Table) and not table.rows:
                fill(table, np.load(self._data / f"existing-{table.spec.name}.npy"))
        return reply


def fill(table: Table, keys: Any) -> None:
    """Give ``table`` a row of small values for each of ``keys`` uint64[n] whose block is here."""
    spec = table.spec
    numbers = np.empty(len(keys), np.int32)
    blocks_of(keys, table.salt, spec.blocks.bit_length() - 1, numbers)
    keys = keys[np.argsort(numbers, kind="stable")]
    ends = np.cumsum(np.bincount(numbers, minlength=spec.blocks))
    most = int(np.diff(ends, prepend=0).max())
    # The same for every block: of what a block holds, only how much it is matters here.
    weights = np.random.default_rng(0).normal(0, 0.05, (most, spec.dim)).astype(np.float32)
    state = np.full((most, table.state_columns), 0.1, np.float32)
    counters = np.zeros((most, table.counters), np.uint32)

    def load(block: int) -> None:
        mine = keys[ends[block - 1] if block else 0 : ends[block]]
        n = len(mine)
        table.import_block(block, BlockRows(mine, weights[:n], state[:n], counters[:n], NO_KEYS, NO_COUNTS))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load, table.owned.tolist()))


class Noting:
    """A transport that notes when pushes were acknowledged."""

    def __init__(self, inner: GrpcTransport, out: BinaryIO) -> None:
        self._inner, self._out = inner, out

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        sent = time.monotonic()
        reply = await self._inner.call(address, method, request, timeout_seconds=timeout_seconds)
        if method == "Shard.Push":
            push: PushRequest = opened(request)[0]
            self._out.write(PUSH.pack(sent, time.monotonic(), push.split, push.group, push.header.cut))
        return reply

    async def close(self) -> None:
        await self._inner.close()


def main() -> int:
    """Run one of the two until the job is over."""
    options = parser(MODULE, __doc__.split("\n")[0])
    options.add_argument("role", choices=("shard", "worker"))
    options.add_argument("--coordinator", required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--pushes", type=Path)
    given = options.parse_args()
    return _shard(given) if given.role == "shard" else _worker(given)


def _shard(given: Any) -> int:
    transport = GrpcTransport()
    service = FilledService(given.data)
    server = GrpcServer(service, "Shard", listen="127.0.0.1:0")
    sys.setswitchinterval(SWITCH_SECONDS)

    async def body() -> None:
        with observed_as("shard", given) as telemetry:
            telemetry.registry.add(server_source(server))
            warmup.warm_up()
            address = server.start()
            try:
                rng = random.SystemRandom()
                await run_shard(transport, given.coordinator, service, address, rng=rng, telemetry=telemetry)
            finally:
                await transport.close()

    try:
        return run(body, given)
    finally:
        server.stop()
        service.end()


def _worker(given: Any) -> int:
    step_back()

    async def body() -> None:
        inner = GrpcTransport()
        with (
            observed_as("worker", given) as telemetry,
            ThreadPoolExecutor(1, thread_name_prefix="oarlock-read") as executor,
            limit_blas(1),
            given.pushes.open("wb", buffering=0) as out,
        ):
            telemetry.registry.add(client_source(inner))
            transport = Noting(inner, out)
            warm_up()
            keep_what_is_loaded()
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
