# SPDX-License-Identifier: Apache-2.0
"""What may not change in a job that goes on from a checkpoint: nothing that a batch or a row depends on.

Threads may change the order of sums and of pushes, which sync alone fixes. Pure functions over job descriptions and manifests.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.job import JobSpec
from oarlock.embedding.spec import to_json
from oarlock.proto.errors import SpecMismatch
from oarlock.worker.recipe import load_recipe

FIXED = (
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
FILES = ("files", "evaluation_files")


def fixed_of(spec: JobSpec) -> dict[str, Any]:
    """Return what is fixed of a job, JSON-ready."""
    values = json.loads(spec.to_json())
    return {name: values[name] for name in (*FIXED, *_of_ranks(values))}


def _of_ranks(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is fixed because of ranks: the mode, whose marks blocks have, and of sync what its sums depend on."""
    if not values.get("ranks"):
        return ()
    return ("mode",) if values.get("mode") == "hybrid" else ("mode", "blas_threads")


def fixed_in(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says of it; of older ones that is less. ``transforms`` is a digest."""
    values = {
        "recipe": manifest.recipe,
        "seed": manifest.seed,
        "config": manifest.config,
        "tables": [to_json(t) for t in manifest.table_specs().values()],
        "dense": [to_json(d) for d in manifest.dense_specs().values()],
        "files": list(manifest.files),
    }
    plan = manifest.metrics.get(PLAN)
    if isinstance(plan, dict):
        names = (*FIXED, *_of_ranks(plan))
        values |= {name: plan[name] for name in names if name in plan and name not in values}
    return dict(json.loads(json.dumps(values)))


def check_unchanged(was: Mapping[str, Any], spec: JobSpec, options: Mapping[str, Any], *, moved: bool = False) -> None:
    """Raise SpecMismatch by name if ``spec`` differs in what ``was`` fixes; ``options`` are the recipe's, as they were given.

    ``moved``: the data files may be in another folder, if they are the same otherwise.
    """
    mine = {**fixed_of(spec), "mode": spec.mode, "blas_threads": spec.blas_threads}
    for name, before in was.items():
        wanted = mine[name]
        if name == "transforms" and before != wanted:
            before, wanted = (before, spec.plan()["transforms"])
        if name == "config":
            before = before | _newer(load_recipe(spec.recipe).Config, before, wanted, options)
        if name in FILES and moved:
            before, wanted = _names(before), _names(wanted)
        if before != wanted:
            raise SpecMismatch(_difference(name, before, wanted), field=name)


def _names(files: Any) -> Any:
    """Return a list of data files without the folders that they are in; what is none stays as it is."""
    if not isinstance(files, list) or not all(isinstance(f, dict) and isinstance(f.get("path"), str) for f in files):
        return files
    return [{**f, "path": PurePath(f["path"]).name} for f in files]


def _newer(kind: type, was: dict[str, Any], wanted: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
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
