# SPDX-License-Identifier: Apache-2.0
"""The launcher keeps as many shards and workers as are wanted, with cheap processes in the place of real ones."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

Stage = Any
Script = Iterator[Any]

COPIES = pytest.mark.parametrize("settings", [{"servers": 2, "replicas": 1}], ids=["copies"])


def living(stage: Stage, role: str) -> list[int]:
    return sorted(c.number for c in stage.launched.children if c.role == role and not c.ended)


def turns(stage: Stage, number: int) -> Script:
    """Let the launcher look at the job some more times."""
    seen = len(stage.statuses)
    yield from stage.until(lambda: len(stage.statuses) > seen + number)


@pytest.mark.parametrize("role", ["shard", "worker"])
@pytest.mark.parametrize("settings", [{"servers": 2}])
def test_more_are_started_and_who_leaves_is_not_missed(stage: Stage, role: str) -> None:
    name = {"shard": "servers", "worker": "workers"}[role]

    def script(stage: Stage) -> Script:
        stage.scale[name] = 4
        yield from stage.until(lambda: living(stage, role) == [0, 1, 2, 3])
        first = {n: stage.child(role, n) for n in (1, 2)}
        stage.scale[name] = 2
        stage.leaving = {c.process.pid for c in first.values()}
        yield from turns(stage, 3)
        for number, child in first.items():
            stage.gone.add(stage.end(role, number, 0).process.pid)
            assert child.ended
        yield from turns(stage, 3)
        assert living(stage, role) == [0, 3]
        stage.scale[name] = 3
        # The lowest number that is free.
        yield from stage.until(lambda: living(stage, role) == [0, 1, 3])
        yield from turns(stage, 3)
        assert stage.starts(role) == 5

    status = stage.play(script, metrics_port=5000)
    assert status["phase"] == "stopped"
    assert status["warnings"] == []
    assert status["restarts"] == 0
    assert not stage.left
    ports = [(number, a[a.index("--metrics-port") + 1 :]) for r, number, a in stage.started if r == role]
    begins = {"shard": 5001, "worker": 5003}[role]
    # Those that came later have the ports after all others, whoever else is there; a number keeps its own.
    assert ports == [
        (0, [str(begins)]),
        (1, [str(begins + 1)]),
        (2, ["5005", "--metrics-if-free"]),
        (3, ["5006", "--metrics-if-free"]),
        (1, [str(begins + 1), "--metrics-if-free"]),
    ]


def test_one_that_leaves_is_told_to_and_more_are_wanted_at_once(stage: Stage) -> None:
    """It goes although it is not told to any more: it is replaced, though it left in good order."""

    def script(stage: Stage) -> Script:
        stage.scale["workers"], stage.leaving = 1, {stage.child("worker", 1).process.pid}
        yield from turns(stage, 2)
        stage.scale["workers"], stage.leaving = 2, set()
        yield from turns(stage, 2)
        assert stage.starts("worker") == 2
        stage.gone.add(stage.end("worker", 1, 0).process.pid)
        yield from stage.until(lambda: stage.starts("worker") == 3)

    assert stage.play(script)["warnings"] == []


def test_who_went_by_itself_is_missed_once_another_number_is_wanted(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.gone.add(stage.end("worker", 1, 0).process.pid)
        yield from turns(stage, 3)
        assert living(stage, "worker") == [0]
        stage.scale["workers"] = 3
        yield from stage.until(lambda: living(stage, "worker") == [0, 1, 2])

    assert stage.play(script)["warnings"] == ["worker 1 left as it was asked to; the others go on"]


def test_a_worker_that_is_killed_while_it_leaves_is_not_started_again(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.scale["workers"], stage.leaving = 1, {stage.child("worker", 0).process.pid}
        stage.kill("worker", 0)
        yield from stage.until(lambda: stage.left)
        yield from turns(stage, 3)
        assert (living(stage, "worker"), stage.starts("worker")) == ([1], 2)

    assert stage.play(script)["restarts"] == 0


def test_members_that_others_started_count(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        other = {"role": "worker", "id": 0, "pid": 1, "host": "elsewhere", "incarnation": 7, "stats": {}}
        stage.outsiders = [other]
        stage.scale["workers"] = 4
        yield from stage.until(lambda: living(stage, "worker") == [0, 1, 2])
        yield from turns(stage, 3)
        assert stage.starts("worker") == 3

    stage.play(script)


@COPIES
def test_a_killed_shard_of_a_job_with_copies_is_started_again(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        dead = stage.kill("shard", 1)
        yield from stage.until(lambda: stage.starts("shard") == 3 and stage.left)
        assert stage.left == [(dead.process.pid, "ended by SIGKILL, perhaps for lack of memory")]
        assert living(stage, "shard") == [0, 1]

    status = stage.play(script)
    assert status["phase"] == "stopped"
    assert status["warnings"] == ["shard 1 was ended by SIGKILL; started again (1 of 1000)"]


@pytest.mark.parametrize("settings", [{"on_loss": "reload"}])
def test_the_only_shard_is_started_again_where_its_blocks_are_loaded_anew(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("shard", 0)
        yield from stage.until(lambda: stage.starts("shard") == 2)

    assert stage.play(script)["phase"] == "stopped"


@COPIES
def test_a_shard_that_may_not_be_started_again_is_done_without_while_others_are_there(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("shard", 0)
        yield from stage.until(lambda: stage.left)
        yield from turns(stage, 3)
        assert stage.starts("shard") == 2
        stage.kill("shard", 1)
        yield from stage.until(lambda: False)

    status = stage.play(script, restarts=0)
    assert status["phase"] == "failed"
    assert status["reason"] == "no shard is left; shard 1: ended by SIGKILL, perhaps for lack of memory"
    assert status["warnings"][0] == (
        "shard 0 was ended by SIGKILL; it is not started again; what others have copies of they take over"
    )


@COPIES
@pytest.mark.parametrize("joined", [True, False])
def test_a_shard_that_ends_by_its_own_error(stage: Stage, joined: bool) -> None:
    """One that was a member is started again; one that never came to that would not do better the next time."""

    def script(stage: Stage) -> Script:
        if not joined:
            stage.gone.add(stage.child("shard", 1).process.pid)
        stage.end("shard", 1, 1, "error: no good")
        yield from stage.until(lambda: joined and stage.starts("shard") == 3)

    status = stage.play(script)
    assert status["phase"] == ("stopped" if joined else "failed")
    if not joined:
        assert status["reason"].startswith("shard 1: no good")


@COPIES
def test_a_shard_that_hangs_and_was_given_up_is_ended_and_replaced(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        hangs = stage.child("shard", 0).process
        hangs.send_signal(signal.SIGSTOP)
        stage.gone.add(hangs.pid)
        stage.struck.add(hangs.pid)
        yield from stage.until(lambda: stage.starts("shard") == 3)
        assert hangs.returncode == -signal.SIGKILL

    assert stage.play(script)["warnings"] == [
        "shard 0 was away for longer than its lease, and is ended",
        "shard 0 was ended by SIGKILL; started again (1 of 1000)",
    ]


@COPIES
def test_no_shard_is_started_while_the_job_stops(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.phase = "stopping"
        stage.kill("shard", 0)
        yield from stage.until(lambda: stage.left)
        yield from turns(stage, 3)
        stage.kill("shard", 1)
        yield from stage.until(lambda: False)

    status = stage.play(script)
    assert stage.starts("shard") == 2
    assert (status["phase"], status["restarts"]) == ("failed", 0)
    assert "no shard is left" in status["reason"]
