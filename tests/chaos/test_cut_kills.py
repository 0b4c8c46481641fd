# SPDX-License-Identifier: Apache-2.0
"""Counting jobs with a cut every half second, struck whenever a gate is announced, killed as a whole and resumed elsewhere."""

from pathlib import Path

import pytest

from oarlock.benchmarks.counting import check, write_data
from oarlock.benchmarks.kills import MARKER, RECIPE, plan, processes_left
from oarlock.benchmarks.lives import Fate, live
from oarlock.checkpoint.store import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS = 10
MODES = ({}, {"mode": "geo", "accumulate": 3}, {"mode": "ssp", "staleness": 2, "compute_threads": 2})


@pytest.mark.parametrize("number", range(ROUNDS))
def test_what_was_restored_from_cuts_under_load_counts_exactly(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKER, f"cuts-{number}")
    data, seed = tmp_path / "data", 100 + number
    write_data(data, rows=60_000, keys=5_000, seed=seed)
    # Every third round is of another mode than async.
    changes = MODES[number // 3 % 3] if number % 3 == 2 else MODES[0]
    run = plan(data, recipe=RECIPE, epochs=12, seed=seed, checkpoint_every=("0.5s", "1s")[number % 2], **changes)
    lived = live(tmp_path / "job", run, Fate(strikes=6, deaths=2), seed)
    print(f"round {number}: {dict(lived.done)} cuts {lived.cuts} given up {lived.given_up} shards {lived.shards}")
    count = check(data, lived.folder, lived.spec, lived.status["history"])
    assert count.exact, (count, lived.done)
    assert count.samples_exact
    assert count.evaluation_exact
    assert lived.done["shard died"] + lived.done["all died"] == 2
    assert sum(lived.done.values()) >= 6
    # Cuts were made while it trained, and not after its epochs alone.
    assert lived.cuts > lived.spec.epochs
    store = LocalStore(lived.folder / "checkpoints")
    for cut in store.cuts():
        store.verify(store.load_manifest(cut))
    assert processes_left(f"cuts-{number}") == 0
