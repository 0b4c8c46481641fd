# SPDX-License-Identifier: Apache-2.0
"""Cutting beside what else needs a gate or a place: nothing of it takes away what is another's."""

import asyncio
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from oarlock.client.job import WRITING
from oarlock.cluster.orders import Orders
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.shard_pb2 import ReplaceReply, WriteReply


class Killed(Exception):
    pass


class Answering:
    """Shards that do what they are told, until a coordinator is ``killed`` by what it tells them."""

    def __init__(self, killed: str = "") -> None:
        self.log: list[tuple[str, int]] = []
        self.alone: list[bool] = []
        self._killed = killed

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        if method == self._killed:
            raise Killed
        self.log.append((method, getattr(request, "cut", 0)))
        if method == "Shard.Write":
            self.alone.append(request.alone)
            return WriteReply(torn=True)
        return ReplaceReply(rows=1) if method == "Shard.Replace" else Empty()

    async def close(self) -> None: ...


def step(cluster: Any, folder: Path, shards: Answering | None = None) -> None:
    asyncio.run(Orders(cluster.coordinator, shards or Answering(), folder).cutting.step())


@pytest.fixture
def training(cluster: Any) -> Any:
    cluster.shards()
    cluster.workers()
    return cluster


def test_what_another_job_writes_in_the_same_place_is_left_alone(training: Any, tmp_path: Path) -> None:
    """Two jobs were made while the place was empty: the one that comes second has no cut, and the first one all of its."""
    theirs = replace(training.manifest(1), job="f" * 32)
    for name, data in (("cut-000001/manifest.json", bytes(theirs.encode())), ("cut-000002/rows.arrow", b"half")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    c = training.coordinator
    for _ in range(3):
        c.cuts.wanted = True
        step(training, tmp_path)
    assert c.cuts.last == 3
    assert all("has checkpoints of another job" in warning for warning in c.warnings)
    assert (tmp_path / "cut-000002" / "rows.arrow").read_bytes() == b"half"


def test_a_table_that_goes_back_does_not_stand_for_the_cut_of_an_epoch(training: Any, tmp_path: Path) -> None:
    """Whose first attempt came to nothing for the moment: it is still the next thing to do."""
    c = training.coordinator
    c.set_phase(WRITING)
    c.cuts.begin()
    c.cuts.give_up("not now", again=True)
    assert (c.phase, c.cuts.due()) == (WRITING, True)
    training.service.rollback(pb.RollbackRequest(table="user", path="/somewhere/cut-000004"))
    step(training, tmp_path)
    assert [event["event"] for event in c.events.all] == ["rollback"]
    assert (c.phase, c.cuts.due()) == (WRITING, True)


def test_views_of_a_digest_whose_coordinator_died_are_let_go(training: Any, tmp_path: Path) -> None:
    """They would keep all that changes until the next cut, which may be hours away."""
    training.coordinator.live_digest.wanted = True
    first = Answering(killed="Shard.Digest")
    with pytest.raises(Killed):
        step(training, tmp_path, first)
    assert first.log == [("Shard.Cut", 1)] * 2
    training.restart()
    for member in training.coordinator.members.alive("worker"):
        training.heartbeat(member.incarnation)
    training.adopt()
    second = Answering()
    step(training, tmp_path, second)
    assert second.log == [("Shard.Abort", 1)] * 2
    assert (training.coordinator.cuts.last, training.coordinator.cuts.failed) == (1, {})


@pytest.mark.parametrize("busy", [True, False])
def test_shards_are_told_whether_somebody_trains(training: Any, tmp_path: Path, busy: bool) -> None:
    """All their processors are for a cut that is made while nobody has work, and for no other."""
    c = training.coordinator
    for member in c.members.alive("worker"):
        training.heartbeat(member.incarnation)
    if busy:
        training.lease(c.members.alive("worker")[0].incarnation)
    shards = Answering()
    gate = c.cuts.begin()
    for worker in list(gate.missing):
        gate.come(worker)
    gate.shuts = c.clock()
    asyncio.run(Orders(c, shards, tmp_path).cutting._make(gate))
    assert set(shards.alone) == {not busy}


@pytest.mark.parametrize("stopped", ["before they came", "before the views", "shorter"])
def test_a_coordinator_that_was_stopped_for_long_believes_nobody_who_stood_at_the_gate(
    training: Any, tmp_path: Path, stopped: str
) -> None:
    """Who has heard nothing for so long pushes again, to one shard before its view begins and to another one after it."""
    c, clock = training.coordinator, training.clock
    worker = c.members.alive("worker")[0].incarnation
    training.lease(worker)
    shards = Answering()
    gate = c.cuts.begin()
    clock.now = (
        gate.shuts
        + (0.1 if stopped == "before the views" else 1.9 if stopped == "shorter" else 2) * c.spec.gate_seconds
    )
    gate.come(worker)
    if stopped == "before the views":
        call = shards.call

        async def answer(address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
            clock.now = gate.shuts + 2 * c.spec.gate_seconds
            return await call(address, method, request, timeout_seconds=timeout_seconds)

        shards.call = answer  # type: ignore[method-assign]
    asyncio.run(Orders(c, shards, tmp_path).cutting._make(gate))
    late = stopped != "shorter"
    assert ("by themselves" in c.cuts.failed["error"]) == late
    assert (("Shard.Write", 1) in shards.log) != late
    assert shards.log.count(("Shard.Abort", 1)) == 2


def test_a_store_that_hangs_before_a_cut_holds_up_nobody(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose the place is, is asked before the gate stands; the cut is begun once there is an answer."""
    c = training.coordinator
    back = Event()

    def hangs(*_: Any) -> None:
        assert back.wait(60)

    monkeypatch.setattr("oarlock.cluster.cutting.check_owner", hangs)
    c.cuts.wanted = True
    shards = Answering()

    async def body() -> None:
        cutting = Orders(c, shards, tmp_path).cutting
        hanging = asyncio.Event()
        run = cutting._run

        async def noted(*given: Any) -> Any:
            hanging.set()
            return await run(*given)

        monkeypatch.setattr(cutting, "_run", noted)
        making = asyncio.ensure_future(cutting.step())
        try:
            await hanging.wait()
            assert (c.cuts.gate, c.cuts.last, c.cuts.withholds, shards.log) == (None, 0, False, [])
        finally:
            back.set()
        await making

    for member in c.members.alive("worker"):
        training.heartbeat(member.incarnation)
    asyncio.run(body())
    assert (c.cuts.last, {number for _, number in shards.log}) == (1, {1})
