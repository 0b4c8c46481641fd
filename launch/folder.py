# SPDX-License-Identifier: Apache-2.0
"""A job's folder: job.toml (resolved), job.json (the spec), the coordinator's address and state, logs and checkpoints.

Invariant: a folder belongs to one job for ever; a new job never takes over a folder that has one.
"""

import json
import re
import secrets
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.store import LocalStore
from oarlock.client.entry import ADDRESS_FILE, read_address
from oarlock.client.job import JobSpec
from oarlock.launch.config import RunConfig, load_toml, run_config, to_toml
from oarlock.launch.job import make_spec
from oarlock.proto.errors import InvalidArgument, NotFound, SpecMismatch

RUNS = Path("runs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
# What a run may change when it goes on from a checkpoint: nothing that a batch or a row depends on.
_FIXED = ("seed", "recipe", "tables", "dense", "files", "splits", "rows_per_split", "batch_rows", "config")


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
    try:
        old = JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
    except OSError:
        raise NotFound(f"{folder} holds no job: there is nothing to resume") from None
    values = load_toml(folder / "job.toml")
    options = {**values.get("recipe_options", {}), **changes.pop("recipe_options", {})}
    run = run_config({**values, **changes, "recipe_options": options})
    store = LocalStore(folder / "checkpoints")
    manifest = store.latest()
    if manifest is None:
        raise NotFound(f"{folder / 'checkpoints'} holds no whole checkpoint: train anew under another --name")
    spec = make_spec(run, old.name, job=old.job)
    for name in _FIXED:
        if getattr(spec, name) != getattr(old, name) and json.dumps(_plain(spec, name)) != json.dumps(
            _plain(old, name)
        ):
            raise SpecMismatch(
                f"{name} differs from the checkpoint's, and cannot change in a job that goes on", field=name
            )
    store.verify(manifest)
    _write(folder, run, spec)
    return spec, str(folder / "checkpoints" / f"cut-{manifest.cut:06d}")


def _plain(spec: JobSpec, name: str) -> Any:
    return json.loads(spec.to_json())[name]


def _write(folder: Path, run: RunConfig, spec: JobSpec) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        run = replace(run, data=str(Path(run.data).absolute()))
        (folder / "job.toml").write_text(to_toml(run, spec.config), encoding="utf-8")
        (folder / "job.json").write_text(spec.to_json(), encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be written: {error.strerror}") from None


def locate(job: str) -> tuple[Path | None, str | None]:
    """Return (folder, coordinator's address) of a JOB given as a name, a folder or an address; either may be unknown."""
    for folder in (Path(job), RUNS / job):
        if (folder / "job.json").exists():
            return folder, read_address(folder) if (folder / ADDRESS_FILE).exists() else None
    if ":" in job:
        return None, job
    known = sorted(p.parent.name for p in RUNS.glob("*/job.json"))
    raise NotFound(
        f"no job {job!r}: give a name, a folder or host:port. Jobs under {RUNS}/: {', '.join(known) or 'none'}"
    )


def stored_status(folder: Path) -> dict[str, Any]:
    """Return what the coordinator's file says of a job that is not running."""
    spec = JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
    path = folder / "state.sqlite"
    if not path.exists():
        raise NotFound(f"{folder}: the job was never started")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1) as db:
            facts = {n: json.loads(v) for n, v in db.execute("SELECT name, value FROM facts")}
            history = [json.loads(v) for (v,) in db.execute("SELECT value FROM epochs ORDER BY epoch")]
    except sqlite3.DatabaseError as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from None
    phase = facts.get("phase", "gathering")
    best = max(history, key=lambda r: (r["metrics"].get(spec.metrics[0], 0.0), -r["epoch"])) if history else None
    return {
        "job": spec.job,
        "name": spec.name,
        "recipe": spec.recipe,
        "seed": spec.seed,
        "phase": phase if phase in ("done", "stopped", "failed") else "not running",
        "reason": facts.get("reason", ""),
        "run": facts.get("run", 1),
        "epoch": len(history),
        "epochs": spec.epochs,
        "servers": spec.servers,
        "workers": spec.workers,
        "best": best,
        "history": history,
        "checkpoints": facts.get("checkpoints", []),
        "members": [],
    }
