# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under random faults, evaluated by scores: kept over deaths of the coordinator, and merged to what the files say."""

from dataclasses import replace
from pathlib import Path

import pytest

from oarlock.client.job import JobSpec
from oarlock.cluster.evaluation import Found
from oarlock.cluster.work import Work
from oarlock.data.scores import Scores
from oarlock.simulation.data import Data
from oarlock.simulation.faults import Fault, Schedule, draw
from oarlock.simulation.restored import run


class ScoredData(Data):
    def spec(self, schedule: Schedule) -> JobSpec:
        return replace(super().spec(schedule), recipe="scored_recipe:recipe", metrics=("calibration",))

    def expected_metric(self, epoch: int) -> float:
        return super().expected_metric(epoch) / (1 << 15)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScoredData:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return ScoredData(tmp_path / "data")


def test_scores_survive_every_fault(data: ScoredData) -> None:
    faults: set[str] = set()
    for seed in range(30_014, 30_019):
        schedule = draw(seed)
        outcome = run(schedule, data)
        assert not outcome.violation, f"seed {seed}: {outcome.violation}"
        faults.update(fault.kind for fault in schedule.faults)
    assert {"kill_coordinator", "tear", "kill_worker"} <= faults


def test_scores_that_are_merged_twice_are_found(data: ScoredData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split's report is repeated, and its scores are counted once more."""
    original = Work.evaluate

    def evaluate(self: Work, worker: int, split: int, found: Found) -> bool:
        known = self.results.get(split)
        if isinstance(known, bytes) and isinstance(found, bytes):
            self.results[split] = Scores.merge([Scores.from_bytes(known), Scores.from_bytes(found)]).to_bytes()
            return True
        return original(self, worker, split, found)

    monkeypatch.setattr(Work, "evaluate", evaluate)
    # Reports of closed splits come once more, a little later.
    again = tuple(Fault(at, "late", 0, 0.2, "Coordinator.CloseSplit") for at in range(0, 400, 10))
    schedules = [replace(draw(seed), faults=again) for seed in range(3)]
    violations = [run(schedule, data).violation for schedule in schedules]
    assert any(violation.startswith("E1: epoch") for violation in violations), violations
    monkeypatch.setattr(Work, "evaluate", original)
    assert [run(schedule, data).violation for schedule in schedules] == [""] * 3
