# SPDX-License-Identifier: Apache-2.0
"""What is known of cuts after a restart of the coordinator, and after a restore."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from oarlock.cluster.splits import close_split

Make = Callable[..., Any]


def close(cluster: Any, worker: int, groups: int) -> None:
    cluster.heartbeat(worker)
    (split,) = cluster.lease(worker).splits
    close_split(cluster.coordinator, worker, split, 10, 5.0, groups=groups)


@pytest.fixture
def by_steps(make_cluster: Make) -> Any:
    """A job that makes a cut every 4 steps, with one worker, and room for many splits."""
    cluster = make_cluster(checkpoint_steps=4, splits=20, workers=1)
    cluster.shards()
    (cluster.worker,) = cluster.workers()
    return cluster


def test_a_restart_goes_on_counting_steps_from_the_newest_cut(by_steps: Any) -> None:
    close(by_steps, by_steps.worker, 5)
    by_steps.commit(1)
    for groups, due in ((1, False), (2, False), (1, True)):
        by_steps.restart()
        assert not by_steps.coordinator.cuts.due()
        close(by_steps, by_steps.worker, groups)
        assert by_steps.coordinator.cuts.due() is due
    by_steps.restart()
    assert by_steps.coordinator.cuts.due(), "four steps after it, whoever counts"


def test_steps_count_from_the_beginning_while_there_was_no_cut(by_steps: Any) -> None:
    close(by_steps, by_steps.worker, 3)
    by_steps.restart()
    close(by_steps, by_steps.worker, 1)
    assert by_steps.coordinator.cuts.due()


@pytest.mark.parametrize("cuts", [0, 1])
def test_a_state_of_before_steps_of_cuts_were_recorded_is_taken_up(by_steps: Any, cuts: int) -> None:
    close(by_steps, by_steps.worker, 5)
    if cuts:
        by_steps.commit(1)
    with by_steps.store as store:
        store._execute("DELETE FROM facts WHERE name = 'cut_steps'")
    by_steps.restart()
    assert by_steps.coordinator.cuts.due() is (cuts == 0)
    close(by_steps, by_steps.worker, 4)
    assert by_steps.coordinator.cuts.due()


def test_a_restore_counts_steps_from_the_cut_that_it_goes_back_to(by_steps: Any) -> None:
    close(by_steps, by_steps.worker, 5)
    saved = by_steps.manifest(1)
    by_steps.commit(1)
    close(by_steps, by_steps.worker, 20)
    by_steps.commit(2)
    by_steps.coordinator.begin_run(saved, "/cut-000001")
    for _ in range(2):
        by_steps.shards()
        worker = by_steps.join("worker").incarnation
        assert not by_steps.coordinator.cuts.due()
        close(by_steps, worker, 3)
        assert not by_steps.coordinator.cuts.due()
        close(by_steps, worker, 1)
        assert by_steps.coordinator.cuts.due()
        # Also in a process that has not made those cuts itself.
        by_steps.kill()
        by_steps.start()
        by_steps.coordinator.begin_run(saved, "/cut-000001")


@pytest.mark.parametrize(
    ("backs", "kept", "told"),
    [
        # From which cut, made after which number; the best one before the last of them, and after.
        ([(2, 4)], 2, 2),
        ([(2, 4)], 1, 1),
        ([(2, 4)], 3, 0),
        # 3 and 4 are abandoned with the first, and 4 is the line again with the third: 1 2 5 6, not 1 2 3 4 7.
        ([(2, 4), (4, 6), (6, 7)], 4, 0),
        ([(2, 4), (4, 6), (6, 7)], 5, 5),
        ([(2, 4), (4, 6), (6, 7)], 7, 0),
    ],
)
def test_the_best_cut_that_is_told_after_a_restore_is_of_its_line(
    make_cluster: Make, backs: list[tuple[int, int]], kept: int, told: int
) -> None:
    cluster = make_cluster(checkpoint_keep_best=1)
    c = cluster.coordinator
    for cut, last in backs:
        c.cuts.last, c.cuts.best = last, kept
        c.begin_run(cluster.manifest(cut), f"/cut-{cut:06d}")
    assert cluster.status()["cut"].get("best", 0) == told
    cluster.restart()
    assert cluster.coordinator.cuts.best == told


def test_no_cut_is_told_as_the_best_of_another_job_or_where_none_is_kept(make_cluster: Make) -> None:
    for changes, job, told in (
        ({"checkpoint_keep_best": 1}, "f" * 32, 0),
        ({}, "", 0),
        ({"checkpoint_keep_best": 1}, "", 2),
    ):
        cluster = make_cluster(**changes)
        cluster.coordinator.cuts.best = cluster.coordinator.cuts.last = 2
        manifest = cluster.manifest(4)
        cluster.coordinator.begin_run(replace(manifest, job=job or manifest.job), "/cut-000004")
        assert cluster.coordinator.cuts.best == told
