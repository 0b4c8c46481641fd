# SPDX-License-Identifier: Apache-2.0
"""A small job with cuts, a killed coordinator and a killed shard is exact whichever of its steps fails, in async and in sync."""

import pytest

from oarlock.simulation.campaign import files
from oarlock.simulation.faults import WIRE
from oarlock.simulation.steps import KINDS, NONE, STATEMENT, run_failing

MODES = ("async", "sync")


def tried(mode: str, kind: str, first: int, stride: int) -> tuple[int, list[str]]:
    """Fail every ``stride``-th step from ``first`` on; return how many there are, and what broke."""
    outcome, total = run_failing(mode, files(), kind, NONE)
    broken = [outcome.violation] if outcome.violation else []
    for at in range(first, total + 1, stride):
        outcome, _ = run_failing(mode, files(), kind, at)
        if outcome.violation:
            broken.append(f"{kind} {at} of {total}: {outcome.violation}")
    return total, broken


@pytest.mark.parametrize("mode", MODES)
def test_the_job_has_everything_in_it(mode: str) -> None:
    outcome, total = run_failing(mode, files(), STATEMENT, NONE)
    assert outcome.violation == ""
    assert total > 100
    wanted = {"Coordinator.Gate", "Shard.Cut", "Shard.Write", "Shard.Adopt", "Coordinator.Lease", "Shard.Push"}
    assert wanted | {"kill_coordinator", "kill_shard", "resumed"} <= set(outcome.counts)
    assert not outcome.counts["begun anew"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [WIRE[0], STATEMENT])
def test_some_steps_fail(mode: str, kind: str, seed: int) -> None:
    total, broken = tried(mode, kind, 1 + seed % 20, 250 if kind in WIRE else 120)
    assert broken == []
    assert total > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_fails(mode: str, kind: str) -> None:
    total, broken = tried(mode, kind, 1, 1)
    print(f"{mode}: {total} steps of kind {kind!r}")
    assert broken == []
