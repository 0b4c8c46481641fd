# SPDX-License-Identifier: Apache-2.0
"""From a run's configuration to the JobSpec: the recipe looks at the data and decides what was left open."""

import secrets
from pathlib import Path

from oarlock.checkpoint.store import is_url
from oarlock.client.autoscale import read_autoscale
from oarlock.client.compression import read_compression
from oarlock.client.job import RANKED, JobSpec
from oarlock.client.warm import read_warm_start
from oarlock.data.files import files_to_json
from oarlock.data.splits import plan_splits
from oarlock.launch.cache import with_caches
from oarlock.launch.config import RunConfig, recipe_config
from oarlock.launch.every import read_every
from oarlock.worker.recipe import load_recipe, recipe_name


def where(run: RunConfig) -> str:
    """Return the path of a run's checkpoints as every process can use it, wherever it is started."""
    path = run.checkpoint_path
    return str(Path(path).absolute()) if path and not is_url(path) else path


def make_spec(run: RunConfig, name: str, *, job: str = "") -> JobSpec:
    """Return the spec of a new job (or of job id ``job``, when it goes on from a checkpoint)."""
    full = recipe_name(run.recipe)
    recipe = load_recipe(full)
    plan = recipe.plan(recipe_config(recipe, run.recipe_options), Path(run.data).absolute(), epochs=run.epochs)
    steps, seconds = read_every(run.checkpoint_every)
    splits = plan_splits(plan.files, plan.rows_per_split)
    evaluation = plan_splits(plan.evaluation_files, plan.evaluation_rows_per_split) if plan.evaluation_files else ()
    return JobSpec(
        job=job or secrets.token_hex(16),
        name=name,
        seed=run.seed,
        recipe=full,
        tables=with_caches(plan.tables, run.cache),
        dense=plan.model.parameters,
        files=tuple(files_to_json(plan.files)),
        evaluation_files=tuple(files_to_json(plan.evaluation_files)),
        splits=len(splits),
        evaluation_splits=len(evaluation),
        rows_per_split=plan.rows_per_split,
        evaluation_rows_per_split=plan.evaluation_rows_per_split,
        batch_rows=plan.batch_rows,
        epochs=run.epochs,
        servers=run.servers,
        workers=run.workers,
        metrics=plan.metrics,
        config=plan.config,
        transforms=plan.transforms,
        mode=run.mode,
        staleness=run.staleness,
        # Written down with the job: another number of workers that goes on with it hosts the same ranks.
        ranks=(run.ranks or run.workers) if run.mode in RANKED else 0,
        accumulate=run.accumulate,
        compression=read_compression(run.compression, "job file"),
        reader=run.reader,
        open_splits=run.open_splits,
        prefetch=run.prefetch,
        compute_threads=run.compute_threads,
        blas_threads=run.blas_threads,
        checkpoint_epochs=run.checkpoint_epochs,
        checkpoint_steps=steps,
        checkpoint_seconds=seconds,
        checkpoints_kept=run.checkpoints_kept,
        checkpoint_keep_best=run.checkpoint_keep_best,
        checkpoint_path=where(run),
        checkpoint_options=run.checkpoint_options,
        checkpoint_compress=run.checkpoint_compress,
        lease_seconds=run.lease_seconds,
        heartbeat_seconds=run.heartbeat_seconds,
        gate_seconds=run.gate_seconds,
        replicas=run.replicas,
        on_loss=run.on_loss,
        moves_in_flight=run.moves_in_flight,
        rebalance_seconds=run.rebalance_seconds,
        autoscale=read_autoscale(run.autoscale, "job file"),
        restore=run.restore,
        warm_start=read_warm_start(run.warm_start, "job file"),
    )
