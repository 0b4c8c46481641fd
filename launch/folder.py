# SPDX-License-Identifier: Apache-2.0
"""A job's folder: job.toml (resolved), job.json (the spec), the coordinator's address and state, logs and checkpoints.

Invariant: a folder belongs to one job for ever; a new job never takes over a folder that has one.
"""

import json
import logging
import os
import re
import secrets
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.store import LocalStore
from oarlock.client.compression import feedback_of
from oarlock.client.entry import read_address
from oarlock.client.job import FAILED, OVER, JobSpec
from oarlock.cluster.store import Store
from oarlock.data.scores import merit
from oarlock.launch.config import RunConfig, load_toml, run_config, to_toml
from oarlock.launch.job import make_spec
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, PSError, SpecMismatch, Unavailable
from oarlock.worker.recipe import load_recipe

logger = logging.getLogger(__name__)

RUNS = Path("runs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
# What a run may change when it goes on from a checkpoint: nothing that a batch or a row depends on. Threads may change the
# order of sums and of pushes, which sync alone fixes.
_FIXED = (
    "recipe",
    "seed",
    "config",
    "transforms",
    "tables",
    "dense",
    "batch_rows",
    "accumulate",
    "ranks",
    "rows_per_split",
    "files",
    "splits",
    "evaluation_rows_per_split",
    "evaluation_files",
    "evaluation_splits",
    "metrics",
)
STATE_FILE = "state.sqlite"


def job_folder(name: str, folder: str) -> tuple[str, Path]:
    """Return the (name, folder) of a job: what was given, else generated."""
    if name and not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"job name {name!r}: use 1 to 100 letters, digits, '_', '-' or '.', beginning with a letter or digit"
        )
    name = name or (Path(folder).name if folder else f"job-{secrets.token_hex(3)}")
    return name, Path(folder).absolute() if folder else (RUNS / name).absolute()


def create(folder: Path, name: str, run: RunConfig) -> JobSpec:
    """Plan a new job and write its folder."""
    if (folder / "job.json").exists():
        raise InvalidArgument(f"{folder} holds a job already: go on with --resume, or choose another --name or --dir")
    spec = make_spec(run, name)
    _write(folder, run, spec)
    return spec


def resume(folder: Path, changes: dict[str, Any]) -> tuple[JobSpec, str]:
    """Plan the rest of a folder's job with some fields changed; return its spec and the checkpoint to begin from."""
    old = read_spec(folder)
    if is_running(folder):
        raise Unavailable(f"job {old.name} is running: stop it before it is resumed")
    values = load_toml(folder / "job.toml")
    options = {**values.get("recipe_options", {}), **changes.get("recipe_options", {})}
    compression = _merged(values.get("compression", {}), changes.get("compression", {}))
    run = run_config({**values, **changes, "recipe_options": options, "compression": compression})
    store = LocalStore(folder / "checkpoints")
    manifest = store.latest()
    if manifest is None:
        raise NotFound(f"{folder / 'checkpoints'} holds no whole checkpoint: train anew under another --name")
    spec = make_spec(run, old.name, job=old.job)
    for name in (*_FIXED, "blas_threads") if old.ranks else _FIXED:
        was, wanted = _plain(old, name), _plain(spec, name)
        if name == "config":
            was |= _newer(load_recipe(spec.recipe).Config, was, wanted, options)
        if was != wanted:
            raise SpecMismatch(_difference(name, was, wanted), field=name)
    try:
        store.verify(manifest)
    except CorruptCheckpoint as error:
        cut = folder / "checkpoints" / cut_folder(manifest.cut)
        raise CorruptCheckpoint(f"{error}; move {cut} away to go on from an older one", **error.details) from None
    _write(folder, run, spec)
    return spec, str(folder / "checkpoints" / cut_folder(manifest.cut))


def _merged(old: dict[str, Any], changes: Any) -> Any:
    """Return the settings of each table with those that change; what is no table is refused where it is read."""
    if not isinstance(changes, dict):
        return changes
    out = dict(old)
    for table, settings in changes.items():
        was = old.get(table)
        out[table] = {**was, **settings} if isinstance(was, dict) and isinstance(settings, dict) else settings
    return out


def _plain(spec: JobSpec, name: str) -> Any:
    return json.loads(spec.to_json())[name]


def _newer(kind: type, was: dict[str, Any], wanted: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe's Config that there were not yet when the job was made, as the job then did without them.

    That is their default, or what the plan made of it; whoever gives another value changes them.
    """
    out = {}
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in was and f.name in wanted and default is not MISSING:
            default = json.loads(json.dumps(default))
            out[f.name] = wanted[f.name] if given.get(f.name, default) == default else default
    return out


def _difference(name: str, was: Any, wanted: Any) -> str:
    """Say what cannot change in a job that goes on, as near to what the user wrote as possible."""
    if isinstance(was, dict) and isinstance(wanted, dict):
        part = next(k for k in [*was, *wanted] if was.get(k) != wanted.get(k))
        name, was, wanted = f"recipe_options.{part}", was.get(part), wanted.get(part)
    shown = f" (it was {was!r}, now {wanted!r})" if len(repr(was)) + len(repr(wanted)) < 100 else ""
    return f"{name} cannot change in a job that goes on from a checkpoint{shown}; train anew under another --name"


def _write(folder: Path, run: RunConfig, spec: JobSpec) -> None:
    run = replace(run, data=str(Path(run.data).absolute()), ranks=spec.ranks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        # Whole or not at all, and job.json last: it is what makes the folder a job's.
        for name, text in (("job.toml", to_toml(run, spec.config)), ("job.json", spec.to_json())):
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be written: {error.strerror}") from None


def read_spec(folder: Path) -> JobSpec:
    """Return the spec of a folder's job."""
    try:
        return JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{folder} holds no job: it has no job.json") from None
    except (OSError, UnicodeDecodeError, InvalidArgument) as error:
        raise InvalidArgument(f"{folder / 'job.json'} cannot be read: {error}") from None


def read_run(folder: Path) -> RunConfig:
    """Return the resolved configuration of a folder's job."""
    return run_config(load_toml(folder / "job.toml"))


def stored_run(folder: Path) -> int:
    """Return the run that a folder's state is in, 0 if it has none yet; Unavailable while a coordinator holds it."""
    store = Store(folder / STATE_FILE).open()
    try:
        return int(store.fact("run", 0))
    finally:
        store.close()


def is_running(folder: Path) -> bool:
    """Return whether a coordinator holds the state of a folder's job."""
    if not (folder / STATE_FILE).exists():
        return False
    try:
        Store(folder / STATE_FILE).open().close()
    except Unavailable:
        return True
    except InvalidArgument:
        return False
    return False


def record_failure(folder: Path, reason: str) -> None:
    """Note why a job failed whose coordinator could not note it any more."""
    store = Store(folder / STATE_FILE)
    try:
        with store.open():
            store.set_fact("phase", FAILED)
            store.set_fact("reason", reason)
    except PSError as error:
        logger.warning("event=failure_unrecorded error=%s", error)
    finally:
        store.close()


def locate(job: str) -> tuple[Path | None, str | None]:
    """Return (folder, coordinator's address) of a JOB given as a name, a folder or an address; either may be unknown."""
    for folder in (Path(job), RUNS / job):
        if (folder / "job.json").exists():
            try:
                return folder, read_address(folder)
            except PSError:
                return folder, None
    if ":" in job:
        return None, job
    known = sorted(p.parent.name for p in RUNS.glob("*/job.json"))
    raise NotFound(
        f"no job {job!r}: give a name, a folder or host:port. Jobs under {RUNS}/: {', '.join(known) or 'none'}"
    )


def stored_status(folder: Path) -> dict[str, Any]:
    """Return what the coordinator's file says of a job that is not running."""
    spec = read_spec(folder)
    path = folder / STATE_FILE
    if not path.exists():
        raise NotFound(f"{folder}: the job was never started")
    store = Store(path)
    try:
        with store.open():
            facts = {n: store.fact(n) for n in ("phase", "reason", "run", "checkpoints", "closed", "counted")}
            history = store.epochs()
    except Unavailable:
        raise Unavailable(
            f"job {spec.name} is running, but cannot be asked: it runs in one process, or its coordinator is stuck"
        ) from None
    finally:
        store.close()
    phase = facts["phase"] or "never begun"
    best = None
    if history and spec.metrics:
        first = spec.metrics[0]
        best = max(history, key=lambda r: (merit(first, r["metrics"].get(first)), -r["epoch"]))
    closed = facts["closed"] or {"floor": 0, "above": []}
    return {
        "job": spec.job,
        "name": spec.name,
        "recipe": spec.recipe,
        "seed": spec.seed,
        "phase": phase if phase in OVER else "not running",
        "reason": facts["reason"] or "",
        "run": facts["run"] or 1,
        "epoch": len(history),
        "epochs": spec.epochs,
        "splits_closed": closed["floor"] - len(history) * spec.splits + len(closed["above"]),
        "splits": spec.splits,
        "evaluated": 0,
        "evaluation_splits": spec.evaluation_splits,
        "samples": (facts["counted"] or {}).get("samples", 0),
        **(
            {"residual_splits_lost": (facts["counted"] or {}).get("given_back", 0)}
            if feedback_of(spec.compression)
            else {}
        ),
        **(
            {"compression": {name: asdict(wire) for name, wire in spec.compression.items()}} if spec.compression else {}
        ),
        "servers": spec.servers,
        "workers": spec.workers,
        "best": best,
        "history": history,
        "checkpoints": facts["checkpoints"] or [],
        "warnings": [],
        "members": [],
    }
