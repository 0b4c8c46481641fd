# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.exactly_once [--json] [--quick]`: what it costs that every push is applied exactly once.

The same batches of NCF are pulled, trained and pushed over gRPC through shards with identities and marks and through shards
without (unmarked.py), all alive at once, in short rounds of with, without, without, with; then pushes without a wire
(exactly_once_handler.py). Without, messages have an empty header and no identity. Equal on both sides: the pipeline, in which
a split's next group waits for the last one's answers. The last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.exactly_once")

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from oarlock.benchmarks.exactly_once_handler import blocks_of, measure_handler, measure_memory
from oarlock.benchmarks.exactly_once_loop import SHARDS, TRACKS, Side, Turns, Work, prepare, requests_for_shard
from oarlock.benchmarks.ncf_job import plan
from oarlock.client.closed import SPLIT_WINDOW
from oarlock.client.layout import Layout
from oarlock.client.router import Routes
from oarlock.data.planted import generate_ncf
from oarlock.launch.job import make_spec
from oarlock.proto.rpc import GrpcTransport
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import load_recipe

STARTED = time.monotonic()


@dataclass(frozen=True)
class Size:
    """How much is measured: data, different batches, groups of each track in a round, and for how long.

    The loop runs in ``sets`` of processes, started anew, which share ``loop_seconds`` from the program's start.
    """

    users: int
    items: int
    positives: int
    batches: int
    groups: int
    sets: int
    loop_seconds: float
    loop_least_rounds: int
    handler_rounds: int
    handler_seconds: float


SIZES = {
    "full": Size(6040, 3706, 12, 64, 2, 5, 180.0, 100, 20_000, 30.0),
    "quick": Size(6040, 3706, 12, 64, 2, 2, 33.0, 2, 2_000, 4.0),
    "tiny": Size(120, 220, 20, 4, 2, 1, 0.0, 2, 8, 1.0),
}


def measure(size: Size, folder: Path, *, control: bool = False) -> dict[str, Any]:
    """Return all figures; ``control``: both sides have marks, and what they differ by is the error of the method."""
    data = folder / "data"
    generate_ncf(data, users=size.users, items=size.items, positives_per_user=size.positives)
    spec = make_spec(plan(data, servers=SHARDS, workers=1, epochs=1), "exactly-once")
    workload = load_recipe(spec.recipe).workload(spec)
    workload.start()
    work = Work(workload, workload.model.bind(workload.max_samples), workload.rates(0.0))

    turns = Turns()

    async def one_set(number: int) -> tuple[Routes, list[Prepared]]:
        transport = GrpcTransport()
        sides = (Side(spec, transport, work, marks=True), Side(spec, transport, work, marks=control))
        started: list[Side] = []
        try:
            # Who is started first may matter, so both are.
            for side in sides[:: -1 if number % 2 else 1]:
                side.start()
                started.append(side)
            for side in started:
                await side.join()
            batches = prepare(workload, spec, sides[0].routes, size.batches)
            for side in sides:
                side.take(batches)
            # The sets to come need as long as this one to start.
            starting, to_come = time.monotonic() - begun, size.sets - number - 1
            left = STARTED + size.loop_seconds - time.monotonic() - to_come * starting
            await turns.measure(
                sides,
                groups=size.groups,
                warm_up=size.batches // TRACKS,
                seconds=left / (to_come + 1),
                least_rounds=size.loop_least_rounds,
            )
            return sides[0].routes, batches
        finally:
            await transport.close()
            for side in started:
                side.close()

    for number in range(size.sets):
        begun = time.monotonic()
        routes, batches = asyncio.run(one_set(number))
    requests = requests_for_shard(spec, routes, batches, work.rates)
    handler = measure_handler(spec, routes, requests, rounds=size.handler_rounds, most_seconds=size.handler_seconds)
    layout = Layout(spec.tables, spec.dense)
    return {
        **turns.report(),
        **handler,
        **measure_memory(spec, routes, requests[0], SPLIT_WINDOW),
        "blocks_of": blocks_of(layout),
        "batch_samples": batches[0].samples,
        "batch_keys": {name: len(keys.keys) for name, keys in batches[0].keys.items()},
        "push_bytes": sum(r.ByteSize() for r in requests) // len(requests),
        "compute_us": round(statistics.median(work.compute_seconds) * 1e6, 1),
        "shards": SHARDS,
        "open_splits_of_a_worker": TRACKS,
        "groups_in_a_round": size.groups * TRACKS,
        "seconds": round(time.monotonic() - STARTED, 1),
    }


def main() -> int:
    """Measure and print."""
    name = "python -m oarlock.benchmarks.exactly_once"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--control", action="store_true", help="both sides with marks: the error of the method")
    options = parser.parse_args()
    chosen = "tiny" if options.tiny else "quick" if options.quick else "full"
    before = surroundings(("numpy", "numba", "grpcio", "protobuf"))
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder, threadpool_limits(1, "blas"):
        result = measure(SIZES[chosen], Path(folder), control=options.control)
    if not options.json:
        for key, value in result.items():
            print(f"{key:28} {value}", file=sys.stderr)
    after = surroundings(())["load_average"]
    about = {"size": chosen, "control": options.control, "surroundings": {**before, "load_average_after": after}}
    print(json.dumps({"benchmark": "exactly_once", **result, **about}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
