# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.elasticity [--json] [--quick]`: what it costs to decide at 10,000 shards and 1,000,000 blocks.

Seconds and memory of the first placement, of plans when shards come, leave and die, and of the scaler's decision; and the
messages that follow, which are arithmetic. Nothing moves here. The last line printed is the result.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.elasticity_heartbeat import heartbeat_cost
from oarlock.benchmarks.surroundings import settle, surroundings
from oarlock.client.autoscale import Autoscale
from oarlock.cluster.planning import Blocks, Moves, carried_out, place, plan
from oarlock.cluster.scaler import Look, ShardLook, State, decide

SHARDS = 10_000
# Blocks of a power of two, as tables have them, and slices of dense parameters.
TABLES, BLOCKS_OF_TABLE, DENSE = 60, 16_384, 16_960
BLOCK_BYTES = 8 << 20
HEARTBEAT_SECONDS = 0.5
RUNS = 5


def main() -> int:
    """Measure, print."""
    settle("oarlock.benchmarks.elasticity")
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.elasticity", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help=f"once instead of the median of {RUNS} runs")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio", "protobuf"))
    shards = 20 if options.tiny else SHARDS
    blocks = some_blocks(3, 64, 40) if options.tiny else some_blocks(TABLES, BLOCKS_OF_TABLE, DENSE)
    runs = 1 if options.quick else RUNS
    result: dict[str, Any] = {"benchmark": "elasticity", "shards": shards, "blocks": len(blocks.table), "runs": runs}
    for replicas in (1,) if options.quick else (0, 1):
        result[f"replicas_{replicas}"] = decisions(blocks, shards, replicas, runs, not options.json)
    result["scaler"] = scaling(shards, 3 * runs)
    result["unit_costs"] = heartbeat_cost(4 if options.tiny else 500, 40 if options.tiny else 4000 * runs)
    result["messages"] = messages(shards, len(blocks.table), result["replicas_1"])
    result["surroundings"] = before
    print(json.dumps(result))
    return 0


def some_blocks(tables: int, blocks: int, dense: int) -> Blocks:
    """Return Blocks of equal tables and of slices of dense parameters, whose last ones are short."""
    table = np.repeat(np.arange(tables + 1), [*[blocks] * tables, dense]).astype(np.int32)
    rng = np.random.default_rng(7)
    sizes = np.where(table < tables, BLOCK_BYTES, rng.integers(1 << 10, 1 << 20, len(table)))
    return Blocks(table, sizes.astype(np.int64), np.zeros(len(table)), (tables,))


def decisions(blocks: Blocks, shards: int, replicas: int, runs: int, told: bool) -> dict[str, Any]:
    """Return what each decision costs and how much it moves."""
    found: dict[str, Any] = {}
    crew = list(range(shards))

    def measured(name: str, decide_it: Callable[[], Any]) -> Any:
        seconds, cpu, peaks = [], [], []
        for _ in range(runs):
            start = reset_peak()
            begun, worked = time.perf_counter(), time.process_time()
            answer = decide_it()
            seconds.append(time.perf_counter() - begun)
            cpu.append(time.process_time() - worked)
            peaks.append(peak_bytes() - start)
        found[name] = {
            "seconds": round(statistics.median(seconds), 3),
            "cpu_seconds": round(statistics.median(cpu), 3),
            "peak_mb": round(max(peaks) / 1e6),
        }
        if isinstance(answer, Moves):
            found[name] |= {"moves": len(answer), "blocks": len(np.unique(answer.block))}
            found[name]["gb"] = round(float(answer.bytes.sum()) / 1e9, 1)
            found[name]["hand_overs"] = int((answer.owner >= 0).sum())
        if told:
            print(f"replicas = {replicas}, {name}: {found[name]}", file=sys.stderr, flush=True)
        return answer

    members = measured("place", lambda: place(blocks, crew, replicas=replicas))
    total = float(blocks.sizes.sum()) * (replicas + 1)
    measured("nothing_to_do", lambda: plan(blocks, members, crew, replicas=replicas))
    for name, more in (("one_more", 1), ("tenth_more", shards // 10)):
        moves = measured(name, partial(plan, blocks, members, range(shards + more), replicas=replicas))
        found[name]["bytes_over_least"] = round(float(moves.bytes.sum()) / (total * more / (shards + more)), 3)
    held = float((blocks.sizes[:, None] * (members == 0)).sum())
    moves = measured("drain_one", lambda: plan(blocks, members, crew[1:], leaving=[0], replicas=replicas))
    found["drain_one"]["bytes_over_least"] = round(float(moves.bytes.sum()) / held, 3)
    if replicas:
        dead = promoted(members, 0)
        moves = measured("death_of_one", lambda: plan(blocks, dead, crew[1:], replicas=replicas))
        found["death_of_one"]["bytes_over_least"] = round(float(moves.bytes.sum()) / held, 3)
        found["death_of_one"]["shards_that_help"] = len(np.unique(moves.add[moves.add >= 0]))
        assert (carried_out(dead, moves) >= 0).sum() == (replicas + 1) * len(members)
    return found


def promoted(members: NDArray[np.int32], dead: int) -> NDArray[np.int32]:
    """Return the members after the death of one shard: another member owns what it owned, alone."""
    found = members.copy()
    owned = found[:, 0] == dead
    found[owned, 0] = found[owned, 1]
    found[owned, 1] = -1
    found[found == dead] = -1
    return found


def scaling(shards: int, runs: int) -> dict[str, Any]:
    """Return the time of one decision of the scaler about as many shards."""
    policy = Autoscale(servers_most=4096, workers_most=4096)
    looked = tuple(ShardLook(6 << 30, 10 << 30, 0.6, 0.1) for _ in range(shards))
    look = Look(0.0, shards, 1000, looked, 1000, 1e7)
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        decide(policy, State(), look, 0.0)
        seconds.append(time.perf_counter() - begun)
    return {"decision_ms": round(statistics.median(seconds) * 1e3, 2)}


def messages(shards: int, blocks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Return the messages that a coordinator gets and sends for it. Arithmetic from the protocol, not a measurement.

    An *add* is an order to the owner, its report and the change of the placement to the members; a hand-over the same again.
    """
    events = {
        name: round(values["moves"] * 2 + values["hand_overs"] * 2 + values["blocks"] * 3)
        for name, values in found.items()
        if values.get("moves")
    }
    return {
        "heartbeats_per_second": round(shards / HEARTBEAT_SECONDS),
        "at_most_one_each_per_block": events,
        "whole_placement_mb": round(blocks * (4 + 8 + 4 * 2) / 1e6, 1),
    }


def reset_peak() -> int:
    """Let the peak of resident memory begin anew; return what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("the peak of memory cannot be reset here: it is that of the whole process", file=sys.stderr)
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    sys.exit(main())
