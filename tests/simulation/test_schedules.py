# SPDX-License-Identifier: Apache-2.0
"""Whole jobs under random faults keep every invariant; and a seed says all that happens."""

import hashlib
import os
import subprocess
import sys

import pytest

from oarlock.simulation.campaign import run_seeds
from oarlock.simulation.faults import KINDS, LEAST_EVENTS

LOG = """
import sys
from oarlock.simulation.campaign import files
from oarlock.simulation.faults import draw
from oarlock.simulation.restored import run
# before
for seed in range(5000, 5005):
    log = []
    outcome = run(draw(seed), files(), log)
    assert not outcome.violation, outcome.violation
    print(seed, outcome.events, *log, sep="\\n")
"""


def test_no_invariant_breaks() -> None:
    tally = run_seeds(range(10_000, 10_040))
    assert tally.violations == []
    assert tally.schedules == 40
    assert tally.least_events >= LEAST_EVENTS


def test_a_fault_may_strike_while_a_job_has_no_shards() -> None:
    """Between two lives of it."""
    assert run_seeds(range(400_173, 400_174)).violations == []


def test_a_shard_that_is_killed_once_the_job_is_done_takes_nothing_along() -> None:
    # Its lease ends while late messages are waited for.
    assert run_seeds(range(3_001_507, 3_001_508)).violations == []


def test_a_worker_that_has_closed_all_its_splits_holds_nobody_back() -> None:
    # It waits at a gate, and asks a coordinator that knows no clocks for no more of them.
    assert run_seeds(range(3_001_824, 3_001_825)).violations == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_invariant_breaks_in_a_thousand_schedules() -> None:
    tally = run_seeds(range(20_000, 21_000))
    assert tally.violations == []
    assert tally.least_events >= LEAST_EVENTS
    # Every kind of fault struck, and none of them for nothing.
    assert set(KINDS) <= set(tally.counts)


def test_a_seed_says_all_that_happens() -> None:
    """In another process, with another order of hashes and after other schedules, every event is the same."""
    digests = set()
    for seed, before in (("1", ""), ("2", "run(draw(77), files())")):
        ended = subprocess.run(
            [sys.executable, "-P", "-c", LOG.replace("# before", before)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr.decode()
        assert len(ended.stdout.splitlines()) > 1000
        digests.add(hashlib.sha256(ended.stdout).hexdigest())
    assert len(digests) == 1
