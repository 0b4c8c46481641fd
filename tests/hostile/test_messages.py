# SPDX-License-Identifier: Apache-2.0
"""Any bytes at all, sent to every method of a shard and of a coordinator: an answer or an error by name."""

import coordinator_target
import pytest
import targets

from oarlock.checkpoint.files import Calls

FAST = 5_000
LONG = 1_000_000


@pytest.fixture
def no_sync(monkeypatch):
    """Files of these tests need not survive a power cut, and there are many."""
    monkeypatch.setattr(Calls, "sync", lambda self, descriptor: None)
    monkeypatch.setattr(Calls, "sync_folder", lambda self, path: None)


@pytest.fixture
def shard(seed, tmp_path, no_sync, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return targets.ShardTarget(seed, tmp_path / "shard")


@pytest.fixture
def coordinator(seed):
    made = coordinator_target.CoordinatorTarget(seed)
    yield made
    made.close()


def attack(target, seed, inputs):
    print(f"seed {seed}: {inputs} inputs")
    target.run(inputs)
    assert target.inputs == inputs
    # Both ends are reached: most are refused, and many of what is left are messages that differ from good ones.
    assert target.refused > inputs // 5
    assert target.answered > inputs // 10


def test_a_shard_under_thousands_of_bad_messages(shard, seed):
    attack(shard, seed, FAST)


def test_a_coordinator_under_thousands_of_bad_messages(coordinator, seed):
    attack(coordinator, seed, FAST)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shard_under_a_million_bad_messages(shard, seed):
    attack(shard, seed, LONG)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_coordinator_under_a_million_bad_messages(coordinator, seed):
    attack(coordinator, seed, LONG)
