# SPDX-License-Identifier: Apache-2.0
"""Real servers of a model in two parts, each twice, and of a job that is followed: cuts change, rows change, servers are killed
and come back, and clients of both kinds ask all the time. No answer fails, and none is wrong."""

import pytest

from oarlock.benchmarks.serving_faults import FULL, Size, measure

pytestmark = pytest.mark.slow


def check(found):
    assert (found["failed"], found["wrong"]) == (0, 0), [one["said"] for one in found["by_kind"].values()]
    assert all(one["answers"] for one in found["by_kind"].values())
    assert found["swaps"] >= 5
    assert found["hedges"] <= 0.1 * 2 * found["answers"] + 30
    assert found["asked_again"] > 0, "parts were of different cuts now and then"


def test_no_answer_fails_or_is_wrong_while_every_server_is_killed(tmp_path):
    # Until each of the five that may be killed was, but for the time that starting takes.
    found = measure(Size(2_000, 60.0, 150.0, cut_seconds=1.0, calm_seconds=0.5), tmp_path)
    check(found)
    assert found["kills"] >= 4


def test_of_a_million_answers_none_fails_and_none_is_wrong(tmp_path):
    size = Size(FULL.answers, FULL.least_seconds, 3600.0, FULL.cut_seconds, FULL.calm_seconds)
    found = measure(size, tmp_path)
    check(found)
    assert found["answers"] >= 1_000_000
