# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.serving_tls [--json] [--quick] [--seed N]`: what TLS costs look-ups.

Two processes of `oarlock serve` of one checkpoint, one without anything and one with tokens and TLS, asked in turns for rows of
dim 16: by frames and by gRPC alone over TCP, as from another machine, and by frames as on one machine, where they need no TLS.
Rows per second of processor time of client and server together, and rows per second, one request after the other.
``tls_vs_none``: medians of ratios, each within one turn. Invariant: it writes to a temporary folder only, every way's answers are
checked, and the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.serving_tls")

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.by_tcp import as_from_another_machine
from oarlock.benchmarks.security_peer import secrets_in
from oarlock.benchmarks.serving_measures import Lookup, Turn, draw, take_turn
from oarlock.benchmarks.serving_model import TABLE, row_values, write_model
from oarlock.benchmarks.serving_sides import Serve
from oarlock.proto.security import Security, SecuritySpec
from oarlock.serving import Client

DIM = 16
SIZES_OF_REQUESTS = (100, 1000, 10_000)
HOW = ("none", "tls")
BY = ("frames", "grpc", "frames_of_one_machine")


@dataclass(frozen=True)
class Size:
    """How much is measured; seconds are of each turn."""

    rows: int
    turns: int
    seconds: float


SIZES = {"full": Size(1_000_000, 15, 0.5), "quick": Size(200_000, 7, 0.12), "tiny": Size(2_000, 1, 0.02)}


def measure(size: Size, folder: Path, say: Callable[[str], None], *, seed: int) -> dict[str, Any]:
    """Return all figures."""
    keys = write_model(folder / "model", size.rows, DIM, seed=seed)
    requests = {n: draw(keys, n, np.random.default_rng(seed)) for n in SIZES_OF_REQUESTS}
    (folder / "secrets").mkdir()
    specs = secrets_in(folder / "secrets")
    failed = 0
    with contextlib.ExitStack() as stack:
        ways: dict[tuple[str, str], tuple[Lookup, int]] = {}
        for how in HOW:
            server = Serve(folder / "model", "--listen", "127.0.0.1:0", *specs[how].arguments())
            stack.callback(server.close)
            for by in BY:
                client = _client(server.ready["address"], by, specs[how])
                stack.callback(client.close)
                ways[by, how] = (_lookup_of(client), server.pid)
        for (by, _), (lookup, _) in ways.items():
            # Connections are made now, one after the other, and kept: each way has one.
            with contextlib.nullcontext() if by == "frames_of_one_machine" else as_from_another_machine():
                failed += sum(_wrong(lookup(r[0]), r[0]) for r in requests.values())
        found: dict[str, Any] = {"rows_per_cpu_second": {}, "rows_per_second": {}}
        ratios: dict[str, Any] = {"tls_vs_none": {}, "tls_vs_none_rows_per_second": {}, "frames_vs_grpc_tls": {}}
        for n, drawn in requests.items():
            turns = _turns(ways, drawn, size)
            for by in BY:
                plain, tls = turns[by, "none"], turns[by, "tls"]
                ratios["tls_vs_none"].setdefault(by, {})[n] = _ratio(tls, plain, _per_cpu_second)
                ratios["tls_vs_none_rows_per_second"].setdefault(by, {})[n] = _ratio(tls, plain, _per_second)
                for how, each in (("none", plain), ("tls", tls)):
                    for name, rate in (("rows_per_cpu_second", _per_cpu_second), ("rows_per_second", _per_second)):
                        figure = round(statistics.median(map(rate, each)))
                        found[name].setdefault(by, {}).setdefault(how, {})[n] = figure
            ratios["frames_vs_grpc_tls"][n] = _ratio(turns["frames", "tls"], turns["grpc", "tls"], _per_cpu_second)
            say(
                f"{n} keys: "
                + ", ".join(f"{by} {ratios['tls_vs_none'][by][n]}" for by in BY)
                + " of what it is without TLS"
            )
    return {**ratios, **found, "failed": failed}


def _client(address: str, by: str, spec: SecuritySpec) -> Client:
    return Client(address, timeout_seconds=60.0, frames=by != "grpc", security=Security(spec).open())


def _lookup_of(client: Client) -> Lookup:
    return lambda keys: client.lookup({TABLE: keys})[TABLE]


def _turns(
    ways: dict[tuple[str, str], tuple[Lookup, int]], requests: list[NDArray[np.uint64]], size: Size
) -> dict[tuple[str, str], list[Turn]]:
    """Return the turns of each way: one of each in a round, another one first each time."""
    order = list(ways)
    found: dict[tuple[str, str], list[Turn]] = {way: [] for way in order}
    for number in range(size.turns):
        first = number % len(order)
        for way in (*order[first:], *order[:first]):
            lookup, pid = ways[way]
            found[way].append(take_turn(lookup, pid, requests, size.seconds))
    return found


def _per_cpu_second(turn: Turn) -> float:
    return turn.rows_per_second


def _per_second(turn: Turn) -> float:
    return turn.rows / turn.wall_seconds


def _ratio(mine: list[Turn], base: list[Turn], rate: Callable[[Turn], float]) -> float:
    return round(statistics.median(rate(a) / rate(b) for a, b in zip(mine, base, strict=True)), 3)


def _wrong(found: NDArray[np.float32], keys: NDArray[np.uint64]) -> int:
    """Return how many rows of an answer are not those of the model."""
    return int((found != row_values(keys, DIM)).any(axis=1).sum())


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m oarlock.benchmarks.serving_tls", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="fewer rows, shorter turns")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of keys and requests")
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    before = surroundings(("numpy", "grpcio"))
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder:
        result = measure(SIZES[size], Path(folder), say, seed=options.seed)
    after = {"load_average_after": surroundings(())["load_average"]}
    print(json.dumps({"benchmark": "serving_tls", **result, "size": size, "surroundings": {**before, **after}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
