# SPDX-License-Identifier: Apache-2.0
"""Which cuts a job has behind it after it went back, on all short histories beside a model that keeps each cut's parent."""

import itertools

import pytest

from oarlock.checkpoint.line import Restore, events_of, line_of, restores_in


def test_the_histories_of_the_docstring() -> None:
    first = Restore(10, 12)
    assert line_of([9, 10, 11, 12], [first]) == [9, 10]
    assert line_of([9, 10, 11, 12, 13], [first]) == [9, 10, 13]
    assert line_of([9, 10, 11, 12, 13, 14], [first, Restore(12, 13)]) == [9, 10, 11, 12, 14]
    assert line_of([], [first]) == []
    assert line_of([3, 1], []) == [1, 3]


@pytest.mark.parametrize("steps", range(1, 6))
def test_every_history_of_a_few_steps(steps: int) -> None:
    """A step is a cut, an attempt at one that came to nothing, or going back to a cut that there was."""
    for history in itertools.product(("cut", "attempt", 0, 1, 2, 3), repeat=steps):
        parents: dict[int, int] = {}
        at, last, restores = 0, 0, []
        for step in history:
            if step == "attempt":
                last += 1
            elif step == "cut":
                last += 1
                parents[last] = at
                at = last
            elif isinstance(step, int) and len(parents) > step:
                at = sorted(parents)[step]
                restores.append(Restore(at, last))
        line, cut = [], at
        while cut:
            line.append(cut)
            cut = parents[cut]
        assert line_of(parents, restores) == sorted(line), history


def test_cuts_of_another_folder_come_before_all_of_this_one() -> None:
    assert line_of([13, 14], [Restore(12, 12)]) == [13, 14]
    assert line_of([13, 14], [Restore(12, 12), Restore(13, 14)]) == [13]


def test_a_history_that_is_none() -> None:
    whole = {"event": "restore", "cut": 3, "last": 5}
    wrong = [None, 7, "restore", {}, {"event": "restore"}, {**whole, "cut": "3"}, {**whole, "last": True}]
    assert restores_in([*wrong, whole, {**whole, "event": "other"}, {**whole, "cut": -1}]) == [Restore(3, 5)]
    assert restores_in("restore") == restores_in(None) == restores_in({"a": 1}) == []
    assert events_of({}) == events_of({"events": 3}) == events_of({"events": [3]}) == []
    assert events_of({"events": [whole]}) == [whole]
