# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.checkpoint [--json] [--quick]`: what a cut costs a job that trains, and what it costs the disk.

A job of real processes, one shard and two workers, trains Wide & Deep on clicks of Criteo's shape, with 1 GB of rows (`--quick`)
or 5 GB. Cuts are made while it trains, whole and incremental ones, with times without a cut in between; then cuts while it rests,
in turns with a raw write of the same bytes; last, one is restored, in turns with reading its files. The last line printed is the
result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.checkpoint")

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.checkpoint_disk import compact, forget, read_raw, restore, write_raw
from oarlock.benchmarks.checkpoint_gaps import longest_gap, median_gap, speed, touched_rows
from oarlock.benchmarks.checkpoint_job import CheckpointJob, Cut
from oarlock.benchmarks.checkpoint_recipe import prolong, table_spec
from oarlock.benchmarks.end_to_end_data import DataSize, generate_clicks
from oarlock.checkpoint.format import cut_folder
from oarlock.embedding.store import keeps
from oarlock.ps.warmup import warm_up

DIM, BATCH, WORKERS = 16, 2048, 2
# Nothing is leased while a gate is announced: a worker shall not run out of batches meanwhile.
SPLIT_BATCHES = 32
SHARD_ID = 0
# Of training before anything counts.
WARM_SECONDS = 1.5


@dataclass(frozen=True)
class Size:
    """How much is measured. ``samples`` are drawn, and come again and again until an epoch has ``epoch`` of them: it shall not
    end. ``cap``: of a field's categories, 0: none; ``quiet_seconds``: training without a cut, each time."""

    samples: int
    epoch: int
    cap: int
    whole: int
    incremental: int
    quiet_seconds: float
    rounds: int
    restores: int
    compacts: bool = False


# All rows of Criteo's 26 fields are 4.9 GB; with as many categories a field at most, 1.0 GB.
FULL = Size(1 << 20, 1 << 24, 0, whole=1, incremental=2, quiet_seconds=4.0, rounds=1, restores=1, compacts=True)
QUICK = Size(1 << 18, 1 << 22, 1_280_000, whole=1, incremental=1, quiet_seconds=1.2, rounds=1, restores=1)
TINY = Size(1 << 16, 1 << 20, 2_000, whole=1, incremental=1, quiet_seconds=0.3, rounds=1, restores=1, compacts=True)


def row_bytes() -> int:
    """Return the bytes of a row: key, weights, state and counters."""
    spec = table_spec(DIM)
    state = sum(part.width for part in spec.parts)
    kept = keeps(spec)
    counters = kept.occurrences + kept.updated + 2 * kept.score + kept.version
    return 8 + 4 * (spec.dim + state + counters)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median of values, and their range."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def of_training(cuts: list[Cut], quiet: list[tuple[float, float]], told: list[NDArray[np.float64]]) -> dict[str, Any]:
    """Return pauses, speeds and times of the ``cuts`` made while workers trained; ``quiet``: spans without a cut."""
    gaps = [median_gap(each) for each in told]
    pauses = [
        max(longest_gap(w, c.spans.asked, c.spans.committed) - g for w, g in zip(told, gaps, strict=True)) for c in cuts
    ]
    gates = [
        max(longest_gap(w, c.spans.opened, c.spans.opened) - g for w, g in zip(told, gaps, strict=True)) for c in cuts
    ]
    without = [max(longest_gap(w, *span) - g for w, g in zip(told, gaps, strict=True)) for span in quiet]
    speeds = [speed(told, *span) for span in quiet]
    # Beside the times before and after it.
    whole = [(at, cut) for at, cut in enumerate(cuts) if cut.whole]
    slowed = [speed(told, c.spans.opened, c.spans.written) / statistics.mean(speeds[at : at + 2]) for at, c in whole]
    step = max(gaps)
    return {
        "pause_ms": round(max(pauses) * 1e3, 1),
        "pause_limit_ms": round(step * 1e3 + 50, 1),
        "pauses_ms": [round(p * 1e3, 1) for p in pauses],
        "pauses_at_the_gate_ms": [round(p * 1e3, 1) for p in gates],
        "longest_gaps_without_a_cut_ms": [round(p * 1e3, 1) for p in without],
        "step_ms": round(step * 1e3, 1),
        "slowdown": round(statistics.median(slowed), 3),
        "slowdowns": [round(s, 3) for s in slowed],
        "samples_per_s": spread([s * BATCH for s in speeds], 0),
        "cut_ms": {
            name: {
                "shut_to_opened": spread([(c.spans.opened - c.spans.shut) * 1e3 for c in some], 1),
                "asked_to_opened": spread([(c.spans.opened - c.spans.asked) * 1e3 for c in some], 1),
                "asked_to_written": spread([(c.spans.written - c.spans.asked) * 1e3 for c in some], 1),
                "asked_to_committed": spread([(c.spans.committed - c.spans.asked) * 1e3 for c in some], 1),
            }
            for name, some in (
                ("whole", [c for c in cuts if c.whole]),
                ("incremental", [c for c in cuts if not c.whole]),
            )
        },
    }


def of_increments(job: CheckpointJob, cuts: list[Cut], data: Path) -> dict[str, Any]:
    """Return what incremental cuts wrote over what their groups touched, as the data says. Compaction's bytes are not in it."""
    keys: NDArray[np.uint64] = np.load(data / "keys.npy", mmap_mode="r")
    notes = np.concatenate(job.notes())
    ratios, only, touched = [], [], []
    for cut in cuts:
        found = notes[notes["cut"] == cut.spans.cut - 1]
        touched.append(touched_rows(job.spec, keys, found))
        ratios.append(cut.bytes / max(1, touched[-1] * row_bytes()))
        only.append(cut.increment_bytes / max(1, cut.increment_rows * row_bytes()))
    return {
        "incremental_over_touched": round(statistics.median(ratios), 3),
        "incrementals_over_touched": [round(r, 3) for r in ratios],
        # Without blocks that were written whole, since most of their rows had changed.
        "increment_files_over_their_rows": [round(r, 3) for r in only],
        "increment_share_of_bytes": [round(c.increment_bytes / max(1, c.bytes), 3) for c in cuts],
        "touched_rows": touched,
    }


async def measure(size: Size, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the job and return all figures."""
    data = folder / "data"
    rows = await asyncio.to_thread(generate_clicks, data, DataSize(size.samples, size.cap, True))
    prolong(data, size.samples, size.epoch)
    model = rows * row_bytes()
    say(f"{rows} rows are {model / 1e9:.2f} GB")
    options: dict[str, object] = {
        "model": "wdl",
        "dim": DIM,
        "batch_samples": BATCH,
        "batches_per_split": SPLIT_BATCHES,
    }
    job = CheckpointJob(data, folder / "job", options, WORKERS)
    cuts: list[Cut] = []
    quiet: list[tuple[float, float]] = []

    async def quiet_time() -> None:
        begun = time.monotonic()
        await job.pause(size.quiet_seconds)
        quiet.append((begun, time.monotonic()))

    try:
        await job.begin()
        say("the shard is full")
        await job.train()
        await job.pause(min(WARM_SECONDS, 4 * size.quiet_seconds))
        for number in range(size.whole + size.incremental):
            await quiet_time()
            cuts.append(await job.cut(whole=number < size.whole))
            say(f"cut {cuts[-1].spans.cut} of {cuts[-1].bytes / 1e6:.0f} MB of rows")
        await quiet_time()
        await job.rest()
        resting: list[tuple[Cut, float]] = []
        for _ in range(size.rounds):
            cut = await job.cut(whole=True, training=False)
            raw = await asyncio.to_thread(write_raw, cut.files, folder / "raw")
            resting.append((cut, raw))
            say(f"{_written(cut):.2f} s to write a cut, {raw:.2f} s to write as many bytes")
        found = {
            **of_training(cuts, quiet, [each["told"] for each in job.notes()]),
            **of_increments(job, [c for c in cuts if not c.whole], data),
        }
        routes = job.routes()
        beside = job.compaction()
    finally:
        await job.close()
    incremental = [c for c in cuts if not c.whole][-1]
    compacted, taken = 0, 0.0
    if size.compacts:
        compacted, taken = await asyncio.to_thread(compact, job.checkpoints, incremental.spans.cut)
        say(f"{taken:.2f} s to compact chains to {compacted / 1e6:.0f} MB")
    last = resting[-1][0]
    restored = await asyncio.to_thread(_restores, job, routes, last, size.restores, rows, say)
    whole = [c for c in cuts if c.whole]
    bytes_of = [sum(f.stat().st_size for f in last.files)] * len(resting)
    return {
        **found,
        # What the shard compacted by itself while all of this went on; and all chains of the last incremental cut, in one go.
        "compacted_beside_training": beside,
        **({"compact_all_mb": round(compacted / 1e6, 1), "compact_all_s": round(taken, 2)} if size.compacts else {}),
        "write_vs_raw": round(statistics.median(raw / _written(cut) for cut, raw in resting), 3),
        "write_mb_per_s": spread([n / 1e6 / _written(cut) for n, (cut, _) in zip(bytes_of, resting, strict=True)], 0),
        "raw_write_mb_per_s": spread([n / 1e6 / raw for n, (_, raw) in zip(bytes_of, resting, strict=True)], 0),
        "files": len(last.files),
        **restored,
        "cow_peak_over_model": round(max(c.more_bytes for c in whole) / model, 3),
        "cow_peaks_over_model": [round(c.more_bytes / model, 3) for c in cuts],
        "model_gb": round(model / 1e9, 3),
        "rows": rows,
        "row_bytes": row_bytes(),
        "workers": WORKERS,
    }


def _written(cut: Cut) -> float:
    return cut.spans.written - cut.spans.opened


def _restores(
    job: CheckpointJob, routes: Any, cut: Cut, turns: int, rows: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Restore a cut and read its files in turns, both from the disk."""
    warm_up()
    where = job.checkpoints / cut_folder(cut.spans.cut)
    times: list[tuple[float, float]] = []
    for _ in range(turns):
        forget(cut.files)
        raw = read_raw(cut.files)
        forget(cut.files)
        seconds, found = restore(job.spec, SHARD_ID, routes, where)
        if found < rows:
            raise RuntimeError(f"{found} rows came back of {rows}")
        times.append((raw, seconds))
        say(f"{seconds:.2f} s to restore a cut, {raw:.2f} s to read and copy its files")
    return {
        "restore_vs_raw": round(statistics.median(raw / s for raw, s in times), 3),
        "restore_s": spread([s for _, s in times]),
        "raw_read_s": spread([raw for raw, _ in times]),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="1 GB instead of 5, within a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = surroundings(("numpy", "numba", "pyarrow", "grpcio"))
    begun = time.monotonic()

    def say(line: str) -> None:
        if not options.json:
            print(f"{time.monotonic() - begun:6.1f} s  {line}", file=sys.stderr)

    size = TINY if options.tiny else QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="oarlock-") as folder:
        found = asyncio.run(measure(size, Path(folder), say))
    if not options.json:
        for name, value in found.items():
            print(f"{name:34} {value}", file=sys.stderr)
    seconds = round(time.monotonic() - begun, 1)
    print(json.dumps({"benchmark": "checkpoint", **found, "seconds": seconds, "surroundings": before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
