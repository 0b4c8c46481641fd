# SPDX-License-Identifier: Apache-2.0
"""What a heartbeat costs a coordinator: a real one over gRPC, asked by a process that speaks for many shards.

Run as a module it is that process: `python -m oarlock.benchmarks.elasticity_heartbeat ADDRESS JOB SHARDS HEARTBEATS`.
"""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.embedding.spec import TableSpec
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.common_pb2 import Header
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer, GrpcTransport

JOB = "0123456789abcdef" * 2
AT_ONCE = 16
# As long as what a shard with a few tables tells.
STATS = json.dumps({f"counter_{i}": 123456789 for i in range(24)} | {"tables": {f"table_{i}": 10**6 for i in range(8)}})


def heartbeat_cost(shards: int, heartbeats: int) -> dict[str, float]:
    """Return what the coordinator's process spends on a heartbeat, in us of processor time, and how many it answered a second."""
    spec = JobSpec(
        job=JOB,
        name="heartbeats",
        seed=1,
        recipe="nowhere:recipe",
        tables=(TableSpec("user", 4, blocks=8),),
        dense=(),
        files=(),
        evaluation_files=(),
        splits=1,
        evaluation_splits=1,
        rows_per_split=10,
        evaluation_rows_per_split=10,
        batch_rows=5,
        epochs=1,
        servers=shards,
        workers=1,
        metrics=("auc",),
        lease_seconds=3000.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "state.sqlite").open()
        coordinator = Coordinator(store, spec, clock=time.monotonic, rng=random.Random(1))
        coordinator.open()
        server = GrpcServer(CoordinatorService(coordinator), "Coordinator", listen="127.0.0.1:0", threads=16)
        try:
            address = server.start()
            given = [address, JOB, str(shards)]
            cpu, seconds = [], []
            # The first one joins; joining again is paid by both others, so their difference is that of the heartbeats.
            for number in (AT_ONCE, AT_ONCE, heartbeats + AT_ONCE):
                worked = time.process_time()
                command = [sys.executable, "-P", "-m", __spec__.name, *given, str(number)]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                cpu.append(time.process_time() - worked)
                seconds.append(float(told))
        finally:
            server.stop()
            store.close()
    return {
        "heartbeat_cpu_us": round((cpu[2] - cpu[1]) / heartbeats * 1e6, 1),
        "heartbeats_answered_per_second": round((heartbeats + AT_ONCE) / seconds[2]),
    }


async def ask(address: str, job: str, shards: int, heartbeats: int) -> float:
    """Join as many shards, whose nonces are the same each time; return the seconds of their heartbeats, some at once."""
    transport = GrpcTransport()
    try:
        joined = [
            await transport.call(
                address,
                "Coordinator.Join",
                pb.JoinRequest(
                    protocol=PROTOCOL, role=pb.SHARD, address=f"s:{i + 1}", nonce=i + 1, pid=7, host="h", reader=""
                ),
                timeout_seconds=30.0,
            )
            for i in range(shards)
        ]
        left = iter(range(heartbeats))

        async def beat() -> None:
            for i in left:
                of = joined[i % shards]
                header = Header(
                    protocol=PROTOCOL, job=bytes.fromhex(job), run=of.run, term=of.term, sender=of.incarnation
                )
                request = pb.HeartbeatRequest(header=header, stats=STATS)
                await transport.call(address, "Coordinator.Heartbeat", request, timeout_seconds=30.0)

        begun = time.perf_counter()
        await asyncio.gather(*(beat() for _ in range(AT_ONCE)))
        return time.perf_counter() - begun
    finally:
        await transport.close()


if __name__ == "__main__":
    print(asyncio.run(ask(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
