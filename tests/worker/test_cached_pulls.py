# SPDX-License-Identifier: Apache-2.0
"""Workers that keep rows: nothing is lost or counted twice, evaluation does not use what is kept, and both are told of."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oarlock.embedding.spec import CacheSpec
from oarlock.worker.telemetry import worker_source

Make = Callable[..., Any]


def with_cache(job: Any, **cache: Any) -> Any:
    table, *others = job.spec.tables
    job.spec = replace(job.spec, tables=(replace(table, cache=CacheSpec(**cache)), *others))
    return job


@pytest.mark.parametrize(
    ("workers", "rows", "bound", "policy"),
    [(1, 100, 0, "lru"), (2, 30, 2, "lfu"), (2, 30, 1, "lru"), (3, 100, 1000, "lru")],
)
def test_every_occurrence_is_counted_once(make_job: Make, workers: int, rows: int, bound: int, policy: str) -> None:
    job = with_cache(
        make_job(workers=workers, prefetch=3, rows=480, batch_rows=6), rows=rows, bound=bound, policy=policy
    )
    job.wire.doubled = 0.2
    job.run(lambda j: j.to_the_end())
    job.check_counted_once()
    # As the evaluation of a job without caches: it asks the shards for all rows, also where any kept one would do.
    counts, rows_of = job.counts(), job.data["test"][:, 0]
    assert job.coordinator.work.history[-1].metrics["count"] == pytest.approx(float(counts[rows_of].mean()))
    pulls = [table for request in job.wire.calls("Shard.Pull") for table in request.tables]
    assert {table.HasField("versions") for table in pulls} == {True, False}
    told = [worker.result().caches.told()["key"] for worker in job.workers]
    asked = sum(table.keys.shape[0] for table in pulls if table.HasField("versions"))
    assert sum(c["hits"] + c["misses"] for c in told) == asked
    assert sum(c["hits"] for c in told) > (asked // 3 if bound == 1000 else 0)
    assert rows > 30 or all(c["evictions"] for c in told)
    assert all(c["rows"] <= rows for c in told)


def test_a_worker_tells_of_its_caches(make_job: Make) -> None:
    job = with_cache(make_job(workers=1, epochs=1), rows=50, bound=1000)
    job.run(lambda j: j.to_the_end())
    trainer = job.workers[0].result()
    assert trainer.told_of_caches() == trainer.caches.told()
    told, (found,) = trainer.caches.told()["key"], [worker_source(lambda: trainer, trainer._session.client.stages)()]
    assert trainer.stats()["caches"] == {"key": told}
    assert found["oarlock_cache_hits_total"] == {"key": told["hits"]}
    assert found["oarlock_cache_saved_bytes_total"] == {"key": 4 * told["hits"]}
    assert {name for name in found if name.startswith("oarlock_cache_")} == {
        f"oarlock_cache_{name}"
        for name in (
            "rows",
            "bound",
            "hits_total",
            "misses_total",
            "outdated_total",
            "evictions_total",
            "saved_bytes_total",
        )
    }


@pytest.mark.parametrize(("workers", "costs"), [(2, False), (1, True)])
def test_an_adaptive_bound_counts_every_occurrence_once_and_is_told(
    make_job: Make, counting: Any, monkeypatch: pytest.MonkeyPatch, workers: int, costs: bool
) -> None:
    """Scores are counts here, taken for logits: one update more or less costs a lot, unless scores are all the same."""
    if not costs:
        monkeypatch.setattr(
            counting.CountingProgram, "predict", lambda self, feeds, samples: np.full(samples, 0.5, np.float32)
        )
    job = with_cache(make_job(workers=workers, rows=240 * workers, batch_rows=6), rows=100, bound=4, adaptive=True)
    job.run(lambda j: j.to_the_end())
    job.check_counted_once()
    asked = [table for r in job.wire.calls("Shard.Pull") for table in r.tables if table.HasField("versions")]
    bounds = [table.bound for table in asked]
    told = [worker.result().stats()["caches"]["key"] for worker in job.workers]
    if costs:
        assert set(bounds) == {0, 1}
        assert bounds.count(0) > len(bounds) / 2
    else:
        # All probes ask for fresh rows, and whoever changed its bound asks with the new one.
        assert {1, 2, 3} < set(bounds) <= {0, 1, 2, 3, 4}
        assert sum(c["probes"] for c in told) <= bounds.count(0) < len(bounds) / 3
        assert {c["bound"] for c in told} <= {3, 4}
        assert {c["excess"] for c in told} == {0.0}
    trainer = job.workers[0].result()
    (found,) = [worker_source(lambda: trainer, trainer._session.client.stages)()]
    for name, metric in (("bound", "bound"), ("probes", "probes_total"), ("excess", "excess")):
        assert found[f"oarlock_cache_{metric}"] == {"key": told[0][name]}


def test_a_worker_without_caches_tells_nothing_of_them(make_job: Make) -> None:
    job = make_job(workers=1, epochs=1)
    job.run(lambda j: j.to_the_end())
    assert "caches" not in job.workers[0].result().stats()
    assert not any(table.HasField("versions") for r in job.wire.calls("Shard.Pull") for table in r.tables)
