# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.table_dedup [--json] [--quick]`: distinct keys, against numpy.unique and torch.unique.

Ours also groups the keys by block. The others run in their own environments' interpreters, get the same keys, time each call
themselves, and take turns with us; every process has one thread. Invariant: it writes no file, and leaves no process behind.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.table_dedup")

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.table_dedup_peer import seconds
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter, gather, merge
from oarlock.embedding.pooling import pool

Keys = NDArray[np.uint64]

CHECKOUT = Path(__file__).resolve().parent.parent
PEERS = {"numpy": (".venv-modern", "make test-modern"), "torch": (".venv-torch", "make setup-torch")}
PEER_SECONDS = 300.0
IDS = 10_000_000
EXPONENT = 1.05
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no two ids become one
# As many sets as a branch predictor cannot know by heart, and in each turn a few of them.
SETS = 16
EACH_TURN = 4


@dataclass(frozen=True)
class Case:
    """n keys: "uniform" or "zipf" among the ids 0 to 10 M, or "zipf spread" over all 64 bits."""

    kind: str
    n: int = 53_248
    blocks: int = 64


HEADLINE = (Case("uniform"), Case("zipf"))
BESIDE = (
    Case("zipf spread"),
    Case("zipf", blocks=1024),
    Case("uniform", blocks=1024),
    Case("zipf", blocks=1),
    Case("uniform", blocks=1),
    Case("zipf", 15_000),
    Case("uniform", 15_000),
    Case("zipf", 4_000),
    Case("zipf", 1_000),
    Case("zipf", 64),
)


class Peer:
    """Another library in its own process: start(), feed(), time(), close(). One thread."""

    def __init__(self, package: str, python: str) -> None:
        self.package = package
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._limit: threading.Timer | None = None

    def start(self) -> None:
        """Start the process; version() waits until it can work."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPENBLAS_", "VIRTUAL_ENV"))}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        file = Path(__file__).resolve().with_name("table_dedup_peer.py")
        self._process = subprocess.Popen(
            [self._python, "-P", str(file), self.package],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._limit = threading.Timer(PEER_SECONDS, self._process.kill)
        self._limit.start()

    def version(self) -> str:
        """Return the library's version; EOFError if the process has ended, as also feed() and time() raise it."""
        return str(self._answer())

    def feed(self, sets: list[Keys]) -> None:
        """Give it what it is to be timed with."""
        self._ask({"sets": len(sets), "keys": len(sets[0])}, *(keys.tobytes() for keys in sets))

    def time(self, numbers: list[int]) -> list[float]:
        """Return the seconds of one call for each of these sets."""
        self._ask({"time": numbers})
        return [float(spent) for spent in self._answer()]

    def _ask(self, what: dict[str, Any], *more: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"".join([json.dumps(what).encode() + b"\n", *more]))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError(f"the process of {self.package} has ended") from error

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the process of {self.package} has ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._limit is not None:
            self._limit.cancel()
            self._limit.join()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def interpreter(package: str) -> tuple[str | None, str | None]:
    """Return (the Python to ask for ``package``, why it is not that of the environment made for it)."""
    folder, target = PEERS[package]
    python = CHECKOUT / folder / "bin" / "python"
    if python.exists():
        return str(python), None
    if importlib.util.find_spec(package) is not None:
        return sys.executable, f"{folder} is absent, so this is the version beside Oarlock: {target}"
    return None, f"there is no {package}, neither in {folder} nor beside Oarlock: {target}"


class KeySource:
    """Makes the keys of cases; the shares of Zipf's law are computed once."""

    def __init__(self) -> None:
        self._shares: NDArray[np.float64] | None = None

    def make(self, case: Case) -> list[Keys]:
        """Return SETS arrays: uint64[n]."""
        rngs = [np.random.default_rng(seed) for seed in range(SETS)]
        if case.kind == "uniform":
            return [rng.integers(0, IDS, case.n, dtype=np.uint64) for rng in rngs]
        if self._shares is None:
            shares = np.cumsum(np.arange(1, IDS + 1, dtype=np.float64) ** -EXPONENT)
            self._shares = shares / shares[-1]
        ranks = [np.searchsorted(self._shares, rng.random(case.n)).astype(np.uint64) for rng in rngs]
        return [r * SPREAD for r in ranks] if case.kind == "zipf spread" else ranks


def _measure_case(case: Case, sets: list[Keys], peers: dict[str, Peer], rounds: int) -> dict[str, Any]:
    sorter, salt = KeySorter(), table_salt("dedup")
    bits, rank = case.blocks.bit_length() - 1, np.arange(case.blocks, dtype=np.int32)

    def build(keys: Keys) -> int:
        return len(sorter.build(keys, salt, bits, rank).keys)

    distinct = [build(keys) for keys in sets]
    spent: dict[str, list[float]] = {"oarlock": [], **{name: [] for name in peers}}
    for peer in peers.values():
        peer.feed(sets)
    for turn in range(rounds):
        numbers = [(turn * EACH_TURN + i) % SETS for i in range(EACH_TURN)]
        spent["oarlock"] += seconds(build, [sets[i] for i in numbers])
        for name, peer in peers.items():
            spent[name] += peer.time(numbers)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return {
        "case": f"unique, {case.kind}",
        "keys": case.n,
        "distinct": round(statistics.median(distinct)),
        "blocks": case.blocks,
        **{f"{name}_us": round(median * 1e6, 1) for name, median in medians.items()},
        **{f"vs_{name}": round(medians[name] / medians["oarlock"], 2) for name in peers},
    }


def _measure_rows(keys: Keys, rounds: int, dim: int = 16) -> list[dict[str, Any]]:
    """Measure merge, gather and pool against what this process's numpy has for it."""
    found = KeySorter().build(keys, table_salt("dedup"), 6, np.arange(64, dtype=np.int32))
    n, unique = len(keys), len(found.keys)
    wide = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    narrow, spread = np.empty((unique, dim), np.float32), np.empty((n, dim), np.float32)
    offsets = np.arange(0, n + 1, 13)
    offsets[-1] = n
    pooled = np.empty((len(offsets) - 1, dim), np.float32)

    def add_at(_: None) -> None:
        narrow[:] = 0
        np.add.at(narrow, found.inverse, wide)

    ways: dict[str, tuple[Callable[[None], Any], str, Callable[[None], Any]]] = {
        "merge": (lambda _: merge(wide, found.inverse, narrow), "numpy.add.at", add_at),
        "gather": (
            lambda _: gather(narrow, found.inverse, spread),
            "numpy.take",
            lambda _: np.take(narrow, found.inverse, axis=0, out=spread, mode="clip"),
        ),
        "pool, sum of 13": (
            lambda _: pool(narrow, found.inverse, offsets, "sum", pooled),
            "numpy.take and add.reduceat",
            lambda _: np.add.reduceat(np.take(narrow, found.inverse, axis=0), offsets[:-1], axis=0, out=pooled),
        ),
    }
    cases = []
    for name, (ours, other, theirs) in ways.items():
        spent: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for times, function in zip(spent, (ours, theirs), strict=True):
                times += seconds(function, [None])
        a, b = (statistics.median(times) for times in spent)
        beside = {"oarlock_us": round(a * 1e6, 1), "other": other, "other_us": round(b * 1e6, 1)}
        cases.append({"case": name, "keys": n, "distinct": unique, "dim": dim, **beside, "vs_other": round(b / a, 2)})
    return cases


def measure(quick: bool) -> dict[str, Any]:
    """Return the ratios (above 1: we are faster; the worse of uniform and Zipf), versions, why any is missing, and all cases."""
    why: dict[str, str | None] = {}
    versions: dict[str, str | None] = dict.fromkeys(PEERS)
    peers: dict[str, Peer] = {}
    for name in PEERS:
        python, why[name] = interpreter(name)
        if python is not None:
            peers[name] = Peer(name, python)
    asked = list(peers.values())
    try:
        for peer in asked:
            peer.start()
        source = KeySource()
        made = {case: source.make(case) for case in HEADLINE}
        for name in list(peers):
            try:
                versions[name] = peers[name].version()
            except EOFError as error:
                why[name] = f"{error}, before it could begin: {' '.join(PEERS[name])}"
                del peers[name]
        turns = 20 if quick else 100
        headline = [_measure_case(case, sets, peers, turns) for case, sets in made.items()]
        beside = [] if quick else [_measure_case(case, source.make(case), peers, turns // 2) for case in BESIDE]
        rows = _measure_rows(made[HEADLINE[1]][0], 3 if quick else 15)
    finally:
        for peer in asked:
            peer.close()
    worse = {name: min(case[f"vs_{name}"] for case in headline) if name in peers else None for name in PEERS}
    return {
        **{f"dedup_vs_{name}": ratio for name, ratio in worse.items()},
        **versions,
        "why": why,
        "cases": [*headline, *beside, *rows],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.table_dedup", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="in a few seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.quick) | {"surroundings": surroundings(("numpy", "numba"))}
    if arguments.json:
        print(json.dumps(result))
        return 0
    for case in result.pop("cases"):
        print("  ".join(f"{key} {value}" for key, value in case.items()))
    for key, value in result.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
