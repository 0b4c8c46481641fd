# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint, or a job, to its predictor: the recipe's own transforms and graph, as they were when the job was planned.

Invariant: what a checkpoint says is not believed: a recipe that is none of Oarlock's own is imported only if the user named it,
the transforms have the digest of the manifest, and the graph has the tables and dense parameters that the cut has. NoPrediction
says why a model gives rows alone. Reads only.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.checkpoint.files import Files
from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.transforms_file import digest_of, read_transforms
from oarlock.client.job import JobSpec
from oarlock.launch.folder import read_spec
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, SpecMismatch, Unavailable
from oarlock.serving.predictor import Predictor, Recipe
from oarlock.worker.recipe import Predicts, load_recipe, recipe_name

OWN = "oarlock.recipes."
# Graphs at once; beyond it they share the processors' caches too thinly.
MOST_SCORERS = 4


class NoPrediction(Exception):
    """Why there are no predictions, in words."""


def scorers(*, waiting: bool = False) -> int:
    """Return how many batches are computed at once where nothing is said: one for each processor, within bounds; the most where
    they are ``waiting`` for others most of the time."""
    return MOST_SCORERS if waiting else max(1, min(MOST_SCORERS, len(os.sched_getaffinity(0))))


def job_beside(path: str) -> Path | None:
    """Return the folder of the job whose checkpoints, or one of them, ``path`` names, if it is on this machine."""
    if "://" in path:
        return None
    folder = Path(path.rpartition("@")[0] if "@" in Path(path).name else path).absolute()
    return next((each for each in (folder.parent, folder.parent.parent) if (each / "job.json").is_file()), None)


def predictor_of(
    manifest: Manifest, *, files: Files | None = None, job: Path | None = None, recipe: str = "", scorers: int = 1
) -> Predictor:
    """Return the predictor of a cut in ``files``; ``job``: its job's folder, ``recipe``: what the user says it is.

    NoPrediction where the checkpoint has none; InvalidArgument where what the user named does not go with it.
    """
    return _unless_none(manifest.recipe, recipe, lambda name: _made(spec_of(manifest, files, job), name, scorers))


def predictor_of_job(spec: JobSpec, *, recipe: str = "", scorers: int = 1) -> Predictor:
    """Return the predictor of a job, by what its folder has; ``recipe`` and errors as ``predictor_of`` has them."""
    return _unless_none(spec.recipe, recipe, lambda name: _made(spec, name, scorers))


def _unless_none(name: str, recipe: str, make: Callable[[str], Predictor]) -> Predictor:
    if recipe:
        if recipe_name(recipe) != name:
            raise InvalidArgument(f"--recipe {recipe}: the checkpoint is of recipe {name}")
    elif not name.startswith(OWN):
        raise NoPrediction(f"recipe {name} is none of Oarlock's own: give --recipe {name} to have it imported")
    try:
        return make(name)
    except PSError as error:
        if recipe:
            raise
        raise NoPrediction(str(error)) from None


def _made(spec: JobSpec, name: str, scorers: int) -> Predictor:
    recipe = load_recipe(name)
    if not hasattr(recipe, "workload"):
        raise NotFound(f"{name} is no recipe")
    try:
        workload = recipe.workload(spec)
    except TypeError as error:
        raise SpecMismatch(f"the configuration of recipe {name} is not this release's: {error}") from None
    if not isinstance(workload, Predicts):
        raise NotFound(f"recipe {name} does not say what a prediction is asked with (inputs and unlabelled)")
    columns, model = tuple(workload.inputs), workload.model
    dims = {table.name: table.dim for table in spec.tables}
    for lookup in model.lookups:
        if dims.get(lookup.table) != lookup.dim:
            raise SpecMismatch(
                f"recipe {name} looks up table {lookup.table} with dim {lookup.dim}, the cut has no such"
            )
    if model.parameters != spec.dense:
        raise SpecMismatch(f"the dense parameters of recipe {name} are not those of the cut")
    short = name.partition(":")[0].rpartition(".")[2]
    return Predictor(Recipe(short, model, columns, workload.unlabelled), scorers=scorers)


def spec_of(manifest: Manifest, files: Files | None, job: Path | None = None) -> JobSpec:
    """Return the job as far as a workload needs it that predicts: identity, parameters, configuration, transforms.

    These are beside the cuts, in ``files``; of a job that kept none there in the folder ``job``. NotFound if nobody has them.
    """
    plan = manifest.metrics.get(PLAN)
    known: dict[str, Any] = plan if isinstance(plan, dict) else {}
    names = ("splits", "evaluation_splits", "rows_per_split", "evaluation_rows_per_split", "batch_rows", "epochs")
    counts = {name: known.get(name, 1) for name in names}
    return JobSpec(
        job=manifest.job,
        name="",
        seed=manifest.seed,
        recipe=manifest.recipe,
        tables=tuple(manifest.table_specs().values()),
        dense=tuple(manifest.dense_specs().values()),
        files=manifest.files,
        evaluation_files=_listed(known.get("evaluation_files")),
        servers=1,
        workers=1,
        metrics=_listed(known.get("metrics")),
        config=manifest.config,
        transforms=_transforms(manifest, files, job, known.get("transforms")),
        **counts,
    )


def _listed(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else ()


def _transforms(manifest: Manifest, files: Files | None, job: Path | None, digest: object) -> str:
    """Return the fitted transforms, of which a manifest has the digest alone."""
    if digest == digest_of(""):
        return ""
    if files is not None:
        try:
            return read_transforms(files, manifest)
        except NotFound:
            # Older jobs kept them in their folder alone.
            pass
        except OSError as error:
            raise Unavailable(f"the transforms in {files.root} cannot be read: {error}") from None
    if job is None:
        raise NotFound("the transforms of its data are in the job's folder: serve that, or give it by --job")
    spec = read_spec(job)
    if spec.job != manifest.job or (digest is not None and digest_of(spec.transforms) != digest):
        raise NotFound(f"{job} is the folder of another job than the checkpoint is of: give that of its own by --job")
    return spec.transforms
