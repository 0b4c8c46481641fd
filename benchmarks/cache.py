# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.cache [--json] [--quick]`: what a worker's row cache saves, and what it costs.

Workers take turns at one table in this process: each asks for a batch's distinct keys, gets the rows that it lacks, and pushes
a gradient for each. Batches are 2048 samples of 26 fields with the cardinalities of Criteo Kaggle (capped, so that the table
fits), each field drawn by a bounded Zipf law, P(rank r) ~ r^-1.05. What is told is of the second half of the batches, when
the caches are full; times are those of the fastest tenth of them. Invariant: it writes no file and starts nothing. Main thread.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.cache")

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.cache import RowCache
from oarlock.embedding.keys import KeySet, KeySorter
from oarlock.embedding.spec import CacheSpec, OptimizerSpec, TableSpec
from oarlock.embedding.table import Table

FIELDS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652),
    *(2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
ALPHA = 1.05
DIM = 16
SAMPLES = 2048
WORKERS = 4
BLOCKS = 64
BOUNDS = (0, 10, 100)
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the table's rows that a cache holds
HOT = 0.1  # of all requests name the hot key
POLICIES = ("lru", "lfu")
OUT: NDArray[np.float32] = np.zeros(
    (SAMPLES * len(FIELDS), DIM), np.float32
)  # as a worker, whose buffers are used again


@dataclass(frozen=True)
class Scale:
    """How much is done: the cap of a field's cardinality, batches, single requests."""

    cap: int
    batches: int
    requests: int


SCALES = {"tiny": Scale(200, 16, 200), "quick": Scale(88_000, 240, 12_000), "full": Scale(880_000, 1600, 40_000)}


class Draws:
    """Draws rows of each field by its Zipf law; a row's key is a scramble of its number."""

    def __init__(self, cap: int) -> None:
        self.sizes = [min(size, cap) for size in FIELDS]
        self.rows = sum(self.sizes)
        self._rng = np.random.default_rng(0)
        self._starts = np.cumsum([0, *self.sizes[:-1]]).astype(np.uint64)
        self._laws = []
        for size in self.sizes:
            law = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -ALPHA)
            self._laws.append(law / law[-1])

    def keys(self, samples: int) -> NDArray[np.uint64]:
        """Return the raw keys: uint64[samples, 26]."""
        out = np.empty((samples, len(self.sizes)), np.uint64)
        for field, law in enumerate(self._laws):
            ranks = np.searchsorted(law, self._rng.random(samples)).clip(0, len(law) - 1)
            out[:, field] = (ranks.astype(np.uint64) + self._starts[field]) * np.uint64(0x9E3779B97F4A7C15)
        return out

    def chance(self) -> float:
        return float(self._rng.random())


def make_table() -> Table:
    """Return an empty table whose rows count their updates."""
    spec = TableSpec("t", DIM, OptimizerSpec("rowwise_adagrad"), blocks=BLOCKS, cache=CacheSpec(1, max(BOUNDS)))
    table = Table(spec, seed=0)
    for block in range(BLOCKS):
        table.adopt(block)
    return table


def push(table: Table, batch: KeySet) -> None:
    gradients = np.full((len(batch.keys), DIM), 1e-3, np.float32)
    table.push(batch.keys, batch.blocks, batch.counts, gradients, rate=0.01)


def turn(table: Table, cache: RowCache, batch: KeySet, bound: int) -> tuple[float, NDArray[np.int32]]:
    """Pull, as a worker with this cache does, and push; return the cache's seconds, and the positions of what came."""
    out = OUT[: len(batch.keys)]
    begin = time.perf_counter()
    kept = cache.versions_of(batch.keys, out)
    asked = time.perf_counter()
    found = table.pull_newer(batch.keys, batch.blocks, batch.counts, kept, bound=bound)
    came = time.perf_counter()
    cache.merge(batch.keys, kept, found.positions, found.rows, found.versions, out)
    done = time.perf_counter()
    push(table, batch)
    return asked - begin + done - came, found.positions


def of_batches(table: Table, batches: list[KeySet], policy: str, rows: int, bound: int) -> dict[str, Any]:
    """Return what caches of so many rows save."""
    caches = [RowCache(CacheSpec(rows, bound, policy), DIM) for _ in range(WORKERS)]
    keys = sent = outdated = 0
    seconds = []
    for number, batch in enumerate(batches):
        cache = caches[number % WORKERS]
        before = cache.outdated
        spent, positions = turn(table, cache, batch, bound)
        if number >= len(batches) // 2:
            keys += len(batch.keys)
            sent += len(positions)
            outdated += cache.outdated - before
            seconds.append(spent / len(batch.keys))
    row = 4 * DIM
    return {
        "policy": policy,
        "rows": rows,
        "bound": bound,
        "kept": round((keys - sent + outdated) / keys, 4),
        "saved": round(1 - sent / keys, 4),
        # What is asked with beside each key, and position and version of each row that comes.
        "saved_with_versions": round(1 - (4 * keys + (row + 8) * sent) / (row * keys), 4),
        "cache_ns_per_key": round(float(np.quantile(seconds, 0.1)) * 1e9, 1),
        "full": all(len(cache) == rows for cache in caches),
        "bytes": caches[0].nbytes,
    }


def of_a_hot_key(table: Table, draws: Draws, requests: int, bound: int) -> dict[str, Any]:
    """Let workers ask for one sample at a time; a share of the samples has one key in place of its first."""
    sorter, ranks = KeySorter(), np.arange(BLOCKS, dtype=np.int32)
    caches = [RowCache(CacheSpec(2000, bound), DIM) for _ in range(WORKERS)]
    raw, hot = draws.keys(requests), np.uint64(7)
    asked = hot_asked = sent = hot_sent = 0
    for number in range(requests):
        if draws.chance() < HOT:
            raw[number, 0] = hot
        batch = sorter.build(raw[number], table.salt, table.bits, ranks)
        _, positions = turn(table, caches[number % WORKERS], batch, bound)
        asked += len(batch.keys)
        sent += len(positions)
        hot_asked += int((batch.keys == hot).any())
        hot_sent += int((batch.keys[positions] == hot).any())
    return {
        "bound": bound,
        "requests": requests,
        "hot_requests": hot_asked,
        "saved_of_hot": round(1 - hot_sent / hot_asked, 4),
        "saved": round(1 - sent / asked, 4),
    }


def of_the_owner(table: Table, batches: list[KeySet]) -> dict[str, float]:
    """Return nanoseconds a key of a pull, and of a look at versions where nothing has to be sent; the fastest of all."""
    pull, look = [], []
    for batch in batches:
        n, which = len(batch.keys), (batch.keys, batch.blocks, batch.counts)
        kept = np.zeros(n, np.uint32)
        first = table.pull_newer(*which, kept, bound=0)
        kept[first.positions] = first.versions
        rows = np.empty((n, DIM), np.float32)
        begin = time.perf_counter()
        table.pull(*which, rows)
        pulled = time.perf_counter()
        table.pull_newer(*which, kept, bound=0)
        pull.append((pulled - begin) / n)
        look.append((time.perf_counter() - pulled) / n)
    return {"pull_ns": round(min(pull) * 1e9, 1), "look_ns": round(min(look) * 1e9, 1)}


def sizes(rows: int) -> Iterator[tuple[int, int]]:
    """Yield rows of a cache and bound of all cases: every bound at a tenth of the rows, every size at the middle bound."""
    yield from ((rows // 10, bound) for bound in BOUNDS)
    yield from ((max(1, int(rows * share)), BOUNDS[1]) for share in SHARES if share != 0.1)


def measure(scale: Scale) -> dict[str, Any]:
    """Return the figures of every case."""
    draws, table = Draws(scale.cap), make_table()
    sorter, ranks = KeySorter(), np.arange(BLOCKS, dtype=np.int32)
    batches = [
        sorter.build(draws.keys(SAMPLES).reshape(-1), table.salt, table.bits, ranks) for _ in range(scale.batches)
    ]
    for batch in batches:  # rows that are absent are not kept: let all of them be there
        push(table, batch)
    cases = [of_batches(table, batches, p, rows, bound) for rows, bound in sizes(draws.rows) for p in POLICIES]
    owner = of_the_owner(table, batches[:: max(1, len(batches) // 40)])
    return {
        "rows": draws.rows,
        "rows_used": table.rows,
        "batches": scale.batches,
        "keys_per_batch": round(float(np.mean([len(batch.keys) for batch in batches]))),
        "dim": DIM,
        "workers": WORKERS,
        "cases": cases,
        "owner": owner,
        "hot_key": [of_a_hot_key(table, draws, scale.requests, bound) for bound in BOUNDS],
        "surroundings": surroundings(("numpy", "numba")),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a smaller table, fewer batches")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, for tests")
    chosen = parser.parse_args()
    result = measure(SCALES["tiny" if chosen.tiny else "quick" if chosen.quick else "full"])
    if chosen.json:
        print(json.dumps(result))
        return 0
    print("policy  cached rows  bound  kept   saved  with versions  ns per key")
    for case in result["cases"]:
        shares = f"{case['kept']:.3f}  {case['saved']:.3f}  {case['saved_with_versions']:>13.3f}"
        print(f"{case['policy']:<6}  {case['rows']:>11}  {case['bound']:>5}  {shares}  {case['cache_ns_per_key']:>10}")
    print(json.dumps({name: result[name] for name in ("owner", "hot_key")}))
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
