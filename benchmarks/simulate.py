# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.simulate [--json] [--quick] [--seeds N]`: whole jobs under faults, in virtual time.

Runs the schedules of N seeds and counts the invariants that broke. A seed that breaks one is shrunk to a small schedule, which
`--replay SCHEDULE` runs again and tells event by event. The last line printed is the result.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

from oarlock.benchmarks.surroundings import surroundings
from oarlock.simulation.campaign import campaign, drawn, files, run_seeds, smallest
from oarlock.simulation.elastic import ELASTIC
from oarlock.simulation.faults import HYBRID, MODES, SYNC, Schedule
from oarlock.simulation.restored import run

QUICK_SECONDS = 35.0
# Shrinking one takes up to a minute.
MOST_SHRUNK = 3


def main() -> int:
    """Run, shrink what failed, print; 1 if an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.simulate", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help=f"as many schedules as fit into {QUICK_SECONDS:g} s")
    parser.add_argument("--seeds", type=int, default=10_050, metavar="N", help="how many seeds (default: 10050)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: 0)")
    parser.add_argument(
        "--mode",
        choices=(*MODES, SYNC, HYBRID, ELASTIC, "all"),
        default="all",
        help=f"all: those but {SYNC}, {HYBRID} and {ELASTIC}, which draw others (default)",
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--replay", metavar="SCHEDULE", help="a seed, or a schedule as JSON: run it and tell what happens"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seeds < 1 or options.first < 0 or options.processes < 1:
        parser.error("--seeds and --processes must be at least 1, --first at least 0")
    modes = MODES if options.mode == "all" else (options.mode,)
    if options.replay is not None:
        return replay(options.replay, modes)
    before = surroundings(("numpy", "numba", "protobuf"))
    seeds = 4 if options.tiny else options.seeds
    # Kernels are compiled, or loaded, before the clock runs.
    run_seeds(range(1), modes)
    begun = time.monotonic()
    for tally in campaign(
        options.first, seeds, options.processes, seconds=QUICK_SECONDS if options.quick else float("inf"), modes=modes
    ):
        took = time.monotonic() - begun
        if not options.json:
            print(
                f"{tally.schedules} schedules, {tally.events} events, {len(tally.violations)} violations, "
                f"{tally.schedules / took * 60:.0f} a minute",
                file=sys.stderr,
            )
    failing = [explained(seed, violation, modes) for seed, violation in tally.violations[:MOST_SHRUNK]]
    result = {
        "benchmark": "simulate",
        "schedules": tally.schedules,
        "events": tally.events,
        "violations": len(tally.violations),
        "schedules_per_minute": round(tally.schedules / took * 60, 1),
        "least_events": tally.least_events,
        "short_and_not_counted": tally.short,
        "mean_events": round(tally.events / tally.schedules, 1),
        "mean_virtual_seconds": round(tally.virtual_seconds / tally.schedules, 1),
        "processes": options.processes,
        "failing_seeds": [seed for seed, _ in tally.violations],
        "failing": failing,
        "counts": dict(tally.counts.most_common()),
        "surroundings": before,
    }
    print(json.dumps(result))
    return 1 if tally.violations else 0


def explained(seed: int, violation: str, modes: tuple[str, ...]) -> dict[str, Any]:
    """Shrink a failing seed; return what people need to look at it."""
    schedule = smallest(drawn(seed, modes), violation)
    print(f"seed {seed} broke {violation}", file=sys.stderr)
    print(f"python -m oarlock.benchmarks.simulate --replay '{schedule.to_json()}'", file=sys.stderr)
    return {"seed": seed, "violation": violation, "shrunk": json.loads(schedule.to_json())}


def replay(given: str, modes: tuple[str, ...]) -> int:
    """Run one schedule and print every event."""
    schedule = drawn(int(given), modes) if given.isdigit() else Schedule.from_json(given)
    log: list[str] = []
    outcome = run(schedule, files(), log)
    print("\n".join(log), file=sys.stderr)
    print(json.dumps({"benchmark": "simulate", "violation": outcome.violation, "events": outcome.events}))
    return 1 if outcome.violation else 0


if __name__ == "__main__":
    sys.exit(main())
