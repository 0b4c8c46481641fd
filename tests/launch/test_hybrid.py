# SPDX-License-Identifier: Apache-2.0
"""Hybrid jobs of a real recipe: in one process they learn and go on from a stop; as processes that are killed they end well."""

import asyncio
import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.launch.folder import resume, stored_status
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import InvalidArgument, SpecMismatch
from oarlock.ps.rank_marks import STEP_MARK

SAMPLES = 100 * 25 * 5


def steps_of(folder: Path) -> set[int]:
    """Return the steps that the dense blocks of the newest checkpoint are at."""
    store = LocalStore(folder / "checkpoints")
    found = store.latest()
    assert found is not None
    return {store.load_block(found, e).marks[STEP_MARK] for e in found.blocks if e.kind == "dense"}


@pytest.mark.slow
def test_a_job_learns_stops_after_one_step_of_all_and_goes_on_elsewhere(start: Any, run_job: Any) -> None:
    spec, folder = start(mode="hybrid", ranks=3, servers=2, workers=2, epochs=3)
    assert (spec.mode, spec.ranks) == ("hybrid", 3)
    status = run_job(spec, folder, stop_when=lambda s: s["history"] and s["splits_closed"] > 0)
    assert (status["phase"], status["reason"]) == ("stopped", "interrupted")
    assert (status["mode"], status["ranks"]) == ("hybrid", 3)
    assert "failed" not in status["cut"]
    (step,) = steps_of(folder)
    stored = stored_status(folder)
    assert (stored["mode"], stored["ranks"]) == ("hybrid", 3)
    with pytest.raises(SpecMismatch, match="ranks cannot change"):
        resume(folder, {"ranks": 2})
    with pytest.raises(SpecMismatch, match=r"mode cannot change .*'hybrid', now 'sync'"):
        resume(folder, {"mode": "sync"})
    again, restore = resume(folder, {"servers": 3, "workers": 1, "blas_threads": 2})
    ended = run_job(again, folder, restore)
    assert ended["phase"] == "done"
    assert [r["samples"] for r in ended["history"]] == [SAMPLES] * 3
    losses = [r["loss"] for r in ended["history"]]
    assert losses == sorted(losses, reverse=True)
    (last,) = steps_of(folder)
    # As many as the longest rank has groups, each epoch.
    assert 0 < step < last
    assert last % 3 == 0


def test_what_does_not_go_with_hybrid_is_refused_when_the_job_is_made(start: Any) -> None:
    for changes, words in (
        ({"staleness": 2}, "staleness = 2 and mode = 'hybrid' contradict each other"),
        (
            {"compression": {"dense": {"push": "int8+feedback"}}},
            "mode = 'hybrid' and compression.dense.push = 'int8\\+feedback' contradict each other",
        ),
        ({"mode": "ssp", "ranks": 2}, "ranks = 2 and mode = 'ssp' contradict each other"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            start(**{"mode": "hybrid", **changes})
    spec, _ = start(mode="hybrid", workers=3, prefetch=4, accumulate=2)
    assert spec.ranks == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_that_are_killed_count_every_sample_once(start: Any, seed: int) -> None:
    spec, folder = start(
        mode="hybrid",
        ranks=4,
        servers=2,
        workers=3,
        epochs=60,
        lease_seconds=2.0,
        heartbeat_seconds=0.2,
        prefetch=2,
        checkpoint_every="1s",
    )
    rng, kills = Random(seed), list[int]()

    def watch(status: dict[str, Any]) -> bool:
        members = [m for m in status.get("members", ()) if m["role"] == "worker" and m["stats"].get("batches")]
        trains = status.get("phase") == "training" and "note" not in status and members
        if trains and len(kills) < 6 and rng.random() < 0.1:
            coordinator = json.loads((folder / "coordinator.json").read_text(encoding="utf-8"))["pid"]
            pid = coordinator if len(kills) == 3 else rng.choice(members)["pid"]
            try:
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)
            except ProcessLookupError:
                pass
        return True

    status = asyncio.run(LocalProcesses(spec, folder).run(watch, 0.1))
    assert status["phase"] == "done", status["reason"]
    assert len(kills) >= 3
    assert {r["samples"] for r in status["history"]} == {SAMPLES}
    assert len(status["history"]) == 60
    (last,) = steps_of(folder)
    assert last % 60 == 0
    values = [v for r in status["history"] for v in r["metrics"].values()]
    assert np.isfinite(values).all()
