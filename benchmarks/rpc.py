# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.rpc [--json] [--quick]`: what a round trip of a pull and of a push costs.

Single calls, streams (proto/rpc/lane.py) and a bare TCP connection with the same number of bytes; microseconds, and processor
microseconds on both sides. One call at a time, in turns, medians. The last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.rpc")

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from oarlock.benchmarks.peer import PeerProcess
from oarlock.benchmarks.rpc_peer import ROW, receive
from oarlock.proto.arrays import pack
from oarlock.proto.methods import METHODS
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.shard_pb2 import PullRequest, PushRequest, TableGradients, TableKeys

PAYLOADS = {"20 kB": 20_000, "200 kB": 200_000, "1 MB": 1_000_000}
Call = Callable[[], Awaitable[None]]


def keys_of(rows: int) -> TableKeys:
    """Return the keys of a message, in 16 blocks as a small table has them."""
    keys = np.arange(rows, dtype=np.uint64)
    blocks = np.arange(16, dtype=np.int32)
    counts = np.full(16, rows // 16, np.int32)
    counts[0] += rows % 16
    return TableKeys(table=0, keys=pack(keys), blocks=pack(blocks), counts=pack(counts))


@contextmanager
def single_calls() -> Iterator[None]:
    """Have pulls and pushes travel call by call, not on streams, within the body."""
    names = ("Shard.Pull", "Shard.Push")
    before = {name: METHODS[name] for name in names}
    METHODS.update({name: replace(before[name], frame=0) for name in names})
    try:
        yield
    finally:
        METHODS.update(before)


class Peer(PeerProcess):
    """The other process: a gRPC server and a TCP server."""

    def __init__(self) -> None:
        super().__init__("oarlock.benchmarks.rpc_peer")
        self.address, self.tcp_port = self.started


class Figures:
    """Microseconds of one way of one exchange: a median over all calls, processor time by turns."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.client: list[float] = []
        self.server: list[float] = []

    def report(self) -> dict[str, float]:
        return {
            "us": round(statistics.median(self.calls), 1),
            "client_cpu_us": round(statistics.median(self.client), 1),
            "server_cpu_us": round(statistics.median(self.server), 1),
        }


async def turn(call: Call, calls: int, peer: Peer, figures: Figures) -> None:
    """Make some calls, one after the other."""
    for _ in range(3):
        await call()
    server, client = peer.processor_seconds(), time.process_time()
    for _ in range(calls):
        begun = time.perf_counter()
        await call()
        figures.calls.append((time.perf_counter() - begun) * 1e6)
    figures.client.append((time.process_time() - client) / calls * 1e6)
    figures.server.append((peer.processor_seconds() - server) / calls * 1e6)


def ways(transport: GrpcTransport, peer: Peer, tcp: socket.socket, size: int) -> dict[tuple[str, str], Call]:
    """Return what is measured for one payload, by (verb, way)."""
    rows = size // (4 * ROW)
    pull = PullRequest(tables=[keys_of(rows)])
    gradients = np.ones((rows, ROW), np.float32)
    buffer = bytearray(2 * size)
    small, large = rows * 8, rows * (8 + 4 * ROW)

    async def grpc_pull() -> None:
        await transport.call(peer.address, "Shard.Pull", pull, timeout_seconds=20.0)

    async def grpc_push() -> None:
        # Made for every call, as the client does.
        parts = [TableGradients(keys=pull.tables[0], gradients=pack(gradients), rate=0.1)]
        await transport.call(peer.address, "Shard.Push", PushRequest(tables=parts), timeout_seconds=20.0)

    async def single_pull() -> None:
        with single_calls():
            await grpc_pull()

    async def single_push() -> None:
        with single_calls():
            await grpc_push()

    def bare(out: int, back: int) -> None:
        tcp.sendall(out.to_bytes(8, "little") + back.to_bytes(8, "little"))
        tcp.sendall(memoryview(buffer)[:out])
        receive(tcp, memoryview(buffer)[:back])

    async def tcp_pull() -> None:
        bare(small, size)

    async def tcp_push() -> None:
        bare(large, 16)

    return {
        ("pull", "single calls"): single_pull,
        ("pull", "stream"): grpc_pull,
        ("pull", "TCP"): tcp_pull,
        ("push", "single calls"): single_push,
        ("push", "stream"): grpc_push,
        ("push", "TCP"): tcp_push,
    }


async def measure(turns: int, calls: int, most_seconds: float) -> dict[str, Any]:
    """Return the figures by payload, verb and way."""
    peer = Peer()
    transport = GrpcTransport(frames=False)
    found: dict[str, dict[tuple[str, str], Figures]] = {payload: {} for payload in PAYLOADS}
    begun = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", peer.tcp_port)) as tcp:
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(turns):
                for payload, size in PAYLOADS.items():
                    for key, call in ways(transport, peer, tcp, size).items():
                        await turn(call, calls, peer, found[payload].setdefault(key, Figures()))
                if number and time.monotonic() - begun > most_seconds:
                    break
    finally:
        await transport.close()
        peer.close()
    return {
        payload: {
            verb: {way: figures.report() for (v, way), figures in by_way.items() if v == verb}
            for verb in ("pull", "push")
        }
        for payload, by_way in found.items()
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.rpc", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio", "protobuf"))
    turns, calls = (1, 2) if options.tiny else (5, 40) if options.quick else (15, 100)
    round_trips = asyncio.run(measure(turns, calls, 25.0 if options.quick else 240.0))
    if not options.json:
        for payload, verbs in round_trips.items():
            for verb, by_way in verbs.items():
                for way, figures in by_way.items():
                    shown = "  ".join(f"{name} {value:8.1f}" for name, value in figures.items())
                    print(f"{payload:>7} {verb} {way:12} {shown}", file=sys.stderr)
    streams = {
        payload: {
            verb: round(by_way["stream"]["us"] / by_way["single calls"]["us"], 3) for verb, by_way in verbs.items()
        }
        for payload, verbs in round_trips.items()
    }
    result = {"benchmark": "rpc", "round_trips": round_trips, "stream_vs_single": streams, "surroundings": before}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
