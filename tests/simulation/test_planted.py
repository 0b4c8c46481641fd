# SPDX-License-Identifier: Apache-2.0
"""Every planted bug is found within a thousand schedules, and what finds it is shrunk to a few faults and fails again."""

import re
from collections.abc import Callable

import planted
import planted_caches
import planted_cuts
import planted_losses
import planted_modes
import planted_residuals
import pytest

from oarlock.simulation.campaign import files, smallest
from oarlock.simulation.faults import Schedule, draw, loses
from oarlock.simulation.restored import run

MOST = 1000
# Found by few schedules, and so after many.
RARE = {
    planted.closed_set_replaced,
    planted.evaluated_twice,
    planted.restarted_minimum_ignores_the_silent,
    planted.timeout_counts_as_acknowledged,
    planted_modes.marks_taken_for_batches,
    planted_residuals.handed_to_the_successor,
    planted_residuals.rest_of_dense_values_is_not_what_was_left,
    planted_residuals.losses_are_not_told,
    planted_cuts.late_pushes_are_taken_for_new_ones,
    planted_cuts.tears_are_not_looked_at,
    planted_cuts.changes_are_counted_from_a_cut_that_was_given_up,
    planted_cuts.told_when_it_is_committed,
    planted_cuts.told_before_the_views_begin,
    planted_cuts.views_of_later,
    planted_cuts.silent_workers_are_not_waited_for_after_a_restart,
    planted_cuts.the_fastest_worker_opens_the_gate,
    planted_losses.runs_and_lives_are_not_told_apart,
    planted_losses.results_of_the_lost_run_stay_on_disk,
    planted_losses.an_owner_that_died_is_left_out_of_the_cut,
    planted_cuts.increments_after_what_was_compacted_are_dropped,
}

# Found soon, by schedules that take their time.
LONG = {
    "gate_shut_with_pushes_under_way",
    "answers_without_a_lease",
    "leases_outlive_their_worker",
    "judged_at_once",
    "restored_without_marks",
    "short_group_is_forgotten",
    "joiner_holds_nobody_back",
    "marks_dropped_without_a_closed_set",
    "geo_forgets_the_batches_before",
    "made_again_at_a_retry",
    "mark_before_apply",
    "geo_pushes_the_sum",
    "geo_pushes_at_the_recipes_rate",
    "encoded_as_they_are_computed",
    "bytes_made_when_sent",
    "losses_are_told_of_every_split",
    "marks_of_later",
    "evaluation_uses_kept_rows",
    "duplicate_acknowledged_early",
    "successor_starts_one_late",
    "block_cut_in_two",
    "bound_is_one_too_wide",
    "steps_counted_again",
    "restored_with_the_closed_splits_of_the_end",
    "only_the_floor_is_taken_up",
    "rest_of_rows_added_twice",
    "told_before_recorded",
    "batches_of_a_group_pushed_one_by_one",
    "last_group_sent_with_loss",
    "last_group_brings_its_own_keys_only",
    "closed_before_the_last_answer",
}


def is_slow(plant: Callable[[pytest.MonkeyPatch], None]) -> bool:
    return plant in RARE or plant.__name__ in LONG


def test_those_that_are_left_out_are_there() -> None:
    modules = (planted, planted_modes, planted_caches, planted_residuals, planted_cuts, planted_losses)
    assert {p.__name__ for module in modules for p in module.PLANTED} >= LONG


def found(plant: Callable[[pytest.MonkeyPatch], None], patch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Return the first seed that breaks an invariant, and which."""
    plant(patch)
    rough, cuts = plant in planted_residuals.PLANTED, plant in planted_cuts.PLANTED
    losses = plant in planted_losses.PLANTED
    for seed in range(MOST):
        # No other job has anything to show there.
        schedule = draw(seed)
        if (rough and not schedule.push) or (cuts and not schedule.checkpoint_seconds):
            continue
        if losses and not loses(schedule):
            continue
        violation = run(draw(seed), files()).violation
        if violation:
            # What a plant that fits the code no more runs into is no bug of the protocol.
            assert not re.search(r"(Attribute|Type|Name|Import)Error", violation), (
                f"{plant.__name__} is broken: {violation}"
            )
            return seed, violation
    raise AssertionError(f"{plant.__name__} was not found by {MOST} schedules")


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(p, marks=pytest.mark.slow if is_slow(p) else (), id=p.__name__)
        for module in (planted, planted_modes, planted_caches, planted_residuals, planted_cuts, planted_losses)
        for p in module.PLANTED
    ],
)
@pytest.mark.timeout(600)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    seed, violation = found(plant, monkeypatch)
    monkeypatch.undo()
    # It is the bug that was found, and not the schedule.
    assert run(draw(seed), files()).violation == "", f"{violation} of seed {seed}"


@pytest.mark.slow
def test_a_failing_schedule_is_shrunk_and_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, violation = found(planted.only_equal_marks_are_skipped, monkeypatch)
    schedule = draw(seed)
    small = smallest(schedule, violation)
    assert 1 <= len(small.faults) <= 2 < len(schedule.faults)
    again = run(Schedule.from_json(small.to_json()), files())
    assert again.violation.split(":")[0] == violation.split(":")[0]
