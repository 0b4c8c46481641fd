# SPDX-License-Identifier: Apache-2.0
"""What a worker lets be observed: what it trained, and where its time went, read off its own counters.

Invariant: nothing is changed and nobody waited for: the worker's thread goes on. Called from the thread of the page.
"""

from collections.abc import Callable
from typing import Any

from oarlock.telemetry.registry import Source
from oarlock.telemetry.stages import Stages
from oarlock.worker.trainer import Trainer

# By their names in ``Caches.told``.
_OF_CACHES = {
    "rows": "oarlock_cache_rows",
    "hits": "oarlock_cache_hits_total",
    "misses": "oarlock_cache_misses_total",
    "outdated": "oarlock_cache_outdated_total",
    "bound": "oarlock_cache_bound",
    "excess": "oarlock_cache_excess",
    "probes": "oarlock_cache_probes_total",
    "evictions": "oarlock_cache_evictions_total",
    "saved_bytes": "oarlock_cache_saved_bytes_total",
}


def worker_source(trainer: Callable[[], Trainer | None], client: Stages) -> Source:
    """Return the source of a worker's metrics; ``trainer()`` is None as long as there is nothing to train.

    ``client``: the stages of what it shares with evaluation.
    """

    def source() -> dict[str, Any]:
        found = trainer()
        if found is None:
            return {}
        done = found.progress
        stages = (done.stages, found.evaluation_stages, client)
        # Copied first: the worker may enter a stage for the first time. Each has stages of its own.
        seconds = {name: value for s in stages for name, value in s.seconds.copy().items()}
        entries = {name: value for s in stages for name, value in s.entries.copy().items()}
        return {
            "oarlock_worker_batches_total": done.batches,
            "oarlock_worker_samples_total": done.samples,
            "oarlock_worker_refused_gradients_total": done.refused,
            "oarlock_worker_open_splits": found.held_splits,
            "oarlock_worker_stage_seconds_total": seconds,
            "oarlock_worker_stage_entries_total": entries,
            "oarlock_worker_pull_seconds": done.pull_seconds,
            "oarlock_worker_push_seconds": done.push_seconds,
            **_caches(found.told_of_caches()),
        }

    return source


def _caches(told: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {
        metric: {table: values[name] for table, values in told.items() if name in values}
        for name, metric in _OF_CACHES.items()
    }
    return {metric: values for metric, values in found.items() if values}
