# SPDX-License-Identifier: Apache-2.0
"""The scaler: each rule alone, and simulated jobs that come to rest at the numbers that serve them."""

import dataclasses
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from oarlock.client.autoscale import Autoscale, read_autoscale, to_values
from oarlock.cluster.scaler import Decision, Look, ShardLook, State, decide
from oarlock.proto.errors import InvalidArgument

POLICY = Autoscale(servers_most=16, workers_most=64, looks=3, cool_down_seconds=100, look_seconds=20)


def look(servers: int = 2, workers: int = 2, memory: float = 0.5, busy: float = 0.6, **others: float) -> Look:
    speed = others.pop("speed", 1000.0)
    shard = ShardLook(int(memory * 1000), 1000, busy, **others)
    return Look(0.0, servers, workers, (shard,) * servers, workers, speed)


def repeated(policy: Autoscale, given: Look, times: int, state: State | None = None) -> tuple[State, list[Decision]]:
    state, found = state or State(), []
    for i in range(times):
        state, decision = decide(policy, state, replace(given, at=20.0 * i), 20.0 * i)
        found.append(decision)
    return state, found


SERVERS_ONLY = replace(POLICY, workers_most=0)
WORKERS_ONLY = replace(POLICY, servers_most=0)


@pytest.mark.parametrize(
    ("given", "servers", "said"),
    [
        (look(memory=0.8), 3, "uses 80% of its memory"),
        (look(busy=0.9), 3, "busy 90%"),
        (look(waiting=10.0), 3, "10.0 pushes wait"),
        (look(servers=4, memory=6.0), 8, "uses 600%"),
        (look(servers=4, memory=0.1, busy=0.1), 2, "servers would do"),
        (look(servers=10, memory=0.5, busy=0.1), 10, ""),
        (look(servers=20, memory=0.5), 16, ""),
    ],
)
def test_servers_by_memory_busy_time_and_queues(given: Look, servers: int, said: str) -> None:
    _, found = repeated(SERVERS_ONLY, given, 3)
    assert found[-1].servers == servers
    assert found[-1].workers == given.workers
    assert said in found[-1].explain()
    # Only what several looks in a row want is done.
    assert not any(d.changed for d in found[:-1])


def test_the_fullest_server_counts_for_memory() -> None:
    shards = (ShardLook(900, 1000, 0.2), ShardLook(100, 1000, 0.2))
    assert repeated(SERVERS_ONLY, replace(look(), shards=shards), 3)[1][-1].servers == 3


def test_servers_are_not_made_fewer_while_their_memory_is_not_known() -> None:
    shards = (ShardLook(100, 0, 0.1),) * 4
    found = repeated(SERVERS_ONLY, replace(look(servers=4), shards=shards), 5)[1]
    assert not any(d.changed for d in found)
    assert "not known" in found[-1].explain()


def test_what_would_not_fit_afterwards_is_not_made_smaller() -> None:
    # Two of three would be at 0.66 of their memory: below the bound of 0.7, but without anything to spare.
    assert not any(d.changed for d in repeated(SERVERS_ONLY, look(servers=3, memory=0.44, busy=0.1), 9)[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (replace(look(busy=0.99), moving=True), "under way"),
        (replace(look(busy=0.99), shards=look(busy=0.99).shards[:1]), "1 of 2 servers"),
        (replace(look(busy=0.99), working=1), "1 of 2 workers"),
        (look(busy=math.nan), "no number"),
        (replace(look(busy=0.99), samples_per_second=math.inf), "no number"),
    ],
)
def test_nothing_is_decided_on_what_is_incomplete(given: Look, said: str) -> None:
    _, found = repeated(POLICY, given, 10)
    assert not any(d.changed for d in found)
    assert said in found[-1].explain()


def test_nothing_is_decided_on_old_measurements() -> None:
    state = State()
    for i in range(10):
        state, decision = decide(POLICY, state, replace(look(busy=0.99), at=20.0 * i), 20.0 * i + 16)
        assert not decision.changed
    assert "16 s old" in decision.explain()


def test_a_gap_begins_the_count_anew() -> None:
    state, _ = repeated(SERVERS_ONLY, look(busy=0.9), 2)
    state, _ = repeated(SERVERS_ONLY, replace(look(busy=0.9), moving=True), 1, state)
    assert not any(d.changed for d in repeated(SERVERS_ONLY, look(busy=0.9), 2, state)[1])


def test_a_cool_down_follows_a_change() -> None:
    state, found = repeated(SERVERS_ONLY, look(busy=0.9), 3)
    assert found[-1].changed
    for at in (60.0, 100.0, 139.0):
        state, decision = decide(SERVERS_ONLY, state, replace(look(servers=3, busy=0.9), at=at), at)
        assert not decision.changed
        assert "cool-down" in decision.explain()


def speeds(*known: tuple[int, float], **others: int) -> State:
    return State(speeds={w: (speed, 9) for w, speed in known}, **others)


def test_workers_by_the_speed_of_the_last_ones_added() -> None:
    # 2 -> 4 workers: 1000 -> 1900 samples/s is worth it, 1000 -> 1100 is not.
    good = repeated(WORKERS_ONLY, look(workers=4, speed=1900.0), 3, speeds((2, 1000.0), (4, 1900.0)))[1][-1]
    assert good.workers == 8
    assert "each added 450 samples/s, 90% of the 500 of each before" in good.explain()
    state, found = repeated(WORKERS_ONLY, look(workers=4, speed=1100.0), 3, speeds((2, 1000.0), (4, 1100.0)))
    assert found[-1].workers == 2
    assert "10% of the 500" in found[-1].explain()
    assert state.ceiling == 4
    # Three may still be worth it, and are tried once.
    _, found = repeated(WORKERS_ONLY, look(workers=2), 3, replace(state, changed_at=-math.inf))
    assert found[-1].workers == 3


def test_no_workers_are_added_where_servers_are_the_limit() -> None:
    found = repeated(WORKERS_ONLY, look(busy=0.8), 9)[1]
    assert not any(d.changed for d in found)
    assert "more workers would wait, too" in found[-1].explain()


def test_workers_outside_their_limits_come_back_by_halves() -> None:
    policy = replace(WORKERS_ONLY, workers_least=4, workers_most=10)
    assert repeated(policy, look(workers=1), 3)[1][-1].workers == 2
    assert repeated(policy, look(workers=100), 3)[1][-1].workers == 50
    assert repeated(policy, look(workers=12), 3)[1][-1].workers == 10


def test_what_is_off_is_left_alone() -> None:
    assert not any(d.changed for d in repeated(Autoscale(), look(memory=0.99, busy=0.99), 9)[1])


@dataclasses.dataclass
class Job:
    """A job as it might be: ``one`` samples/s of a worker alone, a server that can do ``serves``, memory that grows."""

    one: float
    serves: float
    memory: float
    grows: float
    limit: float
    noise: float
    most: float = math.inf

    def look(self, at: float, servers: int, workers: int, rng: np.random.Generator) -> Look:
        offered = min(self.one * workers, self.most)
        capacity = servers * self.serves
        # Queues make it soft.
        speed = (offered**-4 + capacity**-4) ** -0.25 * (1 + self.noise * rng.standard_normal())
        used = (self.memory + self.grows * at) / servers
        busy = min(speed / capacity, 1.0)
        shards = tuple(
            ShardLook(int(used * (1 + 0.02 * rng.random())), int(self.limit), float(busy)) for _ in range(servers)
        )
        return Look(at, servers, workers, shards, workers, float(speed))


def simulated(policy: Autoscale, job: Job, seed: int, looks: int = 400) -> list[tuple[int, int]]:
    rng, state, servers, workers, told = np.random.default_rng(seed), State(), 1, 1, []
    for i in range(looks):
        at = i * policy.look_seconds
        state, decision = decide(policy, state, job.look(at, servers, workers, rng), at)
        assert policy.servers_least <= decision.servers <= policy.servers_most
        assert policy.workers_least <= decision.workers <= policy.workers_most
        assert servers / 2 <= decision.servers <= 2 * servers
        assert workers / 2 <= decision.workers <= 2 * workers
        assert decision.servers == servers or decision.workers == workers
        servers, workers = decision.servers, decision.workers
        told.append((servers, workers))
    return told


@pytest.mark.parametrize("seed", range(12))
def test_a_job_whose_data_is_the_limit_comes_to_rest_near_the_knee(seed: int) -> None:
    # The source of the data gives 20,000 samples/s: 20 workers.
    told = simulated(POLICY, Job(1000.0, 1e5, 1e6, 0.0, 1e9, 0.03, most=20_000.0), seed)
    assert len(set(told[200:])) == 1, "it goes on changing"
    assert told[-1][0] == 1
    assert 14 <= told[-1][1] <= 30


@pytest.mark.parametrize("seed", range(12))
def test_a_job_whose_servers_are_the_limit_gets_more_of_both(seed: int) -> None:
    told = simulated(POLICY, Job(1000.0, 4000.0, 1e6, 0.0, 1e9, 0.03), seed)
    assert len(set(told[300:])) == 1, "it goes on changing"
    servers, workers = told[-1]
    assert servers == 16 or servers * 4000 * 0.7 >= workers * 1000 * 0.8
    assert workers >= 32


@pytest.mark.parametrize("seed", range(6))
def test_memory_that_grows_is_met_before_it_is_full(seed: int) -> None:
    job = Job(1000.0, 1e6, 1e8, 2e5, 1e9, 0.03, most=1000.0)
    told = simulated(POLICY, job, seed)
    numbers = [servers for servers, _ in told]
    assert numbers == sorted(numbers), "never fewer while it grows"
    for i, servers in enumerate(numbers):
        assert (job.memory + job.grows * i * POLICY.look_seconds) * 1.02 / servers < 0.9 * job.limit


@pytest.mark.parametrize("seed", range(6))
def test_noise_alone_changes_little(seed: int) -> None:
    told = simulated(POLICY, Job(1000.0, 1e5, 1e6, 0.0, 1e9, 0.15, most=20_000.0), seed, 600)
    changes = sum(a != b for a, b in itertools.pairwise(told))
    assert changes <= 16
    assert len(set(told[-200:])) == 1


def test_the_policy_of_a_job_file() -> None:
    found = read_autoscale({"servers_most": 8, "busy_share": 0.5, "cool_down_seconds": 60}, "job file")
    assert found == Autoscale(servers_most=8, busy_share=0.5, cool_down_seconds=60.0)
    assert found
    assert isinstance(found.cool_down_seconds, float)
    assert read_autoscale({}, "job file") == Autoscale()
    assert not Autoscale()
    assert not read_autoscale({"servers_most": 0, "looks": 5}, "job file"), "said to be left alone"
    assert read_autoscale({"workers_most": 2, "dry_run": True}, "job file").dry_run
    for each in (found, Autoscale(), Autoscale(workers_most=2, dry_run=True, server_bytes=1 << 40)):
        assert read_autoscale(to_values(each), "job") == each


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "job file: autoscale = []: give a table"),
        ({"server_most": 3}, "did you mean 'servers_most'?"),
        ({"busy_share": 0.5}, "scales nothing"),
        ({"servers_most": 2.5}, "autoscale.servers_most = 2.5: give an integer"),
        ({"servers_most": True}, "give an integer"),
        ({"workers_most": 4, "busy_share": "much"}, "give a finite number"),
        ({"workers_most": 4, "busy_share": math.nan}, "give a finite number"),
        ({"workers_most": 4, "busy_share": 1}, "between 0 and 1"),
        ({"workers_most": 4, "workers_least": 5}, "from workers_least = 5"),
        ({"workers_most": 4, "workers_least": 0}, "from 1 to 4096"),
        ({"workers_most": 5000}, "to 4096"),
        ({"workers_most": 4, "looks": 0}, "from 1 to 1000"),
        ({"workers_most": 4, "look_seconds": 0}, "above 0"),
        ({"workers_most": 4, "waiting_pushes": -1}, "above 0"),
        ({"workers_most": 4, "waiting_pushes": 1 << 2000}, "give a finite number"),
        ({"workers_most": 1 << 2000}, "give an integer"),
        ({"workers_most": 4, "server_bytes": -1}, "autoscale.server_bytes = -1: give 0 (as the system allows)"),
        ({"workers_most": 4, "server_bytes": 1e9}, "give an integer"),
        ({"workers_most": 4, "dry_run": 1}, "autoscale.dry_run = 1: give true or false"),
        ({"workers_most": 4, "looks": False}, "give an integer"),
        ({"dry_run": True}, "scales nothing"),
    ],
)
def test_what_is_wrong_is_said(values: object, said: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_autoscale(values, "job file")
    assert said in str(error.value)
    assert str(error.value).startswith("job file: autoscale")
