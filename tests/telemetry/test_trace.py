# SPDX-License-Identifier: Apache-2.0
"""A trace is what its format says, holds what was recorded in rows that do not overlap, and costs what is bounded, or nothing."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trace_check

from oarlock.telemetry import trace_format
from oarlock.telemetry.stages import Stages
from oarlock.telemetry.trace import Tracer, Track, now

WEIRD = ('a "quoted" \\ name', "tab\tline\nend\0", "ключ 鍵 \U0001f511", "lone \ud800", "</script>", "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.json"


def events(path: Path) -> list[dict[str, Any] | None]:
    return [None if found is None else found[0] for found in trace_format.events(path)]


def idle(path: Path, **options: Any) -> Tracer:
    """A tracer that writes only when it is told to."""
    return Tracer(path, "worker 0", **{"flush_seconds": 3600.0, **options}).start()


def test_what_was_recorded_is_shown_with_its_times_and_arguments(path: Path) -> None:
    tracer = idle(path)
    stages = Stages()
    stages.track = tracer.main
    begun = now()
    with stages.time("read", split=3):
        pass
    with pytest.raises(KeyError), stages.time("compute", split=3, batch=1):
        raise KeyError
    tracer.main.complete("phase", begun, begun + 1500, name="writing")
    tracer.main.beside("shard 1").complete("pull", begun, begun + 1_000_000_007)
    tracer.main.name = "worker 7"
    ended = now()
    tracer.close()
    tracer.close()
    found = trace_check.timeline(path)
    assert found.processes.keys() == {"worker 7", "shard 1"}
    (read,), (compute,) = found.processes["worker 7"]["read"], found.processes["worker 7"]["compute"]
    assert (read.name, read.args, compute.args) == ("read", {"split": 3}, {"split": 3, "batch": 1})
    assert begun / 1000 <= read.begin <= read.end <= compute.begin <= compute.end <= ended / 1000
    assert stages.entries == {"read": 1, "compute": 1}
    assert stages.seconds["read"] * 1e6 == pytest.approx(read.end - read.begin, abs=0.01)
    (phase,) = found.processes["worker 7"]["phase"]
    assert (phase.name, phase.args) == ("writing", {})
    assert phase.end - phase.begin == pytest.approx(1.5, abs=0.001)
    (pull,) = found.processes["shard 1"]["pull"]
    assert pull.end - pull.begin == pytest.approx(1_000_000.007, abs=0.001)
    assert (found.dropped, found.told_dropped) == (0, 0)


def test_any_name_and_argument_is_json(path: Path) -> None:
    tracer = idle(path)
    at = now()
    for i, text in enumerate(WEIRD):
        tracer.main.complete(f"row {text}", at, at, {text: text, "n": float("nan"), "o": object(), "i": i})
        tracer.main.beside(f"process {i} {text}").complete("x", at, at, name=text)
    # It ends before it begins: shown as an instant, which the viewer can take.
    tracer.main.complete("backwards", at, at - 5)
    tracer.close()
    found = trace_check.timeline(path)
    assert {f"process {i} {text}" for i, text in enumerate(WEIRD)} <= found.processes.keys()
    assert {f"row {text}" for text in WEIRD} <= found.processes["worker 0"].keys()
    assert [s.args["i"] for text in WEIRD for s in found.processes["worker 0"][f"row {text}"]] == [
        str(i) for i in range(len(WEIRD))
    ]


def depth(spans: list[tuple[int, int]]) -> int:
    """Return how many spans run at once, at most; one may begin where another ends."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    now_open = most = 0
    for _, change in changes:
        now_open += change
        most = max(most, now_open)
    return most


def test_what_overlaps_itself_gets_no_more_lanes_than_it_needs(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tracer = idle(path)
    wanted: dict[str, int] = {}
    for row in ("one", "few", "many"):
        spans = []
        at = 1_000_000
        for _ in range(500):
            at += rng.randrange(1, 1000)
            spans.append((at, at + rng.randrange(1, {"one": 2, "few": 3000, "many": 20_000}[row])))
        wanted[row] = depth(spans)
        rng.shuffle(spans)
        for begin, end in spans:
            tracer.main.complete(row, begin, end)
    tracer.close()
    found = trace_check.timeline(path)
    assert {row: found.lanes["worker 0", row] for row in wanted} == wanted
    assert wanted["one"] == 1 < wanted["few"] < wanted["many"]
    lanes = {
        e["args"]["name"] for e in json.loads(path.read_bytes())["traceEvents"][-1000:] if e["name"] == "thread_name"
    }
    assert f"many {wanted['many']}" in lanes


def test_threads_record_at_once_and_nothing_is_lost(path: Path) -> None:
    tracer = Tracer(path, "shard 0", flush_seconds=0.001).start()
    stages = Stages()
    stages.track = tracer.main
    ready = threading.Barrier(8)

    def record(number: int) -> None:
        ready.wait()
        for i in range(500):
            with stages.time("push", thread=number, i=i):
                pass

    threads = [threading.Thread(target=record, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.close()
    found = trace_check.timeline(path)
    pushes = found.processes["shard 0"]["push"]
    assert {(s.args["thread"], s.args["i"]) for s in pushes} == {(n, i) for n in range(8) for i in range(500)}
    assert len(pushes) == stages.entries["push"] == 4000
    assert found.lanes["shard 0", "push"] <= 8


def test_stages_of_threads_are_all_counted() -> None:
    stages = Stages()
    ready = threading.Barrier(4)

    def count() -> None:
        ready.wait()
        for _ in range(5000):
            stages.add("compute", 0, 1_000_000_000, {})

    threads = [threading.Thread(target=count) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert stages.entries == {"compute": 20_000}
    assert stages.rounded() == {"compute": 20_000.0}


def test_memory_is_bounded_and_what_is_dropped_is_counted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracer = idle(path, capacity=100)
    # The writer is held up, as by a slow disk.
    with tracer._writing:
        for i in range(5000):
            tracer.main.complete("pull", i, i)
            assert len(tracer.events) <= 100
        assert tracer.dropped == 4900
    with caplog.at_level(logging.WARNING, "oarlock"):
        tracer.close()
    assert "event=trace_incomplete" in caplog.text
    found = trace_check.timeline(path)
    assert (found.dropped, found.told_dropped) == (4900, 4900)
    assert len(found.processes["worker 0"]["pull"]) == 100
    tracer.main.complete("late", 0, 1)
    assert not tracer.events


def test_a_crowd_is_written_before_its_time(path: Path) -> None:
    tracer = idle(path, capacity=64)
    for i in range(40):
        tracer.main.complete("pull", i, i)
    while tracer.events:
        threading.Event().wait(0.001)
    tracer.flush()
    assert sum(event is not None and event["ph"] == "X" for event in events(path)) == 40
    tracer.close()


def test_a_file_takes_no_more_than_its_most(path: Path) -> None:
    tracer = idle(path, most=30)
    for i in range(20):
        tracer.main.complete("pull", i, i)
    tracer.flush()
    for i in range(20, 50):
        tracer.main.complete("pull", i, i)
    tracer.flush()
    size = path.stat().st_size
    for i in range(1000):
        tracer.main.complete("pull", i, i)
        tracer.flush()
    assert path.stat().st_size == size
    tracer.close()
    found = trace_check.timeline(path)
    assert [s.begin for s in found.processes["worker 0"]["pull"]] == [i / 1000 for i in range(30)]
    assert found.told_dropped == found.dropped == 1020


class FullDisk:
    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    flush = close = lambda self: self.write(b"")


def test_a_disk_that_fills_up_ends_the_trace_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracer = idle(path)
    assert tracer._file is not None
    tracer._file.close()
    tracer._file = FullDisk()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "oarlock"):
        tracer.main.complete("pull", 0, 1)
        tracer.flush()
        tracer.main.complete("pull", 2, 3)
        tracer.flush()
        tracer.close()
    assert caplog.text.count("event=trace_failed") == 1
    assert "No space left" in caplog.text
    assert tracer.dropped == 1
    assert not tracer.events


def test_a_file_that_cannot_be_begun_is_an_error_and_leaves_no_thread(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "t.json", Path("/dev/full")):
        with pytest.raises(OSError, match=r"directory|No space"):
            Tracer(place, "worker 0").start()


KILLED = """
import sys
from pathlib import Path
from oarlock.telemetry.trace import Tracer
tracer = Tracer(Path(sys.argv[1]), "worker 3", flush_seconds=3600.0).start()
for i in range(1000):
    tracer.main.complete("compute", 10 * i, 10 * i + 5, {"batch": i})
tracer.flush()
tracer.main.complete("compute", 100000, 100001, {"batch": "lost"})
print("flushed", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_what_it_had_written(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"flushed\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    found = events(path)
    assert None not in found
    assert [e["args"]["batch"] for e in found if e and e["ph"] == "X"] == list(range(1000))
    # Cut anywhere it gives the lines that are whole.
    text = path.read_bytes()
    assert not text.rstrip().endswith(b"}}\n")
    for cut in (len(trace_format.HEAD), len(trace_format.HEAD) + 5, *range(len(text) - 250, len(text))):
        path.write_bytes(text[:cut])
        left = events(path)
        assert [e for e in left if e is not None] == found[: len([e for e in left if e is not None])]
        # A line that is whole but for its comma has two brackets at its end: the arguments' and its own.
        last = text[:cut].rpartition(b"\n")[2].rstrip(b",")
        assert left.count(None) == (1 if last and not last.endswith(b"}}") else 0)


def test_damaged_files_give_sound_events_or_none(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tracer = idle(path)
    for i in range(30):
        tracer.main.complete("pull", 1000 * i, 1000 * i + 999, {"batch": i})
    tracer.close()
    text = path.read_bytes()
    whole = sum(event is not None for event in events(path))
    pieces = [b"NaN", b"-1", b"1e999", b"[" * 5000, b"\n", b"\xff", b'"', b"null", b"\0", b"true", b"X" * 40_000]
    for _ in range(300):
        data = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(trace_format.HEAD), len(data))
            data[at : at + rng.randrange(0, 30)] = rng.choice(pieces)
        path.write_bytes(data)
        for event in events(path):
            if event is not None:
                assert event["ph"] in "XMi"
                assert type(event["pid"]) is type(event["tid"]) is int
                assert all(trace_check.is_number(event[n]) and event[n] >= 0 for n in ("ts", "dur") if n in event)
                assert "dur" in event or event["ph"] != "X"
    for data in (b"", b"[]", text[1:], b"\0" * 100):
        path.write_bytes(data)
        assert events(path) == [None]
        assert not trace_format.is_trace(path)
    assert whole > 30


def test_off_it_costs_no_object_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an event was made")

    monkeypatch.setattr(Track, "complete", never)
    monkeypatch.setattr(Tracer, "__init__", never)
    stages = Stages()

    def many() -> None:
        for i in range(1000):
            with stages.time("compute", split=i, batch=i):
                pass

    threads = threading.active_count()
    many()
    before = sys.getallocatedblocks()
    many()
    assert sys.getallocatedblocks() - before < 50
    assert threading.active_count() == threads
    assert stages.entries == {"compute": 2000}


def test_processes_of_one_file_have_numbers_of_their_own(path: Path) -> None:
    tracer = idle(path)
    pids = [tracer.main.pid, *(tracer.main.beside(f"shard {i}").pid for i in range(3))]
    tracer.close()
    assert pids[0] == os.getpid()
    assert len(set(pids)) == 4
