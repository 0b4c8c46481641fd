# SPDX-License-Identifier: Apache-2.0
"""Chaos: events are drawn of a seed alone, nobody is struck whose death would lose something, and times are read off notes."""

import asyncio
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from oarlock.client.job import RELOAD, ROLLBACK
from oarlock.client.push_notes import PushNotes, blocks_done, line_of, read_notes
from oarlock.launch.chaos import Chaos, under_way
from oarlock.launch.chaos_events import CUT, KINDS, USUAL, Event, Plan, chosen, scaled, schedule, spared, survivable
from oarlock.launch.chaos_ledger import Entry, Ledger, summary
from oarlock.launch.chaos_times import Recovered, groups_acknowledged, shard_recovered, worker_recovered
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.proto.shard_pb2 import PushRequest

BLOCKS = 11


def test_the_events_are_a_pure_function_of_the_plan(seed: int) -> None:
    plan = Plan(50, 2.0, seed)
    assert schedule(plan) == schedule(plan)
    assert schedule(plan) != schedule(replace(plan, seed=seed + 1))
    # A longer plan begins as a shorter one does.
    assert schedule(plan)[:20] == schedule(replace(plan, events=20))
    found = schedule(plan)
    assert all(1.0 <= event.after < 3.0 and 0 <= event.draw < 1 for event in found)
    assert 1.6 < sum(event.after for event in found) / 50 < 2.4


def test_each_deal_of_kinds_has_all_of_them(seed: int) -> None:
    found = [event.kind for event in schedule(Plan(50, 1.0, seed))]
    for begin in range(0, 50, 10):
        assert Counter(found[begin : begin + 10]) == USUAL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"events": 0}, "events = 0"),
        ({"events": 10**9}, "events = 1000000000"),
        ({"gap_seconds": 0.0}, "gap_seconds = 0.0"),
        ({"gap_seconds": float("nan")}, "gap_seconds = nan"),
        ({"stopped": float("inf")}, "stopped = inf"),
        ({"mix": {}}, "mix = {}"),
        ({"mix": {CUT: 0}}, "mix = "),
        ({"mix": {CUT: -1, "kill shard": 2}}, "mix = "),
        ({"mix": {"kill everybody": 1}}, "of kill shard"),
        ({"shards": (0, 2)}, "shards = 0, 2"),
        ({"workers": (3, 2)}, "workers = 3, 2"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Plan(**{"events": 10, "gap_seconds": 1.0, **changes})


def test_draws_choose_among_all_that_there_are() -> None:
    assert [chosen(draw, ["a", "b", "c"]) for draw in (0.0, 0.34, 0.999)] == ["a", "b", "c"]
    assert {scaled(draw / 10, 3, 2, 4) for draw in range(10)} == {2, 4}
    assert scaled(0.7, 2, 2, 2) == 2
    # Somebody else asked for more than the plan would.
    assert scaled(0.0, 9, 2, 4) == 2


def test_a_job_without_copies_keeps_its_shards() -> None:
    def kinds(replicas: int, on_loss: str) -> set[str]:
        spec: Any = SimpleNamespace(replicas=replicas, on_loss=on_loss)
        return set(survivable(USUAL, spec))

    assert kinds(1, ROLLBACK) == kinds(0, RELOAD) == set(USUAL)
    assert kinds(0, ROLLBACK) == set(USUAL) - {"kill shard", "stop shard"}


def status(shards: int = 2, workers: int = 2, **changes: Any) -> dict[str, Any]:
    roles = ["shard"] * shards + ["worker"] * workers
    members = [
        {"role": role, "id": n, "pid": 100 + n, "incarnation": 1000 + n, "stats": {"samples": 5}}
        for n, role in enumerate(roles)
    ]
    return {
        "phase": "training",
        "term": 1,
        "members": members,
        "ownerless": 0,
        "incomplete": 0,
        "moving": {"at_rest": True},
        "blocks": dict.fromkeys(map(str, range(shards)), 3),
        "scale": {"servers": shards, "workers": workers, "leaving": {"shard": [], "worker": []}},
        "checkpoints": [],
        "cut": {},
        **changes,
    }


ALL = range(100, 110)


def test_a_shard_is_struck_only_while_its_blocks_are_whole_elsewhere() -> None:
    assert spared("shard", status(), ALL, 1) == ""
    for changes in (
        {"ownerless": 1},
        {"incomplete": 1},
        {"moving": {"at_rest": False}},
        {"phase": "evaluating"},
        {"note": "the coordinator does not answer"},
    ):
        assert spared("shard", status(**changes), ALL, 1), changes
    assert "dead or stopped" in spared("shard", status(), range(101, 110), 1), "the coordinator has not heard yet"
    assert "needed first" in spared("shard", status(1), ALL, 1)
    assert "needed first" in spared("shard", status(2), ALL, 2), "with two copies there are three members"
    assert spared("shard", status(), [100, 101], 1) == "no worker trains"
    idle = status()
    for member in idle["members"]:
        member["stats"] = {}
    assert spared("shard", idle, ALL, 1) == "no worker trains"
    assert spared("shard", {}, ALL, 1), "nobody has said anything yet"


def test_the_last_worker_is_left_alone_and_copies_do_not_matter_to_it() -> None:
    assert spared("worker", status(incomplete=3), ALL, 1) == ""
    assert "needed first" in spared("worker", status(2, 1), ALL, 1)
    assert spared("worker", status(2, 1), ALL, 0) == ""
    assert "dead or stopped" in spared("worker", status(), [100, 101, 102], 1)
    assert spared("coordinator", {}, [], 0) == ""


class Process:
    """A child that hears signals."""

    def __init__(self, role: str, number: int, pid: int) -> None:
        self.role, self.number, self.ended = role, number, False
        self.process, self.pid, self.heard = self, pid, list[Any]()

    def kill(self) -> None:
        self.heard.append(signal.SIGKILL)
        self.ended = True

    def send_signal(self, number: signal.Signals) -> None:
        self.heard.append(number)


class Stage:
    """A launcher of two shards, two workers and a coordinator that answers what it is asked."""

    def __init__(self, plan: Plan, events: list[Event]) -> None:
        roles = ["coordinator", "shard", "shard", "worker", "worker"]
        self.children = [Process(role, n, 99 + n) for n, role in enumerate(roles)]
        self.asked: list[tuple[str, Any]] = []
        self.answers: list[Any] = []
        spec: Any = SimpleNamespace(replicas=1, lease_seconds=0.001)
        launched: Any = self
        self.chaos = Chaos(launched, spec, plan, events=events)

    async def call(self, method: str, request: Any) -> Any:
        self.asked.append((method, request))
        answer = self.answers.pop(0) if self.answers else SimpleNamespace(last=4)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def play(self, statuses: list[dict[str, Any]]) -> list[Entry]:
        """Tell these statuses, the last one again and again, until all events are done."""

        async def body() -> None:
            running = asyncio.ensure_future(self.chaos.run())
            left = list(statuses)
            while not running.done():
                self.chaos.watch(left.pop(0) if len(left) > 1 else left[0])
                for _ in range(20):
                    await asyncio.sleep(0)
            await running

        asyncio.run(asyncio.wait_for(body(), 30))
        return self.chaos.ledger.entries


def stage(*kinds: str, draw: float = 0.0) -> Stage:
    return Stage(Plan(1, 1.0), [Event(kind, 0.0, draw) for kind in kinds])


def test_a_shard_is_killed_as_soon_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    on = stage("kill shard", draw=0.6)
    (entry,) = on.play(
        [status(), status(incomplete=2), status(ownerless=1), status(moving={"at_rest": False}), status()]
    )
    assert [c.heard for c in on.children] == [[], [], [signal.SIGKILL], [], []]
    assert (entry.kind, entry.target, entry.member, entry.incarnation, entry.done) == ("kill shard", 2, 1, 1001, True)


def test_a_second_shard_is_not_killed_while_the_coordinator_still_counts_on_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = stage("kill shard", "kill shard")
    monkeypatch.setattr("oarlock.launch.chaos.PATIENCE_SECONDS", 0.05)
    first, second = on.play([status()])
    assert first.done
    assert not second.done
    assert second.passed == "a shard that the coordinator counts on is dead or stopped"
    assert sum(c.heard == [signal.SIGKILL] for c in on.children) == 1


def test_whoever_is_stopped_goes_on_also_if_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    on = stage("stop worker")
    on.play([status()])
    assert on.children[3].heard == [signal.SIGSTOP, signal.SIGCONT]

    on = stage("stop shard", CUT)
    on.chaos._plan = replace(on.chaos._plan, stopped=100.0)
    on.chaos._spec = SimpleNamespace(replicas=1, lease_seconds=1000.0)  # type: ignore[assignment]
    on.play([status(), status(), status(), status(phase="done")])
    assert on.children[1].heard == [signal.SIGSTOP, signal.SIGCONT]


def test_numbers_and_cuts_are_asked_for_again_while_the_coordinator_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    on = stage("scale shard", CUT)
    on.answers = [Unavailable("starting"), Unavailable("starting")]
    scaling, cut = on.play([status()])
    assert [(m, getattr(r, "servers", None)) for m, r in on.asked] == [
        *[("Coordinator.Scale", 3)] * 3,
        ("Coordinator.Checkpoint", None),
    ]
    assert scaling.to_json()["event"] == "scale shard 2 to 3"
    on.chaos.watch(status(3, scale={**status()["scale"], "servers": 3}, checkpoints=[{"cut": 4}]))
    assert scaling.followed.startswith("so after")
    assert cut.followed == "", "that is an older one"
    on.chaos.watch(status(cut={"failed": {"cut": 5, "error": "no room"}}))
    assert cut.followed == "cut 5 was given up: no room"


def test_a_job_that_ends_first_has_fewer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    on = stage(CUT, CUT, CUT)
    assert len(on.play([status(), status(), status(phase="done")])) == 1


def test_events_begin_once_everybody_trains() -> None:
    assert under_way(status())
    assert not under_way(status(incomplete=1))
    idle = status()
    idle["members"][3]["stats"] = {}
    assert not under_way(idle)
    assert not under_way(status(2, 0, scale={**status()["scale"], "workers": 0}))


def lines(*told: tuple[float, float, int, int, int, list[int]]) -> Any:
    """Return notes of (sent, told, worker, shard, split, blocks)."""
    made = np.zeros(len(told), [("worker", "<u8"), *line_of(BLOCKS).descr])
    for line, (sent, at, worker, shard, split, blocks) in zip(made, told, strict=True):
        line["sent"], line["told"], line["worker"], line["shard"], line["split"] = sent, at, worker, shard, split
        done = np.zeros(BLOCKS, np.bool_)
        done[blocks] = True
        line["done"] = np.packbits(done)
    return made


def test_a_shard_has_recovered_when_every_block_of_it_was_pushed_to_again() -> None:
    found = lines(
        (1.0, 1.1, 7, 50, 0, [0, 1, 2, 10]),
        (1.0, 1.2, 7, 60, 0, [3, 4, 10]),
        # Block 2 moved away before; 10 came from the other.
        (1.3, 1.4, 7, 60, 0, [2]),
        (1.5, 1.6, 7, 50, 0, [10]),
        # Killed at 2: an answer that was on its way counts for nothing, nor one for a block that is not affected.
        (1.9, 2.1, 7, 50, 1, [0, 1, 10]),
        (2.0, 2.5, 7, 60, 1, [0, 3]),
        (2.0, 3.0, 7, 60, 1, [0, 1]),
        (2.0, 4.5, 8, 70, 1, [10]),
    )
    assert shard_recovered(found, BLOCKS, 50, 2.0, killed=True) == Recovered(2.5, 3, 0)
    assert shard_recovered(found[:-1], BLOCKS, 50, 2.0, killed=True) == Recovered(1.0, 3, 1)
    assert shard_recovered(found[:5], BLOCKS, 50, 2.0, killed=True) == Recovered(None, 3, 3)
    assert shard_recovered(found, BLOCKS, 99, 2.0, killed=True) == Recovered(None, 0, 0)
    assert shard_recovered(found[:0], BLOCKS, 50, 2.0, killed=True) == Recovered(None, 0, 0)
    # Stopped and let go on, it may answer itself, but what was sent before proves nothing.
    back = lines((1.0, 1.1, 7, 50, 0, [0, 1]), (1.9, 2.1, 7, 50, 1, [0, 1]), (2.2, 3.5, 7, 50, 1, [0, 1]))
    assert shard_recovered(back, BLOCKS, 50, 2.0, killed=False) == Recovered(1.5, 2, 0)


def test_times_hold_over_more_lines_than_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oarlock.launch.chaos_times.CHUNK", 2)
    rest = [(2.0, 3.0 + n, 7, 60, 0, [n]) for n in range(7)]
    found = lines((1.0, 1.1, 7, 50, 0, [0, 1, 6]), *rest)
    assert shard_recovered(found, BLOCKS, 50, 2.0, killed=True) == Recovered(7.0, 3, 0)


def test_a_worker_has_recovered_when_others_train_what_it_had_begun() -> None:
    found = lines(
        (1.0, 1.1, 7, 50, 0, [0]),
        (1.0, 1.2, 7, 50, 1, [0]),
        (1.0, 1.3, 7, 50, 2, [0]),
        (1.0, 1.5, 8, 50, 3, [0]),
        (2.0, 2.5, 8, 50, 1, [0]),
        (2.0, 2.9, 8, 50, 1, [0]),
        (2.0, 3.0, 9, 50, 2, [0]),
        (2.0, 3.5, 9, 50, 4, [0]),
    )
    assert worker_recovered(found, 7, 2.0, ranked=False) == Recovered(1.0, 2)
    assert worker_recovered(found, 9, 9.0, ranked=False) == Recovered(None, 0)
    assert groups_acknowledged(found) == 5


def test_notes_are_read_as_they_were_written(tmp_path: Path) -> None:
    for worker in (5, 1 << 62):
        notes = PushNotes(tmp_path, BLOCKS, worker).open()
        notes.note(1.0, PushRequest(split=3, group=4, rank=2), (1 << 63) + 1, np.array([0, 7, 10], np.int32), [7])
        notes.close()
    torn = tmp_path / f"{5:016x}.pushes"
    torn.write_bytes(torn.read_bytes() + b"half a line")
    found = read_notes(tmp_path, BLOCKS)
    assert found["worker"].tolist() == [5, 1 << 62]
    assert found["shard"].tolist() == [(1 << 63) + 1] * 2
    assert [found[n].tolist() for n in ("sent", "split", "group", "rank")] == [[1.0] * 2, [3] * 2, [4] * 2, [2] * 2]
    assert np.flatnonzero(blocks_done(found, BLOCKS)[0]).tolist() == [0, 10]
    assert np.diff(found["told"]).min() >= 0
    assert len(read_notes(tmp_path / "nothing", BLOCKS)) == 0
    with pytest.raises(InvalidArgument, match="--push-notes"):
        PushNotes(tmp_path / "nothing", BLOCKS, 1).open()


def test_a_summary_tells_what_could_not_be_measured() -> None:
    entries = [
        Entry("kill shard", 0.0, recovered=Recovered(1.0, 4)),
        Entry("kill shard", 0.0, recovered=Recovered(2.0, 4)),
        Entry("kill shard", 0.0, recovered=Recovered(0.5, 4, silent=1)),
        Entry("stop shard", 0.0, recovered=Recovered(None, 4, silent=4)),
        Entry("kill worker", 0.0, recovered=Recovered(None, 0)),
        Entry("kill shard", 0.0, passed="blocks move"),
        Entry("scale shard", 0.0, numbers="2 to 3"),
    ]
    found = summary([Ledger(entries[:4]), Ledger(entries[4:])])
    assert found["kinds"] == {"kill shard": 3, "kill worker": 1, "scale shard": 1, "stop shard": 1}
    assert (found["events"], found["passed_over"], found["unmeasured"]) == (6, 1, 2)
    assert (found["recover_s_p50"], found["recover_s_max"], found["paused_recover_s_max"]) == (1.5, 2.0, None)
    assert summary([])["recover_s_max"] is None
    assert set(found["kinds"]) <= set(KINDS)
