# SPDX-License-Identifier: Apache-2.0
"""Origin: the checkpoint with which a job begins that is made of another one, as people name it.

    first            the newest cut of the job in runs/first; also a job's folder
    first@12         that cut of it
    PATH[@12], URL   a folder of checkpoints anywhere, or one cut's folder

Invariant: an origin names one cut for good, whatever is added to its folder later; every file of it was looked at, with the
options with which the new job's processes will open it: those of its own place. Reads only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.place import Place, place_of, refuse_secret
from oarlock.checkpoint.store import CheckpointStore, is_url, open_checkpoint
from oarlock.client.job import JobSpec
from oarlock.client.warm import WarmStart, chosen, read_warm_start
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.launch.config import RunConfig, load_toml
from oarlock.launch.unchanged import check_unchanged, fixed_in, fixed_of
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable

RUNS = Path("runs")
# Of a job file, what belongs to one job alone, or says with what it began.
_OWN = ("security", "restore", "warm_start", "checkpoint_path", "checkpoint_options")
# What a manifest's plan says in the words of a job file.
_RUN = ("mode", "staleness", "ranks", "accumulate", "blas_threads", "epochs")


@dataclass(frozen=True)
class Origin:
    """A cut in ``store``; ``path`` names it alone. ``spec`` and ``values``: of the job that made it, if its folder is at hand."""

    path: str
    store: CheckpointStore
    manifest: Manifest
    spec: JobSpec | None
    values: dict[str, Any]


@contextmanager
def reading(root: str) -> Iterator[None]:
    """Say what a file system that does not answer means."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the checkpoints in {root} cannot be read: {error}") from None


def find_origin(target: str, place: Place | None = None) -> Origin:
    """Return the origin that ``target`` means; NotFound says what there is.

    A URL is opened with the options of ``place``, as far as they can be meant for it; a job is, with its own.
    """
    if not target or "\0" in target or target.startswith("@"):
        raise InvalidArgument(
            f"checkpoint {target!r}: give the name or folder of a job, a folder of checkpoints or a URL, with @CUT behind it "
            "unless the newest is meant"
        )
    refuse_secret(target, "checkpoint")
    name, cut = (target, None) if is_url(target) or Path(target).is_dir() else split_cut(target)
    job = next((f for f in (Path(name), RUNS / name) if not is_url(name) and (f / "job.json").exists()), None)
    options: Mapping[str, Any] = (place or Place()).options_for(target)
    if job is not None:
        place = place_of(JobSpec.from_json((job / "job.json").read_text(encoding="utf-8")))
        target, options = place.root(job.absolute()) + ("" if cut is None else f"@{cut}"), place.options
    elif not is_url(target) and not Path(name).exists():
        known = sorted(p.parent.name for p in RUNS.glob("*/job.json"))
        raise NotFound(
            f"no checkpoint {target!r}: {name} is no job under {RUNS}/, no folder and no URL; jobs: {', '.join(known) or 'none'}"
        )
    elif not is_url(target):
        target = str(Path(target).absolute())
    with reading(target):
        store, manifest = open_checkpoint(target, options=options)
    path = f"{store.files.root}/{cut_folder(manifest.cut)}"
    folder = job or (None if is_url(path) else Path(path).parent.parent)
    spec, values = _job_of(folder, manifest) if folder is not None else (None, {})
    return Origin(path, store, manifest, spec, values)


def settled(run: RunConfig, tables: Sequence[TableSpec], dense: Sequence[DenseSpec]) -> WarmStart:
    """Return a run's warm start with its cut and all names said for good; what it takes over goes together and is whole."""
    warm = read_warm_start(run.warm_start, "job file")
    place = place_of(run)
    origin = find_origin(find_origin(warm.path, place).path, place)
    mine = {t.name: t for t in tables}, {d.name: d for d in dense}
    manifest = origin.manifest
    found = chosen(replace(warm, path=origin.path), *mine, manifest.table_specs(), manifest.dense_specs())
    names = {("rows", n) for n in found.tables.values()} | {("dense", n) for n in found.dense.values()}
    with reading(origin.path):
        origin.store.verify(manifest, [e for e in manifest.blocks if (e.kind, e.name) in names])
    return found


def _job_of(folder: Path, manifest: Manifest) -> tuple[JobSpec | None, dict[str, Any]]:
    """Return the job beside whose folder of checkpoints this is, if it is the one that made the cut."""
    try:
        spec = JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
        return (spec, load_toml(folder / "job.toml")) if spec.job == manifest.job else (None, {})
    except (OSError, UnicodeDecodeError, PSError):
        return None, {}


def values_of(origin: Origin) -> dict[str, Any]:
    """Return the values of a job file that goes on from ``origin`` as the job did that made it."""
    if origin.values:
        base = dict(origin.values)
    else:
        plan = origin.manifest.metrics.get(PLAN)
        plan = plan if isinstance(plan, dict) else {}
        options = {name: value for name, value in origin.manifest.config.items() if value is not None}
        base = {"recipe": origin.manifest.recipe, "seed": origin.manifest.seed, "recipe_options": options}
        base |= {name: plan[name] for name in _RUN if name in plan}
    return {**{name: value for name, value in base.items() if name not in _OWN}, "restore": origin.path}


def check_continues(run: RunConfig, spec: JobSpec) -> None:
    """Raise unless a job that was planned goes on exactly where its ``restore`` ends, and all of that is whole."""
    origin = find_origin(run.restore, place_of(spec))
    was = fixed_of(origin.spec) if origin.spec is not None else fixed_in(origin.manifest)
    check_unchanged(was, spec, run.recipe_options, moved=True)
    with reading(origin.path):
        origin.store.verify(origin.manifest)
