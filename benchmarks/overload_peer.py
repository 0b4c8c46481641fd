# SPDX-License-Identifier: Apache-2.0
"""The processes of `oarlock.benchmarks.overload`: a shard with a table, and those who ask more of it than it can.

Invariant: each ends when its standard input closes, and answers every line on it with one line. A shard tells its counts; a load
runs what the line says and tells how its calls ended.
"""

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from oarlock.client.client import Client
from oarlock.client.job import JobSpec
from oarlock.client.membership import Membership
from oarlock.client.retry import Retry
from oarlock.client.router import ShardAddress, make_routes, pack_placement
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.warmup import warm_up
from oarlock.proto.arrays import Part, pack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.pending import Pending
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.shard_pb2 import AdoptRequest, PullReply, PullRequest, PushRequest, TableGradients, TableKeys
from oarlock.ps.identity import Identity
from oarlock.ps.process import SWITCH_SECONDS
from oarlock.ps.service import ShardService

DIM, BLOCKS = 64, 16
KEYS = 1 << 16
# A request has 1 MiB of rows.
ASKED = 1 << 12
INCARNATION = 100
# A call is given up after this.
CALL_SECONDS = 2.0
TABLE = TableSpec("rows", DIM, OptimizerSpec("sgd"), Initializer("zeros"), BLOCKS)
SPEC = JobSpec(
    job="00" * 16, name="overload", seed=0, recipe="none:none", tables=(TABLE,), dense=(), files=(), evaluation_files=(),
    splits=1 << 9, evaluation_splits=0, rows_per_split=1, evaluation_rows_per_split=1, batch_rows=1, epochs=1, servers=1,
    workers=1, metrics=("none",),
)  # fmt: skip


class Slowed(ShardService):
    """A shard whose pulls take so much longer."""

    seconds = 0.0

    def pull(self, request: PullRequest | Bulk) -> PullReply | Bulk | Pending:
        time.sleep(self.seconds)
        return super().pull(request)


def shard(limit: int) -> None:
    """Serve all blocks; a line is the seconds by which pulls are slowed from then on."""
    sys.setswitchinterval(SWITCH_SECONDS)
    warm_up()
    service = Slowed()
    held = service.configure(SPEC, Identity(SPEC.job_bytes, 1, 0, INCARNATION))
    server = GrpcServer(service, "Shard", listen="127.0.0.1:0", request_memory_bytes=limit)
    address = server.start()
    header = Header(protocol=PROTOCOL, job=SPEC.job_bytes, run=1, target=INCARNATION, term=1)
    owners, shards = np.zeros(BLOCKS, np.int32), {0: ShardAddress(0, address, INCARNATION)}
    service.adopt(AdoptRequest(header=header, placement=pack_placement(1, owners, shards)))
    tell(address)
    try:
        for line in sys.stdin:
            service.seconds = float(line)
            tables = sum(table.nbytes for table in held.tables)
            tell({"refused": server.memory.refused, "memory": server.memory.nbytes, "tables": tables})
    finally:
        server.stop()
        service.end()


class Caller:
    """One worker: a transport with connections of its own, and keys to ask for."""

    def __init__(self, address: str, number: int) -> None:
        self.transport = GrpcTransport()
        # No second try: how a call ended is what is counted.
        retry = Retry(CALL_SECONDS, CALL_SECONDS, CALL_SECONDS, CALL_SECONDS)
        member = Membership(self.transport, "", WORKER, rng=random.Random(number), retry=retry)
        shards = {0: ShardAddress(0, address, INCARNATION)}
        member.take_up(SPEC)
        member.run, member.incarnation = 1, number + 1
        member.routes = make_routes(member.layout, 1, np.zeros(BLOCKS, np.int32), shards)
        raw = np.random.default_rng(number).permutation(KEYS)[:ASKED].astype(np.uint64)
        self.keys = KeySorter().build(raw, table_salt("rows"), BLOCKS.bit_length() - 1, member.routes.ranks[0])
        self.member = member
        self.client = Client(member)
        self._address = address
        self._header = member.header(INCARNATION)
        self._beside: list[Part] = []
        keys, beside = self.keys, self._beside
        self._table = TableKeys(
            keys=pack(keys.keys, beside), blocks=pack(keys.blocks, beside), counts=pack(keys.counts, beside)
        )
        # Pulls are the same without the last part.
        self._pull = Bulk(PullRequest(header=self._header, tables=[self._table]), list(beside))
        gradients = pack(np.ones((ASKED, DIM), np.float32), beside)
        self._pushed = TableGradients(keys=self._table, gradients=gradients, rate=0.1)
        self._number = number
        self._calls = 0

    async def call(self) -> None:
        """Push and pull in turns, without another try; PSError."""
        self._calls += 1
        if self._calls % 2:
            # A split for each caller. Its groups may overtake each other here, and are then skipped.
            request = PushRequest(header=self._header, split=self._number, group=self._calls, tables=[self._pushed])
            sent, method = Bulk(request, self._beside), "Shard.Push"
        else:
            sent, method = self._pull, "Shard.Pull"
        await self.transport.call(self._address, method, sent, timeout_seconds=CALL_SECONDS)


async def closed(callers: list[Caller], seconds: float, ended: Counter[str]) -> None:
    """Each caller asks as soon as it was answered."""
    end = time.monotonic() + seconds

    async def one(caller: Caller) -> None:
        while time.monotonic() < end:
            await told(caller, ended)

    await asyncio.gather(*(one(c) for c in callers))


async def opened(callers: list[Caller], seconds: float, rate: float, ended: Counter[str]) -> None:
    """Calls begin at their time, whether or not those before them were answered."""
    begun, made = time.monotonic(), 0
    tasks: set[asyncio.Task[None]] = set()
    while (now := time.monotonic() - begun) < seconds:
        while made < now * rate:
            tasks.add(asyncio.create_task(told(callers[made % len(callers)], ended)))
            made += 1
        await asyncio.sleep(0.005)
        tasks = {task for task in tasks if not task.done()}
    await asyncio.gather(*tasks)


async def told(caller: Caller, ended: Counter[str]) -> None:
    """Make a call and count how it ended."""
    try:
        await caller.call()
        ended["ok"] += 1
    except PSError as error:
        ended["refused" if error.retryable else "refused_not_retryable"] += 1
        ended[type(error).__name__] += 1


async def load(first: int, count: int, addresses: list[str]) -> None:
    """Run the loads that lines ask for: {"at": which address, "seconds", "rate" (0: as it is answered)}."""
    callers = [[Caller(address, first + n) for n in range(count)] for address in addresses]
    tell("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked: dict[str, Any] = json.loads(line)
        ended: Counter[str] = Counter()
        begun = time.monotonic()
        if asked["rate"]:
            await opened(callers[asked["at"]], asked["seconds"], asked["rate"], ended)
        else:
            await closed(callers[asked["at"]], asked["seconds"], ended)
        tell({**ended, "took": time.monotonic() - begun})
    for each in callers:
        for caller in each:
            await caller.transport.close()


async def watch(slow: str, fast: str) -> None:
    """Answer lines {"pulls", "beside"}: how long pulls from ``fast`` take, with so many from ``slow`` in flight."""
    near, far = Caller(fast, 0), Caller(slow, 1)
    # One process, one transport, as a worker has it.
    far.member.transport = near.transport
    rows = [np.empty((ASKED, DIM), np.float32) for _ in range(64)]
    tell("ready")

    async def beside(into: Any, over: asyncio.Event) -> None:
        while not over.is_set():
            await far.client.pull({"rows": far.keys}, {"rows": into})

    while line := await asyncio.to_thread(sys.stdin.readline):
        asked, over = json.loads(line), asyncio.Event()
        tasks = [asyncio.create_task(beside(rows[n], over)) for n in range(asked["beside"])]
        took = []
        for _ in range(asked["pulls"]):
            begun = time.perf_counter()
            await near.client.pull({"rows": near.keys}, {"rows": rows[-1]})
            took.append(time.perf_counter() - begun)
        over.set()
        await asyncio.gather(*tasks)
        tell(took)
    await near.transport.close()
    await far.transport.close()


def tell(what: Any) -> None:
    """Print one line."""
    print(json.dumps(what), flush=True)


def main() -> int:
    """Be what the arguments say."""
    role, *arguments = sys.argv[1:]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    if role == "shard":
        shard(int(arguments[0]))
    elif role == "load":
        asyncio.run(load(int(arguments[0]), int(arguments[1]), arguments[2:]))
    else:
        asyncio.run(watch(*arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
