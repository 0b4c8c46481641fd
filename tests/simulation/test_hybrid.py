# SPDX-License-Identifier: Apache-2.0
"""Hybrid jobs under random faults: rows count once, dense values take the course of plain numpy; every planted bug is found."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_hybrid
import pytest

from oarlock.ps.shard import Shard
from oarlock.simulation.campaign import files, run_seeds
from oarlock.simulation.faults import HYBRID, Fault, Outcome, draw
from oarlock.simulation.mixed_checker import MixedCuts
from oarlock.simulation.restored import run
from oarlock.simulation.world import World

MOST = 400
# Found within a second.
SOON = {planted_hybrid.applied_without_the_last_rank}


class Torn(World):
    """Kills or pauses the worker whose rows have just come to one shard and not to another, every other time."""

    def _check_shard(self, number: int, shard: Shard, method: str, request: Any, reply: Any) -> None:
        super()._check_shard(number, shard, method, request, reply)
        if method != "Shard.Push" or not hasattr(reply, "applied") or not reply.applied:
            return
        shards = [service._joined[1] for service in self.services if service._joined is not None]
        if len({s.marks.highest(request.split) for s in shards if s.owned.any()}) > 1 and self.workers:
            self.counts["torn"] += 1
            if self.counts["torn"] % 5 == 1:
                self._kill_worker(Fault(0, "kill_worker", self.counts["torn"], 0.5))
                self.counts["killed"] += 1
            elif self.counts["torn"] % 5 == 3:
                # Longer than its lease: when it goes on, another one has its ranks.
                self._pause_worker(Fault(0, "pause_worker", self.counts["torn"], 9.0))


def run_torn(seed: int, folder: Path) -> Outcome:
    schedule = replace(draw(seed, (HYBRID,)), faults=(), shards=3, latency=0.1)
    (folder / str(seed)).mkdir()
    return Torn(schedule, files(), folder / str(seed)).run()


@pytest.mark.slow
def test_whoever_follows_a_worker_whose_rows_are_on_one_shard_alone_completes_them(tmp_path: Path) -> None:
    outcomes = [run_torn(seed, tmp_path) for seed in range(6)]
    assert [outcome.violation for outcome in outcomes] == [""] * 6
    assert sum(outcome.counts["killed"] for outcome in outcomes) > 20


def test_no_invariant_breaks() -> None:
    tally = run_seeds(range(10_000, 10_002), (HYBRID,))
    assert tally.violations == []
    assert tally.schedules == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_invariant_breaks_in_hundreds_of_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = MixedCuts._step_of

    def step_of(self: MixedCuts, manifest: Any) -> int:
        steps.append(original(self, manifest))
        return steps[-1]

    monkeypatch.setattr(MixedCuts, "_step_of", step_of)
    tally = run_seeds(range(20_000, 20_500), (HYBRID,))
    assert tally.violations == []
    assert {"kill_worker", "kill_coordinator", "tear", "refuse", "join", "leave", "Shard.Ranks"} <= set(tally.counts)
    assert Counter(tally.counts)["Shard.Cut"] > 1000
    # Cuts of every part of a job, not of its ends alone.
    assert len(np.unique(steps)) > 20


@pytest.mark.parametrize(
    "plant",
    [pytest.param(p, marks=() if p in SOON else pytest.mark.slow, id=p.__name__) for p in planted_hybrid.PLANTED],
)
@pytest.mark.timeout(600)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    seed, violation = next(
        ((s, found) for s in range(MOST) if (found := run(draw(s, (HYBRID,)), files()).violation)), (-1, "")
    )
    assert violation, f"{plant.__name__} was not found by {MOST} schedules"
    # What a plant that fits the code no more runs into is no bug of the protocol.
    assert not re.search(r"(Attribute|Type|Name|Import)Error", violation), f"{plant.__name__} is broken: {violation}"
    monkeypatch.undo()
    # It is the bug that was found, and not the schedule.
    assert run(draw(seed, (HYBRID,)), files()).violation == "", f"{violation} of seed {seed}"
    print(f"{plant.__name__}: seed {seed}: {violation}")
