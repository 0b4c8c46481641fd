# SPDX-License-Identifier: Apache-2.0
"""Jobs whose shards come, go and die keep every invariant, of copies too; and every planted bug of theirs is found."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import planted_cuts
import planted_moves
import pytest

from oarlock.simulation.campaign import drawn, files, run_seeds
from oarlock.simulation.elastic import ELASTIC
from oarlock.simulation.faults import AIMED, ECHO, Schedule
from oarlock.simulation.restored import run

MOST = 400
# Where to begin to look for one that is rare.
FIRST = {
    planted_moves.refusals_end_with_their_record: 32_051,
    planted_moves.opened_again_under_any_order: 400,
}
# Found within seconds.
SOON = {
    planted_moves.acknowledged_before_the_copies_have_it,
    planted_moves.added_before_it_is_required,
    planted_moves.records_are_told_and_not_kept,
    planted_moves.refusals_end_with_their_record,
}
COVERED = {"handed over", "promoted", "copies added", "copies removed", "copies compared"}


def aims(schedule: Schedule) -> set[tuple[str, str]]:
    """Return what strikes at which messages."""
    return {(fault.kind, fault.method) for fault in schedule.at_cuts}


def test_no_invariant_breaks() -> None:
    tally = run_seeds(range(10_000, 10_012), (ELASTIC,))
    assert tally.violations == []
    assert tally.schedules == 12
    # Moves and promotions happened.
    assert all(tally.counts[what] > 5 for what in COVERED), {what: tally.counts[what] for what in COVERED}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_invariant_breaks_in_hundreds_of_schedules() -> None:
    tally = run_seeds(range(20_000, 20_500), (ELASTIC,))
    assert tally.violations == []
    struck = {"kill_shard", "kill_coordinator", "scale", "refuse", "pause_shard", "resumed", *AIMED, ECHO}
    assert struck <= set(tally.counts)
    assert {"Shard.Copy", "Shard.HandOver", "Shard.Reopen", "Shard.Held", "Coordinator.Report"} <= set(tally.counts)
    assert all(tally.counts[what] > 500 for what in COVERED), {what: tally.counts[what] for what in COVERED}


def test_a_shard_that_is_struck_off_before_it_knows_that_it_joined_is_not_looked_at() -> None:
    # It adopts records that were on their way to it, and has none of what came since.
    assert run_seeds(range(20_382, 20_383), (ELASTIC,)).violations == []


def test_a_block_may_be_handed_over_as_the_job_ends() -> None:
    # The heir has not heard of it.
    assert run_seeds(range(50_046, 50_047), (ELASTIC,)).violations == []


def test_views_that_begin_too_late_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_cuts.views_that_begin_late_are_believed(monkeypatch)
    assert "C1: cut 2" in run(drawn(9_111_749, (ELASTIC,)), files()).violation


def test_the_campaign_has_a_mode_for_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.simulate", "--tiny", "--json", "--mode", ELASTIC],
        env=dict(os.environ),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result = json.loads(ended.stdout)
    assert result["schedules"] == 4
    assert result["violations"] == 0
    assert result["counts"]["copies added"] > 0


@pytest.mark.parametrize(
    "plant",
    [pytest.param(p, marks=() if p in SOON else pytest.mark.slow, id=p.__name__) for p in planted_moves.PLANTED],
)
@pytest.mark.timeout(1200)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    # Those that need a rare course of things are looked for where that is aimed at.
    needs = planted_moves.AIMED_AT.get(plant, set())
    first = FIRST.get(plant, 0)
    seeds = [s for s in range(first, first + MOST) if needs <= aims(drawn(s, (ELASTIC,)))]
    seed, violation = next(
        ((s, found) for s in seeds if (found := run(drawn(s, (ELASTIC,)), files()).violation)), (-1, "")
    )
    assert violation, f"{plant.__name__} was not found by {len(seeds)} schedules"
    # What a plant that fits the code no more runs into is no bug of the protocol.
    assert not re.search(r"(Attribute|Type|Name|Import)Error", violation), f"{plant.__name__} is broken: {violation}"
    monkeypatch.undo()
    # It is the bug that was found, and not the schedule.
    assert run(drawn(seed, (ELASTIC,)), files()).violation == "", f"{violation} of seed {seed}"
    print(f"{plant.__name__}: seed {seed}: {violation}")
