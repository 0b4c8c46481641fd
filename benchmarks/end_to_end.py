# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.end_to_end [--json] [--quick] [--peers]`: training end to end, beside its limits.

From raw keys to updated rows: Wide & Deep, DLRM and NeuMF on generated data, as parameter server and in one process, beside the
bare matrix products and beside PyTorch; in turns, medians. Invariant: it writes to a temporary folder only, and the last line
printed is the result. What cannot be had is null, and ``why`` says the reason.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.end_to_end")

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.benchmarks.end_to_end_cases import (
    BF16,
    NEAR,
    NEAR_ONE,
    ONE,
    PS_FORMS,
    SHARD_NAME,
    SLOW,
    Case,
    worker_names,
)
from oarlock.benchmarks.end_to_end_data import DataSize, generate_clicks, generate_pairs
from oarlock.benchmarks.end_to_end_peers import measure_peers
from oarlock.benchmarks.end_to_end_sides import Command, CommandSide, JobSide, Trains, Turns, torch_python
from oarlock.benchmarks.end_to_end_stages import hidden_share, stages_of, wire_bytes
from oarlock.launch.kernels import compile_or_load

STARTED = time.monotonic()
PACKAGES = ("numpy", "numba", "grpcio", "protobuf", "pyarrow", "torch")
DENSE_MODE = "every step"
# The bare matrix products on two threads, and on one.
Products = tuple[Command, Command | None]
LISTED_WINDOW_SECONDS, LISTED_ROUNDS, LISTED_LEARN_SAMPLES, LISTED_LEARN_BATCHES = 1.0, 3, 1 << 19, 128
REMOTE, ALONE, HIDDEN = "wdl_remote", "wdl_alone", "wdl_hidden"


@dataclass(frozen=True)
class Listed:
    """A case of Wide & Deep that is listed beside the keys."""

    name: str
    data: DataSize
    dim: int = 16
    batch: int = 2048
    forms: tuple[str, ...] = tuple(PS_FORMS)


@dataclass(frozen=True)
class Size:
    """How much is measured; seconds from the start: when rounds stop being begun, and then cases that are listed only."""

    data: DataSize
    pairs: int
    rounds: int
    window_seconds: float
    most_seconds: float
    # How many samples a job sees at least before its loss is judged.
    learn_samples: int
    # Whether the bare products are taken on one thread, too.
    one_thread: bool = True
    batch: int = 2048
    forms: tuple[str, ...] = tuple(PS_FORMS)
    listed: tuple[Listed, ...] = ()
    listed_seconds: float = 420.0


FIVE_MILLION = DataSize(1 << 20, 880_000, True)
SIZES = {
    "full": Size(
        FIVE_MILLION,
        1 << 21,
        7,
        1.2,
        240.0,
        1 << 19,
        listed=(
            Listed("wdl_8192", FIVE_MILLION, batch=8192),
            Listed("wdl_dim_64", FIVE_MILLION, dim=64),
            # Three tables of this size would take most of a machine's memory.
            Listed("wdl_33m", DataSize(1 << 20, 0, True), forms=("ps_1",)),
        ),
    ),
    # Only rows that some sample names exist, so that none is created while the clock runs; millions more would take their time.
    "quick": Size(
        DataSize(1 << 18, 880_000, False), 1 << 19, 3, 0.45, 28.0, 11 << 14, one_thread=False, forms=("ps_1",)
    ),
    "tiny": Size(DataSize(1 << 14, 2000, False), 1 << 12, 1, 0.02, 0.0, 1 << 13, batch=128),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m oarlock.benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the result")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--peers", action="store_true", help="run the folder of peers in $OARLOCK_PEERS too")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)

    name = "tiny" if options.tiny else "quick" if options.quick else "full"
    before = surroundings(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="oarlock-bench-") as folder:
        result = asyncio.run(measure(SIZES[name], Path(folder), say))
        if options.peers:
            (Path(folder) / "peers").mkdir()
            best = {case: side and result["configurations"][side] for case, side in result["best"].items()}
            found, reasons = measure_peers(best, Path(folder) / "peers", say)
            result = {**result, **found, "why": {**result["why"], **reasons}}
    after = surroundings(())["load_average"]
    ending = {"size": name, "surroundings": {**before, "load_average_after": after}}
    print(json.dumps({"benchmark": "end_to_end", **result, **ending, "seconds": round(time.monotonic() - STARTED, 1)}))
    return 0


async def measure(size: Size, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures."""
    why: dict[str, str] = {}
    # No process compiles while others are timed.
    compile_or_load()
    rows = generate_clicks(folder / "clicks", size.data)
    generate_pairs(folder / "pairs", size.pairs)
    say(f"{size.data.samples} samples, {rows} rows that exist before timing")
    module = ["-m", "oarlock.benchmarks.end_to_end_gemm"]
    gemm = Command(module, folder / "gemm-2.log", threads=2)
    # What a processor second is worth is not worth the time of another round.
    one_thread = Command(module, folder / "gemm-1.log", threads=1) if size.one_thread else None
    python = torch_python()
    torch = None
    if python is None:
        why |= dict.fromkeys(("wdl_ps_vs_torch", "ncf_ps_vs_torch"), "there is no PyTorch: make setup-torch")
    else:
        script = Path(__file__).with_name("end_to_end_torch.py")
        torch = Command([str(script)], folder / "torch.log", python=python)
    try:
        found = await _main_cases(size, folder, (gemm, one_thread), torch, why, say)
        listed = {}
        for each in size.listed:
            if time.monotonic() - STARTED > size.listed_seconds:
                why[each.name] = f"there was no time left: others took {size.listed_seconds:g} s"
                continue
            listed[each.name] = await _listed(each, folder, (gemm, one_thread), say)
    finally:
        gemm.close()
        if one_thread is not None:
            one_thread.close()
        if torch is not None:
            torch.close()
    return {**found, "listed": listed, "why": why}


async def _main_cases(
    size: Size,
    folder: Path,
    gemm: tuple[Command, Command | None],
    torch: Command | None,
    why: dict[str, str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    clicks, pairs = folder / "clicks", folder / "pairs"
    wdl = Case("wdl", "wdl", clicks, folder, batch=size.batch, ones=True, bf16=_has_torch(), forms=size.forms)
    dlrm = Case("dlrm", "dlrm", clicks, folder, batch=size.batch, forms=size.forms)
    ncf = Case("ncf", "ncf", pairs, folder, batch=size.batch, inprocess=False, forms=size.forms)
    cases = (wdl, dlrm, ncf)
    try:
        beside: dict[str, Trains] = {}
        if torch is not None:
            for case in (wdl, ncf):
                asked = {"model": case.model, "data": str(case.data), "dim": case.dim, "batch": case.batch}
                beside[f"{case.name}_torch"] = CommandSide(torch, asked)
        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(case.start())
            group.create_task(_load(beside))
        say("all processes are ready")
        sides = {name: side for case in cases for name, side in case.sides(*gemm).items()} | _special(wdl) | beside
        turns = Turns(size.window_seconds, sides)
        await turns.warm(say)
        rounds = await turns.take(size.rounds, STARTED + size.most_seconds)
        for case in cases:
            await case.learn(size.learn_samples)
        say("losses compared")
    finally:
        for case in cases:
            await case.close()
    best = {case.name: case.best(turns) for case in cases}
    learning = {name: found for case in cases for name, found in case.learning().items()}
    spreads = _spreads(turns, best)
    keys = _keys(spreads, learning, best, why)
    half = f"wdl_{BF16}"
    if half not in turns.windows:
        why["wdl_bf16_ps_samples_per_s"] = (
            "workers multiply in bfloat16 through PyTorch, which is not here: make setup-torch"
        )
    elif not learning[half]["learns"]:
        why["wdl_bf16_ps_samples_per_s"] = f"the loss did not fall as it does in process: {learning[half]}"
    else:
        keys["wdl_bf16_ps_samples_per_s"] = turns.figures(half)["samples_per_s"]
    fastest = best["wdl"] or turns.fastest([job.name for job in wdl.ps.values()])
    return {
        **keys,
        "dense_mode": DENSE_MODE,
        "pull_hidden": hidden_share(turns.windows.get(HIDDEN, [])),
        "bytes_per_sample": wire_bytes(turns.windows[fastest]),
        "best": best,
        "rows": {job.name: job.rows for case in cases for job in case.jobs()},
        "rounds": rounds,
        # Processors that others kept busy; where these are not nearly none, only per_cpu_s means anything.
        "others": turns.others(),
        "ratios": spreads,
        "learning": learning,
        "configurations": {name: turns.figures(name) for name in turns.windows},
        "stages_ms": {name: stages for name in turns.windows if (stages := stages_of(turns.windows[name]))},
    }


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


async def _load(sides: dict[str, Trains]) -> None:
    """Have processes that are asked take in their data, before anything is timed."""
    for side in sides.values():
        await side.run(0)


def _special(wdl: Case) -> dict[str, Trains]:
    """Return the sides of Wide & Deep that ask one question each."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Trains] = {HIDDEN: JobSide(wdl.one[ONE], {SLOW: 1})}
    if len(cores) > 1:
        worker = worker_names(1)[0]
        found[REMOTE] = JobSide(wdl.one[ONE], {worker: 1}, {worker: cores[0], SHARD_NAME: cores[1]})
        found[ALONE] = JobSide(wdl.one[NEAR_ONE], {NEAR: 1}, {NEAR: cores[0]})
    return found


# Which side each key compares with which; the name of a case stands for the better of its sides with a shard of their own.
COMPARED = {
    "wdl_inproc_vs_gemm": ("wdl_inproc", "wdl_gemm"),
    "wdl_ps_vs_gemm": ("wdl", "wdl_gemm"),
    "wdl_ps_dense_every_step_vs_gemm": ("wdl", "wdl_gemm"),
    "dlrm_inproc_vs_gemm": ("dlrm_inproc", "dlrm_gemm"),
    "dlrm_ps_vs_gemm": ("dlrm", "dlrm_gemm"),
    "remote_vs_inproc": (REMOTE, ALONE),
    "ncf_ps_vs_torch": ("ncf", "ncf_torch"),
    "wdl_ps_vs_torch": ("wdl", "wdl_torch"),
}


def _spreads(turns: Turns, best: dict[str, str | None]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key, (one, other) in COMPARED.items():
        side = best.get(one, one)
        if side in turns.windows and other in turns.windows:
            found[key] = turns.ratio(side, other)
    return found


def _keys(
    spreads: dict[str, dict[str, float]],
    learning: dict[str, dict[str, Any]],
    best: dict[str, str | None],
    why: dict[str, str],
) -> dict[str, float | None]:
    """Return the keys' medians; a key whose side did not learn is null, however fast that was."""
    found: dict[str, float | None] = {key: spreads[key]["median"] if key in spreads else None for key in COMPARED}
    for key, (one, _) in COMPARED.items():
        if (one in best and best[one] is None) or (one in learning and not learning[one]["learns"]):
            about = {name: was for name, was in learning.items() if name.startswith(one)}
            found[key], why[key] = None, f"the loss did not fall as it does in process: {about}"
    if found["remote_vs_inproc"] is None:
        why["remote_vs_inproc"] = "a worker and a shard with a core each need two"
    found["wdl_bf16_ps_samples_per_s"] = None
    return found


async def _listed(each: Listed, folder: Path, gemm: Products, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of a case that is listed beside the keys."""
    data = folder / f"{each.name}-data"
    case = Case(each.name, "wdl", data, folder, each.dim, each.batch, forms=each.forms)
    say(f"{case.name}: {await asyncio.to_thread(generate_clicks, data, each.data)} rows")
    try:
        await case.start()
        turns = Turns(LISTED_WINDOW_SECONDS, case.sides(*gemm))
        await turns.warm(say)
        await turns.take(LISTED_ROUNDS, float("inf"))
        await case.learn(max(LISTED_LEARN_SAMPLES, LISTED_LEARN_BATCHES * each.batch))
    finally:
        await case.close()
        shutil.rmtree(data)
    best = case.best(turns)
    ratios = {"inproc_vs_gemm": turns.ratio(f"{case.name}_inproc", f"{case.name}_gemm")}
    return {
        "ps_vs_gemm": best and turns.ratio(best, f"{case.name}_gemm")["median"],
        "inproc_vs_gemm": ratios["inproc_vs_gemm"]["median"],
        "ratios": {**ratios, **({"ps_vs_gemm": turns.ratio(best, f"{case.name}_gemm")} if best else {})},
        "best": best,
        "rows": {job.name: job.rows for job in case.jobs()},
        "learning": case.learning(),
        "configurations": {name: turns.figures(name) for name in turns.windows},
    }


if __name__ == "__main__":
    sys.exit(main())
