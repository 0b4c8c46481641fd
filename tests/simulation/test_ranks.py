# SPDX-License-Identifier: Apache-2.0
"""Sync jobs under random faults take the course of plain numpy to the bit; and every planted bug of theirs is found."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_ranks
import pytest

from oarlock.ps.shard import Shard
from oarlock.simulation.campaign import files, run_seeds
from oarlock.simulation.faults import SYNC, Outcome, draw
from oarlock.simulation.loop import Process
from oarlock.simulation.quick import quick
from oarlock.simulation.restored import run
from oarlock.simulation.wire import Call
from oarlock.simulation.world import World

MOST = 400
MOST_KILLED = 12
# Found within a second.
SOON = {
    planted_ranks.applied_without_the_last_rank,
    planted_ranks.committed_before_acknowledged,
    planted_ranks.added_in_order_of_arrival,
    planted_ranks.draws_of_the_process,
}


class Torn(World):
    """Kills the worker by whose commit a shard makes a step that another shard has not made, every other time.

    What it had sent to others is lost with it: else they would make the step all the same.
    """

    def _event(self, process: Process | None, call: Call, request: Any, reply: Any) -> None:
        self._sender = call.sender
        super()._event(process, call, request, reply)

    def _before(self, process: Process, call: Call) -> bool:
        return super()._before(process, call) or (call.method == "Shard.Pull" and not call.sender.alive)

    def _check_shard(self, number: int, shard: Shard, method: str, request: Any, reply: Any) -> None:
        super()._check_shard(number, shard, method, request, reply)
        shards = [service._joined[1] for service in self.services if service._joined is not None]
        steps = {s.staged.range()[1] for s in shards if s.staged is not None and s.generation}
        if method == "Shard.Pull" and len(steps) > 1 and request.rank and self._sender.alive:
            self.counts["torn"] += 1
            # Each costs a lease, and the job shall end.
            if self.counts["torn"] % 2 and self.counts["killed"] < MOST_KILLED:
                self._sender.alive = False
                self.workers.remove(self._sender)
                self._later(0.5, self._start_worker)
                self.counts["killed"] += 1


def run_torn(seed: int, folder: Path) -> Outcome:
    # A cut would tell all shards of all commits before the successor asks.
    quiet = replace(draw(seed, (SYNC,)), faults=(), at_gates=(), at_cuts=(), checkpoint_steps=0, checkpoint_seconds=0.0)
    schedule = replace(quiet, shards=3, latency=0.1)
    (folder / str(seed)).mkdir()
    with quick():
        return Torn(schedule, files(), folder / str(seed)).run()


@pytest.mark.slow
def test_whoever_follows_a_worker_that_told_one_shard_alone_tells_the_others(tmp_path: Path) -> None:
    outcomes = [run_torn(seed, tmp_path) for seed in range(6)]
    assert [outcome.violation for outcome in outcomes] == [""] * 6
    assert sum(outcome.counts["killed"] for outcome in outcomes) > 20


@pytest.mark.slow
def test_a_successor_that_believes_blocks_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random schedules seldom kill at that moment."""
    planted_ranks.successor_believes_blocks_alone(monkeypatch)
    violations = [run_torn(seed, tmp_path).violation for seed in range(4)]
    assert any(violations)
    assert not any(re.search(r"(Attribute|Type|Name|Import)Error", violation) for violation in violations)


def test_ranks_whose_words_were_lost_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two words have to be lost at one step, of two ranks and to two shards: in a thousand schedules that was once."""
    schedule = draw(20_684, (SYNC,))
    assert run(schedule, files()).violation == ""
    planted_ranks.waits_where_another_shard_was_not_told(monkeypatch)
    assert "L1: the job is not over" in run(schedule, files()).violation


def test_no_invariant_breaks() -> None:
    tally = run_seeds(range(10_000, 10_004), (SYNC,))
    assert tally.violations == []
    assert tally.schedules == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_invariant_breaks_in_a_thousand_schedules() -> None:
    tally = run_seeds(range(20_000, 21_000), (SYNC,))
    assert tally.violations == []
    assert {"kill_worker", "kill_coordinator", "tear", "refuse", "join", "leave", "Shard.Ranks"} <= set(tally.counts)
    assert Counter(tally.counts)["Shard.Cut"] > 2000


@pytest.mark.parametrize(
    "plant",
    [pytest.param(p, marks=() if p in SOON else pytest.mark.slow, id=p.__name__) for p in planted_ranks.PLANTED],
)
@pytest.mark.timeout(600)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    seed, violation = next(
        ((s, found) for s in range(MOST) if (found := run(draw(s, (SYNC,)), files()).violation)), (-1, "")
    )
    assert violation, f"{plant.__name__} was not found by {MOST} schedules"
    # What a plant that fits the code no more runs into is no bug of the protocol.
    assert not re.search(r"(Attribute|Type|Name|Import)Error", violation), f"{plant.__name__} is broken: {violation}"
    monkeypatch.undo()
    # It is the bug that was found, and not the schedule.
    assert run(draw(seed, (SYNC,)), files()).violation == "", f"{violation} of seed {seed}"
    print(f"{plant.__name__}: seed {seed}: {violation}")
