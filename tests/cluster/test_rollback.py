# SPDX-License-Identifier: Apache-2.0
"""The roll back of one table as the coordinator sees it: recorded before it happens, and carried to its end whoever dies."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.client.job import FAILED, TRAINING
from oarlock.cluster.orders import Orders
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, PSError, Unavailable
from oarlock.proto.shard_pb2 import ReplaceReply, ReplaceRequest

PATH = "/somewhere/cut-000004"


class Shards:
    """Two shards that note the numbers under which they were told; ``fate(address, request)`` may raise in their place."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.done: dict[str, list[int]] = {}
        self.generations: list[int] = []
        self.fate: Callable[[str, ReplaceRequest], None] = lambda address, request: None
        # As fate, but the shard has carried out the order.
        self.lost: Callable[[str, ReplaceRequest], None] = lambda address, request: None

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        if method == "Shard.Abort":
            # What a coordinator that is started again says of the number before.
            return Empty()
        assert method == "Shard.Replace", method
        self.log.append((address, request.number))
        self.fate(address, request)
        done = self.done.setdefault(address, [])
        if request.number and request.number not in done:
            done.append(request.number)
            self.generations.append(request.generation)
        self.lost(address, request)
        return ReplaceReply(rows=7)

    async def close(self) -> None: ...


@pytest.fixture
def shards() -> Shards:
    return Shards()


@pytest.fixture
def training(cluster: Any) -> Any:
    cluster.incarnations = cluster.shards()
    cluster.workers_ = cluster.workers()
    return cluster


def ask(cluster: Any, table: str = "user", path: str = PATH) -> int:
    number: int = cluster.service.rollback(pb.RollbackRequest(table=table, path=path)).number
    return number


def step(cluster: Any, shards: Shards, folder: Path) -> None:
    """Let the coordinator look once at what is to be done."""
    asyncio.run(Orders(cluster.coordinator, shards, folder).cutting.step())


def failing(error: PSError, when: Callable[[str, ReplaceRequest], bool], times: int = 1) -> Any:
    left = [times]

    def fate(address: str, request: ReplaceRequest) -> None:
        if left[0] and when(address, request):
            left[0] -= 1
            raise error

    return fate


def test_it_is_read_then_decided_then_done(training: Any, shards: Shards, tmp_path: Path) -> None:
    c = training.coordinator
    generation = c.generation
    assert ask(training) == 1
    decided: list[Any] = []
    shards.lost = lambda address, request: decided.append((request.number, c.store.fact("rollback")))
    step(training, shards, tmp_path)
    assert [number for number, _ in decided] == [0, 0, 1, 1]
    assert [fact for number, fact in decided if not number] == [None, None], "what is only read is not recorded"
    assert all(fact["gate"] == 1 for number, fact in decided if number), "recorded before anybody is told"
    assert shards.generations == [generation + 1] * 2
    assert (c.generation, c.store.fact("rollback"), c.cuts.gate, c.cuts.opened) == (generation + 1, None, None, 1)
    (event,) = training.status()["events"]
    assert (event["event"], event["table"], event["cut"], event["rows"], event["number"]) == (
        "rollback",
        "user",
        4,
        14,
        1,
    )
    assert c.placed
    assert c.placement().generation == generation + 1, "by which workers forget rows that they keep"
    assert training.status()["rollback"] == {}


def test_workers_that_push_are_waited_for(training: Any, shards: Shards, tmp_path: Path) -> None:
    one, _ = training.workers_
    training.lease(one)
    c = training.coordinator
    ask(training)

    async def body() -> None:
        looking = asyncio.ensure_future(Orders(c, shards, tmp_path).cutting.step())
        while c.cuts.gate is None:
            await asyncio.sleep(0)
        training.clock.now = c.cuts.gate.shuts
        for _ in range(20):
            await asyncio.sleep(0)
        assert all(number == 0 for _, number in shards.log)
        training.service.gate(pb.GateRequest(header=training.header(one), cut=1))
        await looking

    asyncio.run(body())
    assert shards.done == {address: [1] for address in shards.done}
    assert len(shards.done) == 2


def test_a_worker_that_is_late_leaves_all_as_it_was(training: Any, shards: Shards, tmp_path: Path) -> None:
    one, _ = training.workers_
    training.lease(one)
    c = training.coordinator
    number = ask(training)

    async def body() -> None:
        looking = asyncio.ensure_future(Orders(c, shards, tmp_path).cutting.step())
        while c.cuts.gate is None:
            await asyncio.sleep(0)
        training.clock.now = c.cuts.gate.ends + 1
        await looking

    asyncio.run(body())
    assert not any(shards.done.values())
    assert (c.phase, c.cuts.gate, c.store.fact("rollback")) == (TRAINING, None, None)
    failed = training.status()["rollback"]["failed"]
    assert failed["number"] == number
    assert "did not stop pushing" in failed["error"]
    assert ask(training) == number + 1


@pytest.mark.parametrize("shard", [0, 1])
def test_what_cannot_be_read_changes_nothing(training: Any, shards: Shards, tmp_path: Path, shard: int) -> None:
    error = CorruptCheckpoint("rows-user-00000.arrow: truncated")
    shards.fate = failing(error, lambda address, request: address == training.coordinator.shards[shard].address)
    ask(training)
    step(training, shards, tmp_path)
    assert not any(shards.done.values())
    assert training.coordinator.phase == TRAINING
    assert "truncated" in training.status()["rollback"]["failed"]["error"]
    assert training.coordinator.cuts.last == 0, "no gate was shut"


@pytest.mark.parametrize("answered", [False, True])
def test_a_shard_that_is_told_twice_is_told_under_the_same_number(
    training: Any, shards: Shards, tmp_path: Path, answered: bool
) -> None:
    error = Unavailable("the answer was lost")
    first = training.coordinator.shards[0].address
    lost = failing(error, lambda address, request: address == first and request.number > 0, times=3)
    if answered:
        shards.lost = lost
    else:
        shards.fate = lost
    ask(training)
    step(training, shards, tmp_path)
    assert [each for each in shards.log if each == (first, 1)] == [(first, 1)] * 4
    assert shards.done == {address: [1] for address in shards.done}
    assert len(training.status()["events"]) == 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("told", [0, 1, 2])
def test_a_coordinator_that_is_killed_in_between_begins_again(
    training: Any, shards: Shards, tmp_path: Path, told: int
) -> None:
    """Whichever shards have heard: the next one waits for its own gate, and all of them do it at that one."""
    left = [told]

    def die(address: str, request: ReplaceRequest) -> None:
        if request.number:
            if not left[0]:
                raise Killed
            left[0] -= 1

    ask(training)
    shards.fate = die
    if told == 2:
        # It has heard both, and dies before it has recorded that.
        shards.fate = lambda address, request: None
        training.coordinator.rollbacks.done = lambda rows: (_ for _ in ()).throw(Killed())
    with pytest.raises(Killed):
        step(training, shards, tmp_path)
    shards.fate = lambda address, request: None
    generations = list(shards.generations)
    training.restart()
    c = training.coordinator
    assert c.rollbacks.decided["gate"] == 1
    assert c.generation == c.rollbacks.decided["generation"], "shards that were told refuse older ones"
    for incarnation in training.workers_:
        training.heartbeat(incarnation)
    training.adopt()
    c.cuts.wanted = True
    step(training, shards, tmp_path)
    assert [numbers[-1] for numbers in shards.done.values()] == [2, 2], "no cut before it"
    assert min(shards.generations[len(generations) :]) > max(generations, default=0)
    (event,) = training.status()["events"]
    assert (event["number"], event["gate"]) == (1, 2)
    assert (c.rollbacks.decided, c.store.fact("rollback")) == (None, None)
    training.restart()
    assert training.coordinator.rollbacks.decided is None
    assert ask(training, "item") == 2


def test_a_table_that_went_back_on_some_shards_only_ends_the_job(training: Any, shards: Shards, tmp_path: Path) -> None:
    second = training.coordinator.shards[1].address
    shards.fate = failing(CorruptCheckpoint("gone"), lambda address, request: address == second and request.number > 0)
    ask(training)
    step(training, shards, tmp_path)
    assert training.coordinator.phase == FAILED
    assert "went back to /somewhere/cut-000004 on some shards and not on all: gone" in training.coordinator.reason


def test_what_may_pass_is_tried_again_with_another_number(training: Any, shards: Shards, tmp_path: Path) -> None:
    c = training.coordinator

    def gone(address: str, request: ReplaceRequest) -> None:
        if request.number == 1:
            raise Unavailable("not now")

    ask(training)
    shards.fate = gone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oarlock.cluster.rollback.READ_SECONDS", 0.01)
        step(training, shards, tmp_path)
    assert (c.phase, c.rollbacks.decided["gate"]) == (TRAINING, 1)
    assert c.cuts.gate is None
    shards.fate = lambda address, request: None
    step(training, shards, tmp_path)
    assert shards.done == {address: [2] for address in shards.done}
    assert len(shards.done) == 2


def test_what_is_refused_at_once(training: Any, make_cluster: Any) -> None:
    for table, path, error, match in (
        ("usr", PATH, NotFound, r"has no table 'usr'; did you mean 'user'\? There are: user, item"),
        ("w", PATH, NotFound, "has no table 'w'"),
        ("user", "cut-000004", InvalidArgument, "give an absolute path or a URL"),
        ("user", "/a\0/cut-000004", InvalidArgument, "give an absolute path or a URL"),
        ("user", "sftp://me:zebra@host/a/cut-000004", InvalidArgument, "'sftp://host...' has a password or a query"),
        ("user", "/somewhere", InvalidArgument, "say which cut, as PATH@CUT"),
    ):
        with pytest.raises(error, match=match):
            ask(training, table, path)
    assert ask(training) == 1
    assert ask(training) == 1, "the same again"
    with pytest.raises(Unavailable, match="table user is on its way back to /somewhere/cut-000004: one at a time"):
        ask(training, "item")
    training.coordinator.stop(True, "enough")
    with pytest.raises(InvalidArgument, match="is stopping: a table goes back while a job trains"):
        ask(training)
    sync = make_cluster(mode="sync", ranks=2)
    with pytest.raises(InvalidArgument, match="mode = 'sync' and the roll back of one table contradict each other"):
        ask(sync)


def test_the_cut_that_it_goes_back_to_stays_meanwhile(training: Any) -> None:
    c = training.coordinator
    assert c.rollbacks.pinned("/somewhere") == []
    ask(training)
    assert c.rollbacks.pinned("/somewhere") == [4]
    assert c.rollbacks.pinned("/elsewhere") == []


def test_the_cut_that_it_goes_back_to_stays_however_its_folder_is_written(training: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ask(training, path=f"file://{tmp_path}//link@4")
    assert training.coordinator.rollbacks.pinned(f"{tmp_path}/real/") == [4]
    assert training.coordinator.rollbacks.pinned(str(tmp_path)) == []


def test_a_job_that_goes_back_as_a_whole_forgets_it(training: Any) -> None:
    ask(training)
    c = training.coordinator
    c.rollbacks.decide(c.rollbacks.wanted, c.cuts.stand())
    c.begin_run(training.manifest(4), PATH)
    assert (c.rollbacks.decided, c.store.fact("rollback")) == (None, None)
