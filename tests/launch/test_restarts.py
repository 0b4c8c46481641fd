# SPDX-License-Identifier: Apache-2.0
"""What the launcher does when processes end, with cheap processes in the place of real ones and a coordinator that is a stub."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from oarlock.client.entry import START_AGAIN
from oarlock.cluster.store import Store
from oarlock.launch.folder import STATE_FILE
from oarlock.proto.errors import Unavailable

Stage = Any
Script = Iterator[Any]


def test_a_killed_worker_is_started_again(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        dead = stage.kill("worker", 1)
        yield from stage.until(lambda: stage.starts("worker") == 3 and stage.left)
        # Its splits are free at once, and not held to be at fault.
        assert stage.left == [(dead.process.pid, "")]
        assert not stage.child("worker", 1).ended
        yield

    status = stage.play(script)
    assert status["phase"] == "stopped"
    assert stage.started[-1] == ("worker", 1, ["--coordinator", stage.address, "--reader", "arrow"])
    assert status["warnings"] == ["worker 1 was ended by SIGKILL; started again (1 of 1000)"]
    assert status["restarts"] == 1
    assert stage.statuses[-1]["warnings"] == status["warnings"]


def test_a_killed_coordinator_is_started_again_where_it_was(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        for life in (2, 3):
            stage.kill("coordinator")
            yield from stage.until(lambda life=life: stage.starts("coordinator") == life)
        yield from stage.until(lambda: "note" not in stage.statuses[-1])

    status = stage.play(script)
    first, *later = [arguments for role, _, arguments in stage.started if role == "coordinator"]
    assert first == ["--dir", str(stage.folder)]
    for arguments in later:
        assert arguments[:4] == ["--dir", str(stage.folder), "--listen", stage.address]
        assert "--restore" not in arguments
    assert status["warnings"][-1] == "coordinator 0 was ended by SIGKILL; started again (2 of 1000)"
    assert stage.starts("shard") == 1
    assert stage.starts("worker") == 2


def test_a_run_is_begun_once(stage: Stage) -> None:
    """A coordinator that died before it recorded the new run is told of it again, one that died after it is not."""
    stage.stillborn = ["before", "before", "after"]

    def script(stage: Stage) -> Script:
        stage.kill("coordinator")
        yield from stage.until(lambda: stage.starts("coordinator") == 5)

    stage.play(script, restore="/the/checkpoint")
    told = ["--restore" in arguments for role, _, arguments in stage.started if role == "coordinator"]
    assert told == [True, True, True, False, False]


def test_a_coordinator_that_never_lives_ends_the_job(stage: Stage) -> None:
    stage.stillborn = ["after"] * 3
    with pytest.raises(Unavailable, match="coordinator 0: ended by SIGKILL"):
        stage.play(lambda stage: iter(()), restarts=2)
    assert stage.starts("coordinator") == 3


def test_what_the_coordinator_did_not_hear_it_is_told_when_it_is_back(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.away = True
        dead = stage.kill("worker", 0)
        asked = len(stage.statuses)
        yield from stage.until(lambda: len(stage.statuses) > asked + 3)
        assert not stage.left
        stage.away, stage.deaf_to_leaves = False, 2
        yield from stage.until(lambda: stage.left)
        assert stage.left == [(dead.process.pid, "")]
        assert stage.deaf_to_leaves == 0
        yield from stage.until(lambda: stage.starts("worker") == 3)

    stage.play(script)
    assert len(stage.left) == 1


def test_the_coordinators_absence_is_told_and_a_stop_repeated_until_it_is_heard(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("worker", 0)
        yield from stage.until(lambda: stage.starts("worker") == 3)
        stage.away = True
        yield from stage.until(lambda: "note" in stage.statuses[-1])
        assert stage.statuses[-1]["note"] == "the coordinator does not answer"
        assert stage.statuses[-1]["phase"] == "training"
        stage.away = False
        yield from stage.until(lambda: "note" not in stage.statuses[-1])
        stage.warnings = ["a first life's warning"]
        yield
        yield
        stage.away = True
        stage.kill("coordinator")
        yield from stage.until(lambda: "note" in stage.statuses[-1])
        assert stage.statuses[-1]["note"] == "the coordinator is being started again"
        asyncio.get_running_loop().call_later(0.05, back)

    def back() -> None:
        stage.away, stage.term, stage.warnings = False, 2, ["a second life's warning"]

    status = stage.play(script)
    assert stage.stops == 1
    assert status["phase"] == "stopped"
    assert status["warnings"] == [
        "worker 0 was ended by SIGKILL; started again (1 of 1000)",
        "a first life's warning",
        "coordinator 0 was ended by SIGKILL; started again (2 of 1000)",
        "a second life's warning",
    ]


def test_the_limit_holds_for_all_processes_together(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        for number in (0, 1, 0):
            before = stage.starts("worker")
            stage.kill("worker", number)
            yield from stage.until(
                lambda before=before: stage.starts("worker") > before or stage.child("worker").noticed
            )

    status = stage.play(script, restarts=2)
    assert stage.starts("worker") == 4
    assert status["phase"] == "stopped"
    assert status["restarts"] == 2
    assert status["warnings"][-1] == (
        "worker 0 was ended by SIGKILL; not started again: all 2 restarts were used; what it was to train goes to others"
    )


@pytest.mark.parametrize("role", ["coordinator", "worker"])
def test_without_restarts_a_job_ends_as_its_processes_do(stage: Stage, role: str) -> None:
    def script(stage: Stage) -> Script:
        for number in range(2 if role == "worker" else 1):
            stage.kill(role, number)
        yield from stage.until(lambda: False)

    status = stage.play(script, restarts=0)
    assert status["phase"] == "failed"
    assert f"{role} {1 if role == 'worker' else 0}: ended by SIGKILL" in status["reason"]
    assert (stage.starts("coordinator"), stage.starts("worker")) == (1, 2)


def test_a_coordinator_killed_after_the_end_leaves_what_it_recorded(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("coordinator")
        with Store(stage.folder / STATE_FILE).open() as store:
            store.set_fact("phase", "done")
        store.close()
        yield from stage.until(lambda: False)

    assert stage.play(script, restarts=0)["phase"] == "done"


def test_a_process_that_ends_by_its_own_error_is_not_started_again(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.end("worker", 1, 1, "error: the data are no good")
        yield from stage.until(lambda: False)

    status = stage.play(script)
    assert status["phase"] == "failed"
    assert status["reason"] == "worker 1: the data are no good"
    assert stage.starts("worker") == 2
    assert stage.left == [(stage.seen[-1].process.pid, "the data are no good")]


def test_a_worker_that_told_its_error_itself_is_done_without_and_the_last_one_ends_the_job(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        for number in (1, 0):
            pid = stage.child("worker", number).process.pid
            stage.gone.add(pid)
            stage.struck.add(pid)
            stage.end("worker", number, 1, f"error: the data of {number} are no good")
            seen = len(stage.statuses)
            yield from stage.until(lambda seen=seen: len(stage.statuses) > seen + 5)
            assert stage.starts("worker") == 2

    status = stage.play(script)
    assert status["phase"] == "failed"
    assert status["reason"] == "no worker is left; worker 1: the data of 1 are no good"
    assert not stage.left


def test_the_coordinators_own_error_ends_the_job_with_its_words(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.end("coordinator", 0, 1, "error: the disk is full")
        yield from stage.until(lambda: False)

    status = stage.play(script)
    assert (status["phase"], status["reason"]) == ("failed", "coordinator 0: the disk is full")
    assert stage.starts("coordinator") == 1


def test_a_worker_that_was_away_for_too_long_is_replaced(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.gone.add(stage.child("worker", 0).process.pid)
        stage.end("worker", 0, START_AGAIN, "error: join anew")
        yield from stage.until(lambda: stage.starts("worker") == 3)

    status = stage.play(script)
    assert status["warnings"] == ["worker 0 ended (join anew); started again (1 of 1000)"]
    assert not stage.left


def test_nobody_is_started_again_while_the_job_stops(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.phase = "stopping"
        stage.kill("worker", 0)
        stage.kill("worker", 1)
        yield from stage.until(lambda: len(stage.left) == 2)

    status = stage.play(script)
    assert stage.starts("worker") == 2
    assert status["phase"] == "stopped"


def test_workers_that_were_asked_to_leave_do_not_end_the_job_while_others_are_there(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        other = {"role": "worker", "id": 0, "pid": 1, "host": "elsewhere", "incarnation": 7, "stats": {}}
        # Another machine's process may have the same number.
        stage.outsiders = [other, {**other, "pid": stage.child("worker", 0).process.pid}]
        for number in (0, 1):
            stage.gone.add(stage.end("worker", number, 0).process.pid)
        turns = len(stage.statuses)
        yield from stage.until(lambda: len(stage.statuses) > turns + 3)
        stage.outsiders = []
        yield from stage.until(lambda: False)

    status = stage.play(script)
    assert status["phase"] == "failed"
    assert "no worker is left" in status["reason"]
    assert status["warnings"] == [f"worker {n} left as it was asked to; the others go on" for n in (0, 1)]
    assert not stage.left


def test_a_killed_shard_is_started_again_and_the_job_goes_back(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("shard", 0)
        yield from stage.until(lambda: stage.starts("shard") == 2)
        stage.phase = "gathering"
        yield
        yield

    status = stage.play(script)
    assert (status["phase"], status["restarts"]) == ("stopped", 1)
    assert [error for _, error in stage.left] == ["ended by SIGKILL, perhaps for lack of memory"]
    assert stage.starts("worker") == 2, "workers stay"


def test_a_killed_shard_ends_a_job_without_restarts(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("shard", 0)
        yield from stage.until(lambda: False)

    status = stage.play(script, restarts=0)
    assert status["reason"] == (
        "shard 0: ended by SIGKILL, perhaps for lack of memory; the job cannot go on without it"
    )
    assert stage.starts("shard") == 1
    assert [error for _, error in stage.left] == ["ended by SIGKILL, perhaps for lack of memory"]


def test_signals_have_names(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        for number, sent in enumerate((signal.SIGSEGV, signal.SIGRTMIN + 3)):
            stage.child("worker", number).process.send_signal(sent)
        yield from stage.until(lambda: stage.starts("worker") == 4)

    warnings = sorted(stage.play(script)["warnings"])
    assert [w.partition(";")[0] for w in warnings] == [
        "worker 0 was ended by SIGSEGV",
        f"worker 1 was ended by signal {signal.SIGRTMIN + 3}",
    ]


@pytest.mark.parametrize("settings", [{"servers": 2, "replicas": 1}])
def test_a_job_that_goes_back_without_enough_shards_fails(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("shard", 1)
        # The others go on without it, until all copies of a block are lost.
        yield from stage.until(lambda: stage.child("shard", 1).noticed)
        yield
        stage.phase = "gathering"
        yield from stage.until(lambda: False)

    status = stage.play(script, restarts=0)
    assert status["phase"] == "failed"
    assert status["reason"] == "1 of 2 shards are left, and no more are started"


@pytest.mark.parametrize("settings", [{"servers": 2}])
def test_a_shard_that_hangs_is_killed_and_replaced(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        hangs = stage.child("shard", 1)
        stage.gone.add(hangs.process.pid)
        stage.struck.add(hangs.process.pid)
        yield from stage.until(lambda: stage.starts("shard") == 3)
        assert hangs.killed

    assert stage.play(script)["restarts"] == 1


@pytest.mark.parametrize("settings", [{"servers": 2}])
def test_a_shard_that_hangs_ends_a_job_without_restarts(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        hangs = stage.child("shard", 1)
        stage.gone.add(hangs.process.pid)
        stage.struck.add(hangs.process.pid)
        yield from stage.until(lambda: False)

    status = stage.play(script, restarts=0)
    assert status["reason"] == "shard 1 was away for longer than its lease; the job cannot go on without it"
