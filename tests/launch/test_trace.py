# SPDX-License-Identifier: Apache-2.0
"""The parts of a job's trace: one for every process that was started, put together whole, or kept."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trace_check

from oarlock.client.entry import parser
from oarlock.client.telemetry import observed
from oarlock.client.trace import recorded, trace_requests, trace_target
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.trace import TraceParts, merge, traced_job
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc.counts import Counts
from oarlock.telemetry import trace_format
from oarlock.telemetry.trace import Tracer, now


def part(path: Path, name: str, row: str = "pull", events: int = 10, *, ended: bool = True) -> Path:
    tracer = Tracer(path, name, flush_seconds=3600.0).start()
    for i in range(events):
        tracer.main.complete(row, 1000 * i, 1000 * i + 1500, {"i": i})
    if ended:
        tracer.close()
        return path
    tracer.flush()
    text = path.read_bytes()
    tracer.close()
    path.write_bytes(text)
    return path


def test_parts_of_equal_numbers_are_told_apart(tmp_path: Path) -> None:
    parts = [part(tmp_path / f"{i}", f"worker {i}") for i in range(3)]
    assert merge(parts, tmp_path / "out.json") == []
    found = trace_check.timeline(tmp_path / "out.json")
    assert found.processes.keys() == {"worker 0", "worker 1", "worker 2"}
    for process, rows in found.processes.items():
        assert sorted(s.args["i"] for s in rows["pull"]) == list(range(10))
        assert found.lanes[process, "pull"] == 2
    # One that was merged is a part as well.
    assert merge([tmp_path / "out.json"], tmp_path / "again.json") == []
    assert trace_check.timeline(tmp_path / "again.json") == found


def test_a_part_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    whole, killed, torn = (tmp_path / n for n in ("whole", "killed", "torn"))
    part(whole, "worker 0")
    part(killed, "worker 1", ended=False)
    torn.write_bytes(part(tmp_path / "t", "worker 2", ended=False).read_bytes()[:-20])
    garbage, empty, missing = tmp_path / "garbage", tmp_path / "empty", tmp_path / "missing"
    garbage.write_bytes(b"\x00\xff{}\n" * 1000)
    empty.write_bytes(b"")
    said = merge([garbage, whole, missing, killed, torn, empty], tmp_path / "out.json")
    found = trace_check.timeline(tmp_path / "out.json")
    assert {name: len(rows["pull"]) for name, rows in found.processes.items()} == {
        "worker 0": 10,
        "worker 1": 10,
        "worker 2": 9,
    }
    assert [next(name for name in ("garbage", "missing", "torn", "empty") if name in text) for text in said] == [
        "garbage",
        "missing",
        "torn",
        "empty",
    ]
    assert "lacks 1 line of torn" in said[2]


def test_a_job_that_is_not_traced_has_no_parts(tmp_path: Path) -> None:
    said: list[str] = []
    with traced_job(None, tmp_path, said.append) as parts:
        assert parts is None
    assert (said, os.listdir(tmp_path)) == ([], [])


def test_a_job_without_parts_has_an_empty_trace(tmp_path: Path) -> None:
    assert merge([], tmp_path / "out.json") == []
    assert trace_check.timeline(tmp_path / "out.json").processes == {}


def test_what_was_dropped_is_said(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path / "p", "worker 0", capacity=4, flush_seconds=3600.0).start()
    with tracer._writing:
        for i in range(10):
            tracer.main.complete("pull", i, i)
    tracer.close()
    (said,) = merge([tmp_path / "p"], tmp_path / "out.json")
    assert "lacks 6 events" in said
    assert trace_check.timeline(tmp_path / "out.json").told_dropped == 6


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_trace_takes_its_place_at_the_end_whatever_the_end(tmp_path: Path, ends_well: bool) -> None:
    target = part(tmp_path / "out.json", "earlier")
    said: list[str] = []
    try:
        with traced_job(target, tmp_path, said.append) as parts:
            assert parts is not None
            part(parts.next("worker", 0), "worker 0")
            assert trace_check.timeline(target).processes.keys() == {"earlier"}
            if not ends_well:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert not ends_well
    assert trace_check.timeline(target).processes.keys() == {"worker 0"}
    assert said == [f"trace in {target}"]
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_trace_that_cannot_be_written_keeps_the_earlier_one_and_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = part(tmp_path / "out.json", "earlier")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with traced_job(target, tmp_path, said.append) as parts:
        assert parts is not None
        kept = part(parts.next("worker", 0), "worker 0")
        monkeypatch.setattr(os, "replace", full)
    assert trace_check.timeline(target).processes.keys() == {"earlier"}
    assert trace_check.timeline(kept).processes.keys() == {"worker 0"}
    (words,) = said
    assert "No space left" in words
    assert str(kept.parent) in words
    assert sorted(os.listdir(tmp_path)) == ["out.json", "trace"]
    # They go when the job is traced again.
    monkeypatch.undo()
    with traced_job(target, tmp_path, said.append):
        assert not kept.exists()


def test_each_process_has_a_part_of_its_own_also_when_it_is_started_again(stage: Any, tmp_path: Path) -> None:
    def script(stage: Any) -> Iterator[Any]:
        stage.kill("worker", 1)
        yield from stage.until(lambda: stage.starts("worker") == 3)

    stage.play(script, trace=TraceParts(tmp_path))
    files = [arguments[arguments.index("--trace") + 1] for _, _, arguments in stage.started]
    assert [Path(f).name for f in files] == [
        "0001-coordinator-0.json",
        "0002-shard-0.json",
        "0003-worker-0.json",
        "0004-worker-1.json",
        "0005-worker-1.json",
    ]
    assert parser("oarlock.ps", "").parse_args(["--trace", files[1]]).trace == files[1]


def test_without_the_option_no_process_gets_a_part(stage: Any) -> None:
    stage.play(lambda stage: iter(()))
    assert not [a for _, _, arguments in stage.started for a in arguments if a.startswith("--trace")]


def test_a_job_in_one_process_shows_what_every_member_did(start: Any, tmp_path: Path) -> None:
    spec, folder = start(epochs=2)
    path = tmp_path / "t.json"
    begun = now()
    status = run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01, trace=path)
    ended = now()
    assert status["phase"] == "done"
    found = trace_check.timeline(path)
    assert found.processes.keys() == {"coordinator", "shard 0", "shard 1", "worker 0", "worker 1"}
    assert found.told_dropped == 0
    coordinator = found.processes["coordinator"]
    phases = coordinator["phase"]
    assert [s.name for s in phases] == ["gathering", *["training", "writing"] * 2, "done"]
    assert [s.args["epoch"] for s in phases if s.name == "training"] == [0, 1]
    for before, after in itertools.pairwise(phases):
        assert before.end == pytest.approx(after.begin, abs=0.01)
    assert len(coordinator["checkpoint"]) == 2
    assert len(coordinator["write"]) == 4
    assert len(coordinator["close_split"]) == 2 * (spec.splits + spec.evaluation_splits)
    batches = 0
    for worker in ("worker 0", "worker 1"):
        rows = found.processes.get(worker, {})
        for name in ("lease", "read", "encode", "dedup", "pull", "compute", "encode_push", "push", "close"):
            assert rows[name], name
        assert len(rows["compute"]) == len(rows["encode_push"]) == len(rows["push"]) == len(rows["wait_for_pull"])
        assert len(rows["encode"]) == len(rows["dedup"]) == len(rows["pull"])
        groups_of = {
            name: {(s.args["split"], s.args["group"]) for s in rows[name] if "group" in s.args}
            for name in ("encode", "dedup", "pull", "wait_for_pull", "compute", "encode_push", "push")
        }
        assert all(groups == groups_of["push"] for groups in groups_of.values())
        assert len(groups_of["push"]) == len(rows["push"])
        assert all(s.args["rows"] > 0 for s in rows["pull"])
        batches += len(rows["compute"])
    evaluated = [s for w in ("worker 0", "worker 1") for s in found.processes[w].get("evaluate", [])]
    assert len(evaluated) == 2 * spec.evaluation_splits
    for shard in ("shard 0", "shard 1"):
        rows = found.processes[shard]
        assert len(rows["push"]) == batches
        # One process, one clock: what a shard answers lies within what a worker waits for.
        asked = [s for w in ("worker 0", "worker 1") for s in found.processes[w]["pull"]]
        assert all(any(a.begin <= s.begin and s.end <= a.end for a in asked) for s in rows["pull"])
        assert len(rows["write"]) == 2
    everything = [s for rows in found.processes.values() for row in rows.values() for s in row]
    assert all(begun / 1000 <= s.begin <= s.end <= ended / 1000 for s in everything)


def test_requests_are_recorded_with_their_bytes_and_only_if_there_is_a_track(tmp_path: Path) -> None:
    handler = object()
    assert recorded(handler, None) is handler
    counts = Counts()
    trace_requests(counts, None)
    assert counts.all() == {}
    with observed("shard", None, trace=tmp_path / "t.json") as telemetry:
        trace_requests(counts, telemetry.track)
        counts.of("Shard.Pull").add(100, 200, 0.001)
        counts.of("Shard.Stats").add(1, 2, 0.001)
        counts.of("Shard.Push").add(300, 4, 0.001, InvalidArgument("no"))
    rows = trace_check.timeline(tmp_path / "t.json").processes["shard"]
    assert rows.keys() == {"pull", "push"}
    assert [s.args for s in (*rows["pull"], *rows["push"])] == [
        {"received": 100, "sent": 200},
        {"received": 300, "sent": 4},
    ]
    assert rows["pull"][0].end - rows["pull"][0].begin == pytest.approx(1000, abs=0.01)


def test_a_file_that_is_there_is_replaced_only_if_it_is_a_trace(tmp_path: Path) -> None:
    path = part(tmp_path / "t.json", "worker 0")
    assert trace_target(str(path)) == path
    assert trace_format.is_trace(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert trace_target(str(link)) == path
    (tmp_path / "empty").touch()
    assert trace_target(str(tmp_path / "empty")) == tmp_path / "empty"
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "t.json"]
