# SPDX-License-Identifier: Apache-2.0
"""A backlog gives each key that was noted in a later lap, and keeps no more than what matters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.serving import backlog
from oarlock.serving.backlog import Backlog

KEYS = st.lists(st.integers(0, 60), max_size=20)


def array(keys: Any) -> Any:
    return np.array(list(keys), np.uint64)


@settings(max_examples=200)
@given(st.lists(st.one_of(KEYS, st.integers(1, 5)), max_size=40))
def test_a_key_is_in_a_lap_after_it_was_noted(deeds: list[Any]) -> None:
    """Those below 40 matter; the others may come or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backlog, "LEAST_NOTED", 15)
        made = Backlog(lambda keys: keys < 40)
        owed: dict[int, float] = {}
        for now, deed in enumerate([*deeds, *[7] * 60]):
            if isinstance(deed, list):
                made.note(array(deed), float(now))
                owed |= {key: float(now) for key in deed if key not in owed}
                continue
            oldest = made.oldest
            lap, noted_at = made.take(deed)
            assert len(np.unique(lap)) == len(lap) <= deed
            for key in lap.tolist():
                # Whoever is asked how old this is says no less.
                assert oldest is not None
                assert oldest <= noted_at <= owed.pop(key, np.inf)
            made.done()
        assert not [key for key in owed if key < 40]
        assert made.waiting == 0
        assert made.oldest is None


def test_it_is_bounded_by_what_matters() -> None:
    rng = np.random.default_rng(0)
    made = Backlog(lambda keys: keys < 1000)
    for _ in range(200):
        made.note(rng.integers(0, 1 << 60, 5000).astype(np.uint64), 0.0)
        made.note(rng.integers(0, 1000, 5000).astype(np.uint64), 0.0)
        assert made.waiting <= backlog.LEAST_NOTED
    found = made.take(1 << 30)[0]
    assert set(range(1000)) <= set(found.tolist())


def test_what_is_being_put_in_place_matters_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key may leave the table while its row is on the way into the index, where nobody knows of it yet."""
    monkeypatch.setattr(backlog, "LEAST_NOTED", 3)
    made = Backlog(lambda keys: np.zeros(len(keys), np.bool_))
    made.note(array([5]), 0.0)
    assert made.take(10)[0].tolist() == [5]
    made.note(array([5, 6, 7, 8]), 1.0)
    made.done()
    assert made.take(10)[0].tolist() == [5]
