# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.overload [--json] [--quick]`: a shard that is asked for four times as much as it can do.

Two shards in processes of their own with a small memory for requests; pushes and pulls of 1 MiB, in turns, from other processes.
First as fast as they answer, which is what they can sustain; then one of them at four times that rate, whether or not it answers;
then as at first, so that what else the machine does is seen on both. Its resident memory is sampled throughout. Last, one
worker: how long pulls from it take while pulls from the other one, made 100 ms slower, are in flight. The last line printed is
the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.overload")

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

LIMIT = 64 << 20
# Processes that ask, workers in each, which have up to four connections each.
LOADS, CALLERS = 2, 18
OVER = 4
SLOWED_SECONDS = 0.1
SAMPLE_SECONDS = 0.01
# Windows of each side before and after.
TURNS = 4


class Peer:
    """Another process of overload_peer."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "oarlock.benchmarks.overload_peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: Any) -> None:
        assert self.process.stdin is not None, "made with a pipe"
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None, "made with a pipe"
        return json.loads(self.process.stdout.readline())

    def ask(self, line: Any) -> Any:
        self.say(line)
        return self.hear()

    def resident(self) -> int:
        """Return its resident bytes, 0 once it is gone."""
        try:
            words = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()
        except OSError:
            return 0
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE")

    def processor_seconds(self) -> float:
        """Return the processor time that it has used."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None, "made with pipes"
            pipe.close()
        self.process.wait()


class Watched:
    """The most memory that a process had at any sample."""

    def __init__(self, peer: Peer) -> None:
        self.most = peer.resident()
        self._peer = peer
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self._peer.resident())

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def together(loads: list[Peer], at: int, seconds: float, rate: float = 0.0) -> tuple[Counter[str], float]:
    """Run a load on shard ``at`` from all; return how calls ended, and how many a second were answered."""
    for each in loads:
        each.say({"at": at, "seconds": seconds, "rate": rate / len(loads)})
    ended: Counter[str] = Counter()
    answered = 0.0
    for each in loads:
        found = each.hear()
        answered += found.get("ok", 0) / found.pop("took")
        ended.update(found)
    return ended, answered


class Used:
    """Processor seconds of a process, and calls that it answered meanwhile: what other work on the machine changes little."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._from = 0.0
        self.seconds = 0.0
        self.calls = 0

    def __enter__(self) -> "Used":
        self._from = self._peer.processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._peer.processor_seconds() - self._from

    def of_a_call(self) -> float:
        """Return processor milliseconds of a call that was answered."""
        return round(self.seconds / max(1, self.calls) * 1e3, 3)


def in_turns(loads: list[Peer], shards: list[Peer], seconds: float) -> tuple[list[float], list[Used]]:
    """Return how many calls a second each shard answers: other work on the machine takes as much of one as of the other."""
    used = [Used(each) for each in shards]
    rates: list[list[float]] = [[] for _ in shards]
    for _ in range(TURNS):
        for at, each in enumerate(used):
            with each:
                ended, rate = together(loads, at, seconds / TURNS)
            each.calls += ended["ok"]
            rates[at].append(rate)
    return [statistics.mean(found) for found in rates], used


def overloaded(shards: list[Peer], loads: list[Peer], steady: float, over: float) -> dict[str, Any]:
    """Ask the first shard for too much, its twin never; return what became of it."""
    shard = shards[0]
    at_first = shard.resident()
    watched = Watched(shard)
    try:
        # Tables filled, connections made.
        in_turns(loads, shards, steady / 2)
        (before, twin_before), used_before = in_turns(loads, shards, steady)
        used = Used(shard)
        with used:
            ended, during = together(loads, 0, over, OVER * before)
        used.calls = ended["ok"]
        (after, twin_after), used_after = in_turns(loads, shards, steady)
        died = shard.process.poll() is not None
        told = {} if died else shard.ask(0.0)
    finally:
        watched.close()
    calls = sum(ended[name] for name in ("ok", "refused", "refused_not_retryable"))
    return {
        "died": died,
        "rss_over_limit": round((watched.most - at_first - told.get("tables", 0)) / LIMIT, 3),
        "refused": ended["refused"],
        "refused_not_retryable": ended["refused_not_retryable"],
        "throughput_after": round(after / before * twin_before / twin_after, 3),
        "calls_per_second": {
            "before": round(before, 1),
            "during": round(during, 1),
            "after": round(after, 1),
            "twin_before": round(twin_before, 1),
            "twin_after": round(twin_after, 1),
        },
        "answered_over_sustainable": round(during / before, 3),
        "asked_over_sustainable": round(calls / over / before, 2),
        "shard_processor_ms_of_a_call": {
            "before": used_before[0].of_a_call(),
            "during": used.of_a_call(),
            "after": used_after[0].of_a_call(),
            "twin_before": used_before[1].of_a_call(),
            "twin_after": used_after[1].of_a_call(),
        },
        "ended": dict(ended),
        "rss_mib": {"at_first": at_first >> 20, "most": watched.most >> 20, "tables": told.get("tables", 0) >> 20},
        "limit_mib": LIMIT >> 20,
        "refused_by_shard": told.get("refused"),
    }


def slowed(slow: Peer, watch: Peer, turns: int, pulls: int, beside: int) -> dict[str, Any]:
    """Return how long pulls from the other shard take: alone, and with pulls from ``slow`` in flight."""
    found: dict[int, list[float]] = {0: [], beside: []}
    slow.ask(SLOWED_SECONDS)
    watch.ask({"pulls": pulls, "beside": beside})
    for _ in range(turns):
        for flight, times in found.items():
            times += watch.ask({"pulls": pulls, "beside": flight})
    alone, near = (statistics.median(times) for times in found.values())
    return {
        "slow_shard_pull_ratio": round(near / alone, 3),
        "pull_ms": {"alone": round(alone * 1e3, 3), "beside_a_slow_shard": round(near * 1e3, 3)},
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.overload", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="shorter")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio", "protobuf"))
    steady, over = (0.3, 0.5) if options.tiny else (3.0, 8.0) if options.quick else (12.0, 60.0)
    turns, pulls = (1, 5) if options.tiny else (8, 60) if options.quick else (30, 100)
    peers = [Peer("shard", str(LIMIT)) for _ in range(2)]
    try:
        addresses = [each.hear() for each in peers]
        loads = [Peer("load", str(n * CALLERS), str(CALLERS), *addresses) for n in range(LOADS)]
        watch = Peer("watch", addresses[1], addresses[0])
        peers += [*loads, watch]
        for each in (*loads, watch):
            each.hear()
        found = overloaded(peers[:2], loads, steady, over)
        found |= slowed(peers[1], watch, turns, pulls, 4)
    finally:
        for each in reversed(peers):
            each.close()
    if not options.json:
        for name, value in found.items():
            print(f"{name:24} {value}", file=sys.stderr)
    print(json.dumps({"benchmark": "overload", **found, "surroundings": before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
