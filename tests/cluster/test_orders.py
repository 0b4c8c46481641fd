# SPDX-License-Identifier: Apache-2.0
"""Orders and the coordinator's loop, against shards that hang, refuse, fail and come back."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.client.job import OVER
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_coordinator
from oarlock.proto.errors import Internal, InvalidArgument, PSError, Unavailable
from oarlock.proto.shard_pb2 import AdoptReply, WriteReply


class Shards:
    """Answers orders as told: an error, a reply, or never. ``log`` is what was asked, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.say: dict[str, Callable[[str, Any], Any]] = {}

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        self.log.append((method, address))
        answer = self.say.get(method)
        if answer is not None:
            found = answer(address, request)
            return await found if asyncio.iscoroutine(found) else found
        return AdoptReply(generation=1) if method == "Shard.Adopt" else WriteReply(entries=json.dumps([]))

    async def close(self) -> None: ...


def failing(error: PSError) -> Callable[[str, Any], Any]:
    def fail(address: str, request: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def shards() -> Shards:
    return Shards()


def run(cluster: Any, shards: Shards, folder: Path, during: Callable[[], Any], seconds: float = 20.0) -> None:
    """Run the coordinator's loop until its job is over; ``during`` is called again and again beside it."""

    async def body() -> None:
        loop = asyncio.ensure_future(run_coordinator(cluster.coordinator, Orders(cluster.coordinator, shards, folder)))
        async with asyncio.timeout(seconds):
            while not loop.done():
                if cluster.coordinator.phase in OVER:
                    for member in [
                        *cluster.coordinator.members.alive("shard"),
                        *cluster.coordinator.members.alive("worker"),
                    ]:
                        cluster.coordinator.member_gone(member, "left")
                else:
                    during()
                # A lease ends within some 100 turns; between two looks the coordinator does not seem to have been away.
                cluster.clock.now += cluster.spec.heartbeat_seconds / 4
                await asyncio.sleep(0.001)
        await loop

    asyncio.run(body())


@pytest.fixture
def quick(make_cluster: Callable[..., Any]) -> Any:
    """A cluster whose loop turns fast, with two shards that have joined and not adopted."""
    cluster = make_cluster(heartbeat_seconds=0.02, lease_seconds=0.5)
    cluster.incarnations = [cluster.join("shard", f"a:{i}").incarnation for i in (1, 2)]
    return cluster


def everybody_lives(cluster: Any) -> None:
    for member in [m for m in cluster.coordinator.members.all.values() if m.state == "alive"]:
        cluster.heartbeat(member.incarnation)


def test_a_shard_that_hangs_in_a_write_loses_its_lease_and_ends_the_job(
    quick: Any, shards: Shards, tmp_path: Path
) -> None:
    def forever(address: str, request: Any) -> Any:
        return asyncio.sleep(1000)

    shards.say["Shard.Write"] = forever
    worker = quick.join("worker").incarnation
    trained = False

    def during() -> None:
        nonlocal trained
        if quick.coordinator.phase == "training" and not trained:
            trained = True
            quick.train_epoch(worker)
        for incarnation in (quick.incarnations[0], worker):
            if quick.coordinator.phase in ("gathering", "training", "writing"):
                quick.heartbeat(incarnation)
        if quick.coordinator.phase == "gathering":
            quick.heartbeat(quick.incarnations[1])

    run(quick, shards, tmp_path, during)
    assert quick.coordinator.phase == "failed"
    assert "shard 1" in quick.coordinator.reason
    assert "lease ended" in quick.coordinator.reason


def test_a_shard_that_cannot_take_its_blocks_ends_the_job_with_its_words(
    quick: Any, shards: Shards, tmp_path: Path
) -> None:
    shards.say["Shard.Adopt"] = failing(InvalidArgument("generation 1 is older than this shard's 2"))
    run(quick, shards, tmp_path, lambda: None)
    assert quick.coordinator.phase == "failed"
    assert "could not take its blocks: generation 1 is older" in quick.coordinator.reason


def test_adoption_is_asked_again_until_it_is_answered(quick: Any, shards: Shards, tmp_path: Path) -> None:
    asked = 0

    def sometimes(address: str, request: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked < 6:
            raise Unavailable("starting")
        return AdoptReply(generation=1)

    shards.say["Shard.Adopt"] = sometimes

    def during() -> None:
        everybody_lives(quick)
        if quick.coordinator.phase == "training":
            quick.coordinator.stop(False, "seen enough")

    run(quick, shards, tmp_path, during)
    assert quick.coordinator.phase == "stopped"
    assert asked >= 6


def test_a_failed_write_goes_back_to_training_and_the_last_one_fails(
    quick: Any, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oarlock.cluster.cuts.LAST_PAUSES", (0.01, 0.02))
    shards.say["Shard.Write"] = failing(Internal("No space left on device"))
    worker = quick.join("worker").incarnation

    def during() -> None:
        everybody_lives(quick)
        if quick.coordinator.phase == "training":
            quick.train_epoch(worker)

    run(quick, shards, tmp_path, during)
    assert quick.coordinator.phase == "failed"
    why = "No space left on device"
    assert quick.coordinator.reason == f"the last checkpoint could not be written: {why}; there is none"
    assert quick.status()["warnings"] == [
        f"checkpoint 1 could not be written, training goes on: {why}",
        f"the last checkpoint could not be written, it is tried again in 0.01 s: {why}",
        f"the last checkpoint could not be written, it is tried again in 0.02 s: {why}",
    ]
    assert len(quick.coordinator.work.history) == 2


def test_a_stop_without_checkpoint_writes_none(quick: Any, shards: Shards, tmp_path: Path) -> None:
    def during() -> None:
        everybody_lives(quick)
        if quick.coordinator.phase == "training":
            quick.coordinator.stop(False, "no checkpoint")

    run(quick, shards, tmp_path, during)
    assert (quick.coordinator.phase, quick.coordinator.reason) == ("stopped", "no checkpoint")
    assert "Shard.Write" not in {m for m, _ in shards.log}


def test_closed_splits_are_told_to_every_shard_until_it_heard(quick: Any, shards: Shards, tmp_path: Path) -> None:
    heard: dict[str, int] = {"a:1": 0, "a:2": 0}
    refusals = 3

    def close(address: str, request: Any) -> Any:
        nonlocal refusals
        if address == "a:2" and refusals:
            refusals -= 1
            raise Unavailable("busy")
        heard[address] = request.closed.floor
        return WriteReply()

    shards.say["Shard.Close"] = close
    worker = quick.join("worker").incarnation
    closed = False

    def during() -> None:
        nonlocal closed
        everybody_lives(quick)
        if quick.coordinator.phase == "training":
            if not closed:
                quick.close(worker, quick.lease(worker).splits[0])
                closed = True
            elif set(heard.values()) == {1}:
                quick.coordinator.stop(False, "heard")

    run(quick, shards, tmp_path, during)
    assert quick.coordinator.phase == "stopped"


def test_a_state_that_cannot_be_written_ends_the_loop_with_its_words(
    quick: Any, shards: Shards, tmp_path: Path
) -> None:
    def during() -> None:
        everybody_lives(quick)
        if quick.coordinator.phase == "training":
            quick.store._broken = "the disk is full"

    with pytest.raises(Unavailable, match="the disk is full"):
        run(quick, shards, tmp_path, during)


def test_an_order_that_came_too_early_is_given_again_and_has_not_failed(
    quick: Any, shards: Shards, tmp_path: Path
) -> None:
    early = Unavailable("the blocks here are at step 0, the cut is of step 1", not_yet=True)
    answers = {"a:1": [early] * 3, "a:2": [early, Unavailable("no answer")]}

    def cut(address: str, request: Any) -> Any:
        if answers[address]:
            raise answers[address].pop()
        return WriteReply()

    shards.say["Shard.Cut"] = cut
    quick.adopt()
    quick.coordinator.cuts.wanted = True
    orders = Orders(quick.coordinator, shards, tmp_path)
    asyncio.run(orders.cutting.step())
    assert [method for method, _ in shards.log].count("Shard.Cut") == 4 + 3
    assert {result: n for (order, result), n in orders.counts.items() if order == "cut"} == {"done": 2, "failed": 1}
