# SPDX-License-Identifier: Apache-2.0
"""In a cut that is made under load, weights, every column of state, counters, marks and dense values are of the same groups.

What each row says of the number of its updates is compared with the batches of the groups that the cut's marks and closed
splits say it has; nothing of the engine is asked (state_recipe.py).
"""

import asyncio
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses

GROUP_ROWS = 64


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    # Also for processes.
    monkeypatch.setenv("PYTHONPATH", f"{here}:{Path(__file__).parents[2] / 'src'}")
    yield importlib.import_module("state_recipe")
    del sys.modules["state_recipe"]


def config(folder: Path, recipe: Any, **changes: Any) -> RunConfig:
    """Return a job of ``rows`` training rows; their content is not looked at."""
    rows = changes.pop("rows")
    (folder / "train").mkdir(parents=True)
    values = np.zeros(rows, np.int64)
    pq.write_table(pa.table({"a": values, "b": values}), folder / "train" / "part.parquet", row_group_size=GROUP_ROWS)
    return RunConfig(data=str(folder), recipe="state_recipe:recipe", checkpoints_kept=1000, reader="arrow", **changes)


class Expected:
    """What a cut must hold: per block how many groups it has, and per key how many of them have it."""

    def __init__(self, recipe: Any, spec: JobSpec, manifest: Manifest) -> None:
        self._recipe = recipe
        self._closed = manifest.closed
        self._splits = spec.splits * spec.epochs
        self._counts: dict[frozenset[int], dict[int, int]] = {}

    def groups(self, marks: dict[int, int]) -> frozenset[int]:
        """Return the numbers of the batches that a block with these marks has."""
        whole, closed = self._recipe.BATCHES, self._closed
        have = {s: whole for s in range(self._splits) if s < closed.floor or s in closed.above}
        have |= {split: mark + 1 for split, mark in marks.items()}
        return frozenset(self._recipe.number_of(split, batch) for split, n in have.items() for batch in range(n))

    def lasting(self, groups: frozenset[int]) -> dict[int, int]:
        """Return how many of the groups have each key that lasts."""
        if groups not in self._counts:
            found = [self._recipe.lasting(number) for number in groups]
            keys, counts = np.unique(np.concatenate(found or [np.empty(0, np.uint64)]), return_counts=True)
            self._counts[groups] = dict(zip(keys.tolist(), counts.tolist(), strict=True))
        return self._counts[groups]


def whole(values: Any) -> Any:
    """Return numbers that are nearly whole as int64; fail for others."""
    rounded = np.rint(values)
    assert np.abs(values - rounded).max(initial=0) < 0.2, values
    return rounded.astype(np.int64)


def updates_of_adam(recipe: Any, weights: Any, state: Any) -> list[tuple[int, ...]]:
    """Return per row what each of its columns says of the number of its updates: distinct numbers, one if all agree."""
    dim, spec = weights.shape[1], recipe.ADAM
    said = [-weights / recipe.RATE]
    said += [np.log1p(-state[:, :dim].astype(np.float64)) / np.log(spec.beta1)]
    said += [np.log1p(-state[:, dim : 2 * dim].astype(np.float64)) / np.log(spec.beta2), state[:, 2 * dim :]]
    columns = np.concatenate([whole(column) for column in said], axis=1)
    return [tuple(sorted(set(row))) for row in columns.tolist()]


def updates_of_adagrad(recipe: Any, weights: Any, state: Any) -> list[tuple[int, ...]]:
    """As ``updates_of_adam``."""
    counts = whole(state - recipe.ADAGRAD.initial)
    steps = np.sqrt(recipe.ADAGRAD.initial + np.arange(1, counts.max(initial=0) + 1))
    taken = np.concatenate([[0.0], np.cumsum(recipe.RATE / steps)])
    # One update less or more would be seen.
    np.testing.assert_allclose(-weights, taken[counts], atol=recipe.RATE / steps.max(initial=1.0) / 4)
    return [tuple(sorted(set(row))) for row in counts.tolist()]


def check_cut(recipe: Any, spec: JobSpec, store: LocalStore, cut: int) -> tuple[int, int]:
    """Compare a cut with what its groups are; return how many groups it has, and how many evicted keys came back."""
    manifest = store.load_manifest(cut)
    expected = Expected(recipe, spec, manifest)
    images = [store.load_block(manifest, entry) for entry in manifest.blocks]
    # Every group has keys in every block, and dense values.
    all_marks = {frozenset(image.marks.items()) for image in images}
    opened = {split for marks in all_marks for split, _ in marks}
    sets = {expected.groups(dict(marks)) for marks in all_marks}
    assert len(sets) == 1, f"cut {cut}: blocks have different groups of splits {sorted(opened)}"
    (groups,) = sets
    wanted, back = expected.lasting(groups), 0
    passing = Counter(k for n in groups for k in recipe.passing(n).tolist())
    seen: set[int] = set()
    singles = 0
    for image in images:
        if image.kind == "dense":
            updates = (updates_of_adam if image.name == "bias" else updates_of_adagrad)(
                recipe, image.weights, image.state
            )
            assert set(updates) == {(len(groups),)}, f"cut {cut}: {image.name} was updated {updates} times"
            continue
        adam = image.name == "grown"
        updates = (updates_of_adam if adam else updates_of_adagrad)(recipe, image.weights, image.state)
        for key, said, counted in zip(image.keys.tolist(), updates, image.counters[:, 0].tolist(), strict=True):
            what = f"cut {cut}, table {image.name}, key {key}: updated {said} times, {counted} occurrences"
            assert len(said) == 1, what
            if not adam and key >= recipe.FIRST_ALONE:
                assert (said[0], counted) == (1, recipe.BATCH_ROWS), what
                assert recipe.whose(key) in groups, what
                singles += 1
                continue
            if not adam:
                assert (said[0], counted) == (wanted[key], wanted[key] * recipe.BATCH_ROWS), what
                seen.add(key)
                continue
            # The one that admits a key is the first update; those before were dropped, and counted.
            assert counted == said[0] + recipe.ADMITTED - 1, what
            if key in wanted:
                assert counted == wanted[key], what
            else:
                assert counted <= passing[key], what
                back += counted < passing[key]
        if adam:
            check_waiting(recipe, expected, image, groups, wanted)
    assert seen == set(wanted)
    assert singles == recipe.ALONE_IN_PLAIN * len(groups)
    return len(groups), back


def check_waiting(recipe: Any, expected: Expected, image: Any, groups: frozenset[int], wanted: dict[int, int]) -> None:
    """Every key that one group alone has waits, once counted, and nothing else does that is not to."""
    waiting = dict(zip(image.waiting.tolist(), image.waited.tolist(), strict=True))
    for key, count in waiting.items():
        assert 1 <= count < recipe.ADMITTED
        if key >= recipe.FIRST_ALONE:
            number = recipe.whose(key)
            assert number in groups, f"key {key} of group {number} waits in block {image.block}, which has not got it"
            assert count == 1
        elif key in wanted:
            assert count == wanted[key]


def alone_in(recipe: Any, store: LocalStore, cut: int) -> int:
    manifest = store.load_manifest(cut)
    images = [store.load_block(manifest, e) for e in manifest.blocks if e.name == "grown"]
    return sum(int((image.waiting >= recipe.FIRST_ALONE).sum()) for image in images)


def go(spec: JobSpec, folder: Path, restore: str = "") -> dict[str, Any]:
    status = run_in_process(spec, folder, restore=restore, watch=lambda status: True, watch_seconds=0.01)
    assert status["phase"] == "done", status["reason"]
    return status


def check_job(recipe: Any, spec: JobSpec, folder: Path) -> bool:
    """Check all cuts of a job; return whether any of them has a key that was evicted and came back."""
    store = LocalStore(folder / "checkpoints")
    cuts = store.cuts()
    total = recipe.BATCHES * spec.splits * spec.epochs
    counts, backs = zip(*(check_cut(recipe, spec, store, cut) for cut in cuts), strict=True)
    assert counts[-1] == total
    assert sorted(counts) == list(counts)
    waiting = sum(len(recipe.alone(number)) for number in range(total))
    assert alone_in(recipe, store, cuts[-1]) == waiting
    return any(backs)


def in_the_midst(folder: Path) -> int:
    """Return a cut of a job that has open splits and increments."""
    store = LocalStore(folder / "checkpoints")
    manifests = [store.load_manifest(cut) for cut in store.cuts()]
    found = [m.cut for m in manifests if m.open_splits and any(entry.base for entry in m.blocks)]
    assert found, [(m.cut, m.open_splits) for m in manifests]
    return found[len(found) // 3]


CHANGES = {"servers": 2, "workers": 3, "checkpoint_every": "30 steps", "heartbeat_seconds": 0.02, "gate_seconds": 10.0}


def test_all_of_a_cut_is_of_the_same_groups(tmp_path: Path, recipe: Any) -> None:
    run = config(tmp_path / "data", recipe, rows=4096, epochs=4, **CHANGES)
    spec = create(tmp_path / "job", "job", run)
    assert spec.groups(spec.rows_per_split) == recipe.BATCHES
    go(spec, tmp_path / "job")
    check_job(recipe, spec, tmp_path / "job")
    cut = in_the_midst(tmp_path / "job")
    # From one in the middle on another number of shards.
    again = create(tmp_path / "again", "again", replace(run, servers=1))
    go(again, tmp_path / "again", restore=f"{tmp_path / 'job' / 'checkpoints'}@{cut}")
    check_job(recipe, again, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("changes", [{}, {"compute_threads": 2}, {"mode": "ssp", "staleness": 2}], ids=str)
def test_all_of_a_cut_is_of_the_same_groups_in_processes(tmp_path: Path, recipe: Any, changes: dict[str, Any]) -> None:
    run = config(tmp_path / "data", recipe, rows=16_384, epochs=4, **CHANGES, **changes)
    spec, restore, before = create(tmp_path / "job", "job", run), "", -1
    for servers in (2, 3, 1):
        folder = tmp_path / f"of-{servers}"
        spec = create(folder, folder.name, replace(run, servers=servers))
        launched = LocalProcesses(spec, folder, restore=restore)
        status = asyncio.run(launched.run(lambda status: True, 0.05))
        assert status["phase"] == "done", status["reason"]
        assert check_job(recipe, spec, folder), "no key was evicted and came back"
        cuts = LocalStore(folder / "checkpoints").cuts()
        print(f"{changes} {servers} shards: {len(cuts)} cuts, from {restore or 'the start'}")
        assert cuts[0] > before
        before = in_the_midst(folder)
        restore = f"{folder / 'checkpoints'}@{before}"
