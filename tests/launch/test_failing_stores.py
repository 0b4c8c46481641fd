# SPDX-License-Identifier: Apache-2.0
"""Jobs whose checkpoints cannot be written: training goes on and says so, the cut before stays, and the next one is made."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from oarlock.checkpoint.files import Calls
from oarlock.checkpoint.store import open_store
from oarlock.cli.main import main
from oarlock.launch.folder import create, resume
from oarlock.launch.inprocess import run_in_process
from oarlock.proto.errors import CorruptCheckpoint

# A cut after each epoch.
EVERY = {"epochs": 5, "workers": 1, "servers": 2}
BAD = ("cut-000002", "cut-000003")


class Full(Calls):
    """A disk that is full in the middle of a file while cuts 2 and 3 are written."""

    bad: set[int] = set()  # noqa: RUF012

    def create(self, path: str) -> int:
        descriptor = super().create(path)
        (self.bad.add if any(cut in path for cut in BAD) else self.bad.discard)(descriptor)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        if descriptor in self.bad:
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, data)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://jobs/failing"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def went_on(status: dict[str, Any], root: Any, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """The job is done, has said which cuts failed and why, and has whole cuts of before and after, and no others."""
    assert status["phase"] == "done"
    warned = [w for w in status["warnings"] if "could not be written" in w]
    assert [w.partition(" could")[0] for w in warned] == ["checkpoint 2", "checkpoint 3"]
    assert all("training goes on: " in w and says in w for w in warned)
    lines = [r.getMessage() for r in caplog.records if "event=cut_given_up" in r.getMessage()]
    assert [line.split()[1] for line in lines] == ["cut=2", "cut=3"]
    made = [c["cut"] for c in status["checkpoints"]]
    assert made == [1, 4, 5]
    store = open_store(root)
    assert store.folders("cut")[-1] == store.cuts()[-1] == made[-1]
    assert not {2, 3} & set(store.folders("cut"))
    for cut in store.cuts():
        store.verify(store.load_manifest(cut))


def test_a_disk_that_is_full_for_a_while(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oarlock")
    monkeypatch.setattr("oarlock.checkpoint.files.Calls", Full)
    spec, folder = start(**EVERY)
    seen: list[list[int]] = []

    def look(status: dict[str, Any]) -> bool:
        # As soon as a cut came to nothing: the one before it is whole, and what was half written is gone.
        if status["cut"].get("failed", {}).get("cut") == 3 and not seen and not status["cut"]["begun"]:
            store = open_store(folder / "checkpoints")
            store.verify(store.load_manifest(1))
            seen.append(store.cuts())
        return False

    went_on(run_job(spec, folder, stop_when=look), folder / "checkpoints", "No space left on device", caplog)
    # What was trained by cuts that came to nothing is in the later ones.
    again, path = resume(folder, {"epochs": 6})
    assert run_job(again, folder, restore=path)["phase"] == "done"


class ServerError(Exception):
    """As clients of object stores have them: none of Python's own kinds."""


@pytest.mark.parametrize(
    ("error", "says"),
    [(ServerError("503 Slow Down"), "503 Slow Down"), (TimeoutError("read timed out"), "timed out")],
)
def test_a_server_that_answers_errors_or_not_at_all(
    start: Any,
    run_job: Any,
    memory: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    says: str,
) -> None:
    caplog.set_level(logging.INFO, "oarlock")
    put, count = MemoryFileSystem.pipe_file, 0

    def pipe_file(self: Any, path: str, value: Any, **options: Any) -> Any:
        nonlocal count
        # Of cut 2 some files get there, of cut 3 none.
        count += BAD[0] in path
        if BAD[1] in path or (BAD[0] in path and count > 5):
            raise error
        return put(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    spec, folder = start(checkpoint_path=memory, **EVERY)
    went_on(run_job(spec, folder), memory, says, caplog)
    assert count > 5


def test_a_job_whose_last_checkpoint_cannot_be_written_ends_loudly(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oarlock.cluster.cuts.LAST_PAUSES", (0.05, 0.05))
    spec, folder = start(epochs=2, workers=1, checkpoint_path="/proc/oarlock")
    status = run_job(spec, folder)
    assert status["phase"] == "failed"
    assert status["reason"].startswith(
        "the last checkpoint could not be written: a checkpoint cannot be written to /proc"
    )
    assert status["reason"].endswith("; there is none")
    warned = [w.partition(": ")[0] for w in status["warnings"]]
    assert warned[0] == "checkpoint 1 could not be written, training goes on"
    assert warned[1:] == ["the last checkpoint could not be written, it is tried again in 0.05 s"] * 2
    # Both epochs were trained and evaluated all the same.
    assert len(status["history"]) == 2


def test_room_that_is_made_in_time_saves_the_last_checkpoint(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oarlock.cluster.cuts.LAST_PAUSES", (0.05,) * 4)
    monkeypatch.setattr("oarlock.checkpoint.files.Calls", Full)
    spec, folder = start(epochs=2, workers=1)
    status = run_job(spec, folder)
    assert (status["phase"], [c["cut"] for c in status["checkpoints"]]) == ("done", [1, 4])
    assert len([w for w in status["warnings"] if "the last checkpoint" in w]) == 2


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory, run_of: Any) -> Path:
    """A job of whose newest cut the tables' blocks are chains."""
    folder: Path = tmp_path_factory.mktemp("chained") / "job"
    spec = create(folder, "job", run_of(**{**EVERY, "epochs": 3, "servers": 1, "checkpoints_kept": 3}))
    with pytest.MonkeyPatch.context() as patch:
        # Every row changes in every epoch of this job.
        patch.setattr("oarlock.ps.view.should_be_whole", lambda entry, *_: entry is None)
        assert run_in_process(spec, folder, watch=lambda _: True, watch_seconds=0.01)["phase"] == "done"
    return folder


@pytest.mark.parametrize("stride", [89, pytest.param(1, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_named_with_the_cut_to_go_back_to(
    chained: Path, capsys: pytest.CaptureFixture[str], stride: int
) -> None:
    root = chained / "checkpoints"
    store = open_store(root)
    newest = store.load_manifest()
    links = {link for entry in newest.blocks for link in entry.links}
    assert len({link.folder for link in links}) > 1, "chains"
    files = sorted({file.path for link in links for file in link.files})
    needs = {
        cut: {f.path for e in store.load_manifest(cut).blocks for li in e.links for f in li.files}
        for cut in store.cuts()
    }
    older = {
        path: max((c for c, named in needs.items() if c < newest.cut and path not in named), default=None)
        for path in files
    }
    assert set(older.values()) >= {store.cuts()[-2]}
    for number, path in enumerate([*files[::stride], f"cut-{newest.cut:06d}/manifest.json"]):
        file = root / path
        whole = file.read_bytes()
        at = number * 7919 % len(whole)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << number % 8
        for damaged in (bytes(flipped), whole[: len(whole) // 2]):
            # Not in place: a reader may have it mapped.
            file.unlink()
            file.write_bytes(damaged)
            capsys.readouterr()
            assert main(["checkpoint", "verify", str(chained), "--json"]) == 1
            found = json.loads(capsys.readouterr().out)["cuts"][0]
            assert (found["cut"], {each["file"] for each in found["damage"]}) == (newest.cut, {path})
            back = older.get(path, store.cuts()[-1]) if path in older else store.cuts()[-2]
            assert {each["older"] for each in found["damage"]} == {back}
            if path in older:
                with pytest.raises(CorruptCheckpoint) as told:
                    resume(chained, {"epochs": 2})
                assert f"cut {newest.cut} is damaged: {path}: " in str(told.value)
                assert told.value.details["older"] == back
                says = "no older cut is whole" if back is None else f"cut {back} is the next older one that is whole"
                assert says in str(told.value)
        file.unlink()
        file.write_bytes(whole)
    assert main(["checkpoint", "verify", "--all", str(chained)]) == 0
