# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.wire [--json] [--quick]`: what the wire makes of what the sockets can move.

Alternating 4 MiB pulls and pushes, four in flight, through `Client` and frames (or gRPC alone) to a process whose table work
is one copy; beside it four threads on raw sockets with the same sizes, number in flight and copies to and from numpy. Each over
TCP and over a unix socket, in turns; GB/s count rows alone, not keys, and the better of both is what is compared. Then the round
trip of a small call. The last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.wire")

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from oarlock.benchmarks.peer import PeerProcess
from oarlock.benchmarks.wire_peer import DIM, FLIGHT, HEAD, KEYS, PING, PULL, PUSH, prepare, receive, send, view
from oarlock.client.client import Client
from oarlock.client.job import JobSpec
from oarlock.client.membership import Membership
from oarlock.client.push import RowGradients
from oarlock.client.router import ShardAddress, make_routes
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.spec import Initializer, OptimizerSpec, TableSpec
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.sockets import ABSTRACT
from oarlock.proto.shard_pb2 import PushRequest

ROW_BYTES = KEYS * DIM * 4
BLOCKS = 16
# Runs the exchanges of a window: this many pulls, and as many pushes, on each of the FLIGHT ways.
Window = Callable[[int], Awaitable[None]]


class Peer(PeerProcess):
    """The other process: a gRPC server with frames, and raw sockets."""

    def __init__(self) -> None:
        super().__init__("oarlock.benchmarks.wire_peer")
        self.address, self.tcp_port, self.unix_name = self.started

    def connect(self, *, unix: bool) -> socket.socket:
        """Return a raw connection."""
        if unix:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.unix_name.encode("latin-1"))
        else:
            connection = socket.create_connection(("127.0.0.1", self.tcp_port))
        prepare(connection)
        return connection


class OneKind(GrpcTransport):
    """Frames on sockets of one kind alone."""

    def __init__(self, *, unix: bool) -> None:
        super().__init__()
        self._unix = unix

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
        if method == "Wire.Sockets":
            kept = [a for a in reply.addresses if a.startswith(ABSTRACT) == self._unix]
            del reply.addresses[:]
            reply.addresses.extend(kept)
        return reply


class Ours:
    """Pulls and pushes through a Client, whose placement names the peer as the only shard."""

    def __init__(self, transport: GrpcTransport, address: str) -> None:
        self._transport = transport
        self._address = address
        table = TableSpec("rows", DIM, OptimizerSpec("sgd"), Initializer("zeros"), BLOCKS)
        member = Membership(transport, "", WORKER, rng=random.Random(0))
        spec = JobSpec(
            job="00" * 16, name="wire", seed=0, recipe="none:none", tables=(table,), dense=(), files=(), evaluation_files=(),
            splits=1, evaluation_splits=0, rows_per_split=1, evaluation_rows_per_split=1, batch_rows=1, epochs=1, servers=1,
            workers=1, metrics=("none",),
        )  # fmt: skip
        member.take_up(spec)
        shard = ShardAddress(0, address, 1)
        member.routes = make_routes(member.layout, 1, np.zeros(BLOCKS, np.int32), {0: shard})
        bits = BLOCKS.bit_length() - 1
        raw = np.random.default_rng(0).permutation(KEYS).astype(np.uint64)
        self._keys = KeySorter().build(raw, table_salt("rows"), bits, member.routes.ranks[0])
        self._client = Client(member)
        self._rows = [np.zeros((KEYS, DIM), np.float32) for _ in range(FLIGHT)]
        self._gradients = [np.ones((KEYS, DIM), np.float32) for _ in range(FLIGHT)]

    async def window(self, times: int) -> None:
        """Move ``times`` pulls and as many pushes on each way."""

        async def way(number: int) -> None:
            rows, gradients = self._rows[number], RowGradients(self._keys, self._gradients[number], 0.1)
            for i in range(times):
                await self._client.pull({"rows": self._keys}, {"rows": rows})
                counts = await self._client.push(number, i, {"rows": gradients})
                assert counts.applied == 1, "the peer answers how many tables came"

        await asyncio.gather(*(way(n) for n in range(FLIGHT)))
        assert all(rows[-1, -1] == 1 for rows in self._rows), "the rows that were pushed are those that come"

    async def ping(self) -> None:
        """Make one small call."""
        await self._transport.call(self._address, "Shard.Push", PushRequest(split=1), timeout_seconds=20.0)

    async def close(self) -> None:
        await self._transport.close()


class Raw:
    """The same by four blocking sockets and a thread for each."""

    def __init__(self, peer: Peer, *, unix: bool) -> None:
        self._connections = [peer.connect(unix=unix) for _ in range(FLIGHT)]
        self._keys = np.arange(KEYS, dtype=np.uint64)
        self._rows = [np.zeros((KEYS, DIM), np.float32) for _ in range(FLIGHT)]
        self._gradients = [np.ones((KEYS, DIM), np.float32) for _ in range(FLIGHT)]
        self._buffers = [np.zeros((KEYS, DIM), np.float32) for _ in range(FLIGHT)]

    def _way(self, number: int, times: int) -> None:
        connection, rows, buffer = self._connections[number], self._rows[number], self._buffers[number]
        head = memoryview(bytearray(HEAD.size))
        for _ in range(times):
            send(connection, memoryview(HEAD.pack(PULL, KEYS)), view(self._keys))
            receive(connection, head)
            receive(connection, view(buffer))
            np.copyto(rows, buffer)
            np.copyto(buffer, self._gradients[number])
            send(connection, memoryview(HEAD.pack(PUSH, KEYS)), view(self._keys), view(buffer))
            receive(connection, head)

    async def window(self, times: int) -> None:
        """As Ours.window."""
        threads = [threading.Thread(target=self._way, args=(n, times)) for n in range(FLIGHT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(rows[-1, -1] == 1 for rows in self._rows), "the rows that were pushed are those that come"

    async def ping(self) -> None:
        """As Ours.ping."""
        send(self._connections[0], memoryview(HEAD.pack(PING, 8)), view(self._keys[:8]))
        receive(self._connections[0], memoryview(bytearray(HEAD.size)))

    async def close(self) -> None:
        for connection in self._connections:
            connection.close()


class Figures:
    """Of one side, a number for each window."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.client: list[float] = []
        self.server: list[float] = []
        self.calls: list[float] = []

    def report(self) -> dict[str, float]:
        return {
            "gb_per_second": round(statistics.median(self.speeds), 3),
            "client_cpu_seconds_per_gb": round(statistics.median(self.client), 3),
            "server_cpu_seconds_per_gb": round(statistics.median(self.server), 3),
            "call_us": round(statistics.median(self.calls), 1),
        }


async def turn(side: Ours | Raw, times: int, calls: int, peer: Peer, figures: Figures) -> None:
    """Measure one window of a side, and some small calls one after the other."""
    # The others had the processor's caches.
    await side.window(1)
    gigabytes = 2 * times * FLIGHT * ROW_BYTES / 1e9
    server, client, begun = peer.processor_seconds(), time.process_time(), time.perf_counter()
    await side.window(times)
    figures.speeds.append(gigabytes / (time.perf_counter() - begun))
    figures.client.append((time.process_time() - client) / gigabytes)
    figures.server.append((peer.processor_seconds() - server) / gigabytes)
    for _ in range(calls):
        begun = time.perf_counter()
        await side.ping()
        figures.calls.append((time.perf_counter() - begun) * 1e6)


async def measure(turns: int, times: int, calls: int, most_seconds: float) -> dict[str, dict[str, float]]:
    """Return the figures by side."""
    peer = Peer()
    sides: dict[str, Ours | Raw] = {
        "frames unix": Ours(OneKind(unix=True), peer.address),
        "raw unix": Raw(peer, unix=True),
        "frames TCP": Ours(OneKind(unix=False), peer.address),
        "raw TCP": Raw(peer, unix=False),
        "gRPC": Ours(GrpcTransport(frames=False), peer.address),
    }
    found = {name: Figures() for name in sides}
    begun = time.monotonic()
    try:
        for number in range(turns):
            for name, side in sides.items():
                # gRPC is slow enough to be seen in fewer.
                await turn(side, max(1, times // 4) if name == "gRPC" else times, calls, peer, found[name])
            if number and time.monotonic() - begun > most_seconds:
                break
    finally:
        for side in sides.values():
            await side.close()
        peer.close()
    return {name: figures.report() for name, figures in found.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.wire", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio", "protobuf"))
    turns, times, calls = (1, 1, 2) if options.tiny else (15, 12, 40) if options.quick else (40, 25, 100)
    sides = asyncio.run(measure(turns, times, calls, 25.0 if options.quick else 240.0))
    if not options.json:
        for name, figures in sides.items():
            print(f"{name:12} " + "  ".join(f"{k} {v:9.3f}" for k, v in figures.items()), file=sys.stderr)
    ours = max(sides[f"frames {kind}"]["gb_per_second"] for kind in ("unix", "TCP"))
    raw = max(sides[f"raw {kind}"]["gb_per_second"] for kind in ("unix", "TCP"))
    result = {
        "benchmark": "wire",
        "bulk_vs_tcp": round(ours / raw, 3),
        "grpc_vs_tcp": round(sides["gRPC"]["gb_per_second"] / raw, 3),
        "call_us": min(sides[f"frames {kind}"]["call_us"] for kind in ("unix", "TCP")),
        "tcp_us": min(sides[f"raw {kind}"]["call_us"] for kind in ("unix", "TCP")),
        "sides": sides,
        "surroundings": before,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
