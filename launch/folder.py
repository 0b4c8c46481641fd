# SPDX-License-Identifier: Apache-2.0
"""A job's folder: job.toml (resolved), job.json (the spec), the coordinator's address and state, logs and checkpoints.

Invariant: a folder belongs to one job for ever; a new job never takes over a folder that has one.
"""

import logging
import os
import re
import secrets
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.line import Restore, restores_in
from oarlock.checkpoint.place import check_owner, place_of
from oarlock.client.compression import feedback_of
from oarlock.client.entry import read_address
from oarlock.client.job import FAILED, OVER, JobSpec
from oarlock.client.warm import to_values
from oarlock.cluster.autoscaling import FACT as AUTOSCALE
from oarlock.cluster.events import FACT as EVENTS
from oarlock.cluster.recoveries import FACT as RECOVERIES
from oarlock.cluster.store import Store
from oarlock.data.scores import merit
from oarlock.launch.beginning import cut_to_resume
from oarlock.launch.config import RunConfig, load_toml, run_config, to_toml
from oarlock.launch.job import make_spec
from oarlock.launch.origin import RUNS, check_continues, find_origin, reading, settled
from oarlock.launch.unchanged import check_unchanged, fixed_of
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
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
    if run.restore:
        # One cut for good: its folder may get newer ones.
        run = replace(run, restore=find_origin(run.restore, place_of(run)).path)
        spec = make_spec(run, name)
        check_continues(run, spec)
    else:
        spec = make_spec(run, name)
        if spec.warm_start:
            spec = replace(spec, warm_start=settled(run, spec.tables, spec.dense))
            run = replace(run, warm_start=to_values(spec.warm_start))
    if spec.checkpoint_path:
        with reading(spec.checkpoint_path):
            check_owner(place_of(spec).open(folder), spec.job)
    _write(folder, run, spec)
    return spec


def resume(folder: Path, changes: dict[str, Any], *, cut: int | None = None) -> tuple[JobSpec, str]:
    """Plan the rest of a folder's job with some fields changed; return its spec and the checkpoint to begin from.

    That is cut ``cut``, or the newest of the job's line of history. CorruptCheckpoint has the next older whole one as ``older``.
    """
    old = read_spec(folder)
    if is_running(folder):
        raise Unavailable(f"job {old.name} is running: stop it before it is resumed")
    values = load_toml(folder / "job.toml")
    options = {**values.get("recipe_options", {}), **changes.get("recipe_options", {})}
    compression = _merged(values.get("compression", {}), changes.get("compression", {}))
    autoscale = changes.get("autoscale", {})
    if isinstance(autoscale, dict):
        autoscale = {**values.get("autoscale", {}), **autoscale}
    changes = {**changes, "compression": compression, "autoscale": autoscale}
    run = run_config({**values, **changes, "recipe_options": options})
    spec = make_spec(run, old.name, job=old.job)
    if (spec.restore, spec.warm_start) != (old.restore, old.warm_start):
        raise InvalidArgument(
            f"restore = {spec.restore!r}, warm_start = {to_values(spec.warm_start)}: with what a job began cannot change; "
            "to go back to a cut of the job itself give --restore @CUT"
        )
    check_unchanged(fixed_of(old), spec, options)
    store = place_of(spec).open(folder)
    with reading(store.files.root):
        moved = spec.checkpoint_path != old.checkpoint_path and not store.cuts()
    if moved:
        # From now on its checkpoints go elsewhere; those that there are stay where they are.
        store = place_of(old).open(folder)
    with reading(store.files.root):
        path = cut_to_resume(store, old, stored_restores(folder), cut)
    _write(folder, run, spec)
    return spec, path


def _merged(old: dict[str, Any], changes: Any) -> Any:
    """Return the settings of each table with those that change; what is no table is refused where it is read."""
    if not isinstance(changes, dict):
        return changes
    out = dict(old)
    for table, settings in changes.items():
        was = old.get(table)
        out[table] = {**was, **settings} if isinstance(was, dict) and isinstance(settings, dict) else settings
    return out


def _write(folder: Path, run: RunConfig, spec: JobSpec) -> None:
    data = str(Path(run.data).absolute())
    run = replace(run, data=data, ranks=spec.ranks, checkpoint_path=spec.checkpoint_path)
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


def stored_security(folder: Path | None) -> dict[str, Any]:
    """Return what a folder's job goes by towards others, as fields of a SecuritySpec; empty if no folder is known."""
    if folder is None or not (folder / "job.toml").exists():
        return {}
    values = load_toml(folder / "job.toml").get("security", {})
    return values if isinstance(values, dict) else {}


def stored_run(folder: Path) -> int:
    """Return the run that a folder's state is in, 0 if it has none yet; Unavailable while a coordinator holds it."""
    store = Store(folder / STATE_FILE).open()
    try:
        return int(store.fact("run", 0))
    finally:
        store.close()


def stored_restores(folder: Path) -> list[Restore] | None:
    """Return the restores of a folder's job, None if its coordinator's file is lost or knows of no run."""
    if not (folder / STATE_FILE).exists():
        return None
    store = Store(folder / STATE_FILE).open()
    try:
        return restores_in(store.fact(EVENTS, [])) if store.fact("term") else None
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
            names = (
                "phase",
                "reason",
                "run",
                "checkpoints",
                "closed",
                "counted",
                "best_cut",
                EVENTS,
                RECOVERIES,
                AUTOSCALE,
            )
            facts = {n: store.fact(n) for n in names}
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
        "mode": spec.mode,
        "ranks": spec.ranks,
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
        "events": facts[EVENTS] or [],
        "recoveries": facts[RECOVERIES] or [],
        **({"autoscale": {"decisions": facts[AUTOSCALE] or []}} if spec.autoscale else {}),
        "cut": {"best": facts["best_cut"]} if facts["best_cut"] else {},
        "warnings": [],
        "members": [],
    }
