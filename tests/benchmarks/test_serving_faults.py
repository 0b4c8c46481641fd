# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of faults counts as wrong is wrong, and what is right is not counted."""

import numpy as np
import pytest

from oarlock.benchmarks.serving_faults_asker import BOARD_WORDS, CUT, PUSHED, SPECS, Asker, _Counting, values_of
from oarlock.serving import Found, ModelVersion


@pytest.fixture
def counting():
    board = np.zeros(BOARD_WORDS, np.int64)
    board[CUT], board[PUSHED] = 7, 20
    return _Counting(board, 1, "blocking", 0)


def answer(counting, cut, said=None, missing=0):
    rows = {
        spec.name: np.repeat(values_of(cut, counting.drawn[3][spec.name])[:, None], spec.dim, axis=1) for spec in SPECS
    }
    return Found(rows, dict.fromkeys(rows, missing), ModelVersion(0, said or cut, 1.0))


def test_answers_of_cuts_are_checked_whole(counting):
    for cut in (1, 7):
        counting.check(3, answer(counting, cut))
    assert counting.wrong == 0
    mixed = answer(counting, 6)
    mixed["item"][-1] = answer(counting, 7)["item"][-1]
    other = answer(counting, 6)
    other["user"][0, -1] += 1
    wrong = [mixed, other, answer(counting, 6, said=5), answer(counting, 8), answer(counting, 6, missing=1)]
    for each in wrong:
        counting.check(3, each)
    assert counting.wrong == len(wrong)


def test_answers_of_a_job_that_is_followed_are_bounded_and_never_go_back(counting):
    def marks(value):
        return Found({"marks": np.full((4, 1), value, np.float32)}, {"marks": 0}, ModelVersion(1, 0, 0.1, True))

    for value in (12.0, 20.0, 12.0):
        counting.check_marks(0, marks(value), 12, alone=False)
    for value in (12.0, 13.0, 13.0):
        counting.check_marks(0, marks(value), 12, alone=True)
    assert counting.wrong == 0
    counting.check_marks(0, marks(12.0), 12, alone=True)
    for value in (11.0, 21.0, 14.5):
        counting.check_marks(0, marks(value), 12, alone=False)
    assert counting.wrong == 4
    assert Asker.word(1) < BOARD_WORDS
