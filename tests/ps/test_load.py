# SPDX-License-Identifier: Apache-2.0
"""How busy a shard says it is: pushes that overlap count once as time, and each as one that is here."""

import json

import pytest

from oarlock.ps import load as module
from oarlock.ps.load import Load


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [10.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: time[0])
    return time


def seconds(load: Load) -> tuple[float, float]:
    told = load.told()
    return told["pushing_seconds"], told["pushes_seconds"]


def test_pushes_one_after_the_other_and_beside_each_other(now: list[float]) -> None:
    load = Load()
    with load:
        now[0] += 2
        with load:
            now[0] += 1
            assert seconds(load) == (3, 4), "also what has not ended"
    now[0] += 5
    assert seconds(load) == (3, 4)
    load.__enter__()
    now[0] += 1
    load.__exit__(ValueError, ValueError("refused"), None)
    now[0] += 5
    assert seconds(load) == (4, 5)


def test_what_a_process_has() -> None:
    told = Load().told()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert 0 < told["resident_bytes"] <= told["limit_bytes"]
    assert told["processors"] > 0
    assert told["cpu_seconds"] > 0
