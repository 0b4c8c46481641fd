# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.security [--json] [--quick]`: what tokens and TLS cost a call, and a pull.

Processor microseconds of both sides, two processes, and microseconds, medians over turns: a small call, which gives its token
every time, and pulls by frames (by TCP, and as on one machine) and by streams, which give it once. ``tokens_vs_none`` and
``tls_vs_none`` are medians of ratios of processor time, each within one turn. The last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.security")

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from oarlock.benchmarks.by_tcp import as_from_another_machine
from oarlock.benchmarks.peer import PeerProcess
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.security import Security, SecuritySpec
from oarlock.proto.shard_pb2 import PullRequest

HOW = ("none", "tokens", "tls")
FAR = "pull of 1 MB, frames by TCP"


@dataclass
class Figures:
    """Of one way: each turn's mean."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def report(self) -> dict[str, float]:
        return {"us": round(statistics.median(self.wall), 1), "cpu_us": round(statistics.median(self.processor), 1)}


async def measure(turns: int, calls: int, most_seconds: float) -> dict[str, dict[str, Figures]]:
    """Return the figures by what is called, and how."""
    peer = PeerProcess("oarlock.benchmarks.security_peer")
    transports: list[GrpcTransport] = []
    ways: list[tuple[str, str, GrpcTransport, str, Any, int]] = []
    found: dict[str, dict[str, Figures]] = {}
    begun = time.monotonic()
    try:
        opened = {how: Security(SecuritySpec(**peer.started[how]["spec"]), own=True).open() for how in HOW}
        for what, frames, method, request, count in (
            ("call", False, "Shard.Hello", HelloRequest(protocol=PROTOCOL), calls),
            ("pull of 1 MB, stream", False, "Shard.Pull", PullRequest(), calls // 4),
            (FAR, True, "Shard.Pull", Bulk(PullRequest(), ()), calls // 4),
            # Within one machine frames stay what they are, with TLS too.
            ("pull of 1 MB, frames", True, "Shard.Pull", Bulk(PullRequest(), ()), calls // 4),
        ):
            for how in HOW:
                transports.append(GrpcTransport(frames=frames, security=opened[how]))
                ways.append((what, how, transports[-1], method, request, max(1, count)))
        for number in range(turns):
            # Whoever comes first in a turn meets another machine than who comes after it.
            first = number % len(HOW)
            for what, how, transport, method, request, count in (*ways[first:], *ways[:first]):
                address = peer.started[how]["address"]
                # Connections are made by the first call.
                with as_from_another_machine() if what == FAR else contextlib.nullcontext():
                    await transport.call(address, method, request, timeout_seconds=20.0)
                processor, wall = time.process_time() + peer.processor_seconds(), time.perf_counter()
                for _ in range(count):
                    await transport.call(address, method, request, timeout_seconds=20.0)
                figures = found.setdefault(what, {}).setdefault(how, Figures())
                figures.wall.append((time.perf_counter() - wall) / count * 1e6)
                figures.processor.append((time.process_time() + peer.processor_seconds() - processor) / count * 1e6)
            if number and time.monotonic() - begun > most_seconds:
                break
    finally:
        for transport in transports:
            await transport.close()
        peer.close()
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.security", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio", "protobuf"))
    turns, calls = (1, 2) if options.tiny else (9, 100) if options.quick else (31, 200)
    found = asyncio.run(measure(turns, calls, 30.0 if options.quick else 200.0))
    ratios = {
        f"{how}_vs_none": {
            what: round(
                statistics.median(
                    mine / none for mine, none in zip(by_how[how].processor, by_how["none"].processor, strict=True)
                ),
                3,
            )
            for what, by_how in found.items()
        }
        for how in HOW[1:]
    }
    shown = {what: {how: figures.report() for how, figures in by_how.items()} for what, by_how in found.items()}
    if not options.json:
        for what, reports in shown.items():
            for how, report in reports.items():
                print(f"{what:28} {how:8} us {report['us']:9.1f}  cpu_us {report['cpu_us']:9.1f}", file=sys.stderr)
    print(json.dumps({"benchmark": "security", **ratios, "figures": shown, "surroundings": before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
