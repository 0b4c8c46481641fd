# SPDX-License-Identifier: Apache-2.0
"""`oarlock train`, `oarlock prepare` and `oarlock demo`: from options to a job folder to a finished job."""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oarlock.checkpoint.place import Place
from oarlock.cli.restore_options import cut_of, warm_start_of
from oarlock.cli.show import RunView, metric
from oarlock.client.autoscale import read_autoscale
from oarlock.client.job import DONE, JobSpec
from oarlock.client.processors import forced_kernels, loaded_blas
from oarlock.client.security import security_values
from oarlock.client.trace import trace_target
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import assign, load_toml, run_config
from oarlock.launch.folder import create, job_folder, read_run, resume
from oarlock.launch.inprocess import refuse_scaler, run_in_process
from oarlock.launch.kernels import make_ready
from oarlock.launch.origin import find_origin, values_of
from oarlock.launch.processes import LocalProcesses
from oarlock.launch.processors import processors_of
from oarlock.launch.trace import traced_job
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, Unavailable
from oarlock.proto.security import Security
from oarlock.telemetry.log import to_file

_OPTIONS = (
    "epochs",
    "seed",
    "servers",
    "workers",
    "mode",
    "staleness",
    "ranks",
    "accumulate",
    "compute_threads",
    "blas_threads",
    "network_threads",
    "request_memory_bytes",
    "server_pin_cores",
    "worker_pin_cores",
    "reader",
    "restarts",
    "replicas",
    "on_loss",
    "moves_in_flight",
    "data",
)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line sets, as nested values."""
    values: dict[str, Any] = {}
    for setting in options.set:
        assign(values, setting)
    values.update({n: getattr(options, n) for n in _OPTIONS if getattr(options, n, None) is not None})
    if security := security_values(options):
        values["security"] = {**values.get("security", {}), **security}
    return values


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in over.items():
        out[name] = _merged(out[name], value) if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out


def _base(options: argparse.Namespace) -> dict[str, Any]:
    return load_toml(Path(options.recipe)) if options.recipe.endswith(".toml") else {"recipe": options.recipe}


def _values(options: argparse.Namespace) -> dict[str, Any]:
    values = _merged(_base(options), _changes(options))
    if warm := warm_start_of(options):
        # A job file may say the rest, such as dimension.
        values["warm_start"] = {**values.get("warm_start", {}), **{n: v for n, v in warm.items() if v}}
    if options.restore:
        values["restore"] = options.restore
    if values.get("restore"):
        # A job that goes on with another one's training is like that one in all that is not said here.
        place = Place(str(values.get("checkpoint_path", "")), values.get("checkpoint_options", {}))
        began = values_of(find_origin(str(values["restore"]), place))
        values = {**_merged(began, values), "restore": began["restore"]}
    if not values.get("data"):
        raise InvalidArgument("no data: give --data DIR, or `data` in the job file")
    return values


def train(options: argparse.Namespace) -> int:
    """Train a recipe or job file to its end."""
    name, folder = job_folder(options.name, options.dir)
    if options.trace is not None:
        # Before anything is made: the trace is what the user waits for.
        options.trace = trace_target(options.trace)
    restore = ""
    if options.resume:
        # A job file may change what may be changed; a recipe's name says again which it is.
        changes = _merged(_base(options), _changes(options))
        try:
            spec, restore = resume(folder, changes, cut=cut_of(options.restore) if options.restore else None)
        except CorruptCheckpoint as error:
            older = error.details.get("older")
            how = f"; `{_resumed(options, folder)} --restore @{older}` goes on from that one" if older else ""
            raise CorruptCheckpoint(f"{error.message}{how}", **error.details) from None
    else:
        run_as = run_config(_values(options))
        # Before there is a folder that another try would find taken.
        processors_of(run_as)
        if options.in_process:
            refuse_scaler(read_autoscale(run_as.autoscale, "job file"))
        spec = create(folder, name, run_as)
    return run(spec, folder, restore, options)


def prepare(options: argparse.Namespace) -> int:
    """Plan a job and write its folder."""
    name, folder = job_folder(options.name, options.dir)
    create(folder, name, run_config(_values(options)))
    print(folder)
    return 0


def demo(options: argparse.Namespace) -> int:
    """Generate planted preferences and train NCF on them."""
    with tempfile.TemporaryDirectory(prefix="oarlock-demo-") as temporary:
        data = Path(temporary) / "data"
        info = generate_ncf(data, seed=options.seed or 0)
        options.recipe, options.data, options.resume = "ncf", str(data), False
        options.restore = options.warm_start = ""
        options.accept_signature = False
        if options.epochs is None:
            options.epochs = 6
        kept = ""
        if not options.dir and not options.name:
            options.dir = str(Path(temporary) / "job")
            kept = ", and so is the job: --name keeps its folder"
        print(
            f"generated {info.train_rows} pairs of {info.users} users and {info.items} items; "
            f"the best possible hr@10 is {info.figures['best_hr@10']:.3f}, popularity alone reaches "
            f"{info.figures['popularity_hr@10']:.3f}. The data are temporary{kept}",
            file=sys.stderr,
        )
        return train(options)


def run(spec: JobSpec, folder: Path, restore: str, options: argparse.Namespace) -> int:
    """Run a planned job; print its result; return the exit code."""
    begun = time.monotonic()
    settled = read_run(folder)
    processors = processors_of(settled)
    security = Security(settled.security_spec(), own=True).open()
    with RunView("https" if security.serves_tls else "http") as view, _interrupts() as interrupts:
        view.say(f"job {spec.name} in {folder}: {_described(spec, options.in_process)}")
        view.say(processors.described(spec, loaded_blas()))
        for words in (*forced_kernels(os.environ), *processors.warnings(spec)):
            view.say(f"warning: {words}")

        make_ready(view.say)

        def watch(status: dict[str, Any]) -> bool:
            if status:
                view.show(status)
            if interrupts.count > 1:
                raise KeyboardInterrupt
            return not interrupts.count

        with traced_job(options.trace, folder, view.say) as parts:
            if options.in_process:
                to_file(folder / "logs" / "job.log", options.log_level)
                status = run_in_process(
                    spec,
                    folder,
                    restore=restore,
                    accept_signature=options.accept_signature,
                    watch=watch,
                    metrics_port=options.metrics_port,
                    processors=processors,
                    trace=parts.next("job", 0) if parts is not None else None,
                    security=security,
                )
            else:
                to_file(folder / "logs" / "launcher.log", options.log_level)
                launched = LocalProcesses(
                    spec,
                    folder,
                    restore=restore,
                    accept_signature=options.accept_signature,
                    log_level=options.log_level,
                    restarts=settled.restarts,
                    metrics_port=options.metrics_port,
                    processors=processors,
                    trace=parts,
                    security=security,
                )
                status = asyncio.run(launched.run(watch))
        view.show(status)
        if status["phase"] == "failed":
            raise Unavailable(f"job {spec.name} failed: {status['reason']}")
        view.table(status)
        if status["phase"] != DONE:
            view.say(f"job {spec.name} was stopped ({status['reason']}); {_how_to_go_on(options, folder, status)}")
    result = summary(spec, status, time.monotonic() - begun)
    print(json.dumps(result) if options.json else _sentence(result))
    sys.stdout.flush()
    return 0 if status["phase"] == DONE else 130


def _how_to_go_on(options: argparse.Namespace, folder: Path, status: dict[str, Any]) -> str:
    if not status["checkpoints"]:
        return "there is no checkpoint to go on from"
    return f"go on with `{_resumed(options, folder)}`"


def _resumed(options: argparse.Namespace, folder: Path) -> str:
    """Return the command that goes on with a job."""
    where = f"--dir {options.dir}" if options.dir else f"--name {folder.name}"
    return f"oarlock train {options.recipe} {where} --resume"


class _Interrupts:
    """How often the user asked to stop."""

    count = 0


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Count SIGINT and SIGTERM: the first one asks for a checkpoint and an end, the second one for an end."""
    state = _Interrupts()

    def note(number: int, frame: object) -> None:
        state.count += 1

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _described(spec: JobSpec, in_process: bool) -> str:
    where = "in one process" if in_process else f"{spec.servers} servers, {spec.workers} workers"
    return f"{spec.recipe}, {where}, {spec.epochs} epochs of {spec.splits} splits, seed {spec.seed}"


def summary(spec: JobSpec, status: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what `--json` prints: the best epoch by the first metric, totals, and how it was run."""
    history, best = status["history"], status["best"]
    samples = sum(r["samples"] for r in history)
    train_seconds = sum(r["train_seconds"] for r in history)
    # Of an epoch that was not ended: trained and kept, though the epoch has no result yet.
    unfinished = status["samples"] if status["phase"] != DONE else 0
    out: dict[str, Any] = {}
    if best:
        out.update(best["metrics"])
        out["best_epoch"] = best["epoch"] + 1
        out.update({f"last_{n}": v for n, v in history[-1]["metrics"].items()})
    return {
        **out,
        "samples_per_s": round(samples / train_seconds, 1) if train_seconds else 0.0,
        "samples_trained": samples + unfinished,
        "epochs": len(history),
        "loss": history[-1]["loss"] if history else None,
        "train_seconds": round(train_seconds, 3),
        "evaluate_seconds": round(sum(r["evaluate_seconds"] for r in history), 3),
        "seconds": round(seconds, 3),
        "servers": spec.servers,
        "workers": spec.workers,
        "reader": status.get("reader") or spec.reader,
        "seed": spec.seed,
        "name": spec.name,
        "phase": status["phase"],
        "run": status["run"],
        "restarts": status.get("restarts", 0),
        "checkpoint": status["checkpoints"][-1]["path"] if status["checkpoints"] else None,
        "config": spec.config,
        **{n: status[n] for n in ("residual_splits_lost",) if n in status},
        "history": history,
    }


def _sentence(result: dict[str, Any]) -> str:
    metrics = result["history"][-1]["metrics"] if result["history"] else ()
    best_is_last = result.get("best_epoch") == len(result["history"])
    shown = {n: n for n in ("samples_per_s", "samples_trained", "seconds", "reader")}
    # The newest one, not the one of the best epoch.
    shown["checkpoint"] = "last_checkpoint"
    return "  ".join(
        [
            *(f"{n} {metric(result[n])}" for n in metrics),
            *([f"best_epoch {result['best_epoch']}"] if "best_epoch" in result else []),
            *(f"last_{n} {metric(result[f'last_{n}'])}" for n in metrics if f"last_{n}" in result and not best_is_last),
            *(f"{told} {result[n]}" for n, told in shown.items() if result.get(n) is not None),
        ]
    )
