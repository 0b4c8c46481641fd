# SPDX-License-Identifier: Apache-2.0
"""A job that keeps its checkpoints elsewhere: in memory, in another folder, on a server that speaks S3."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.asyn
import pytest

from oarlock.checkpoint.block_file import encode
from oarlock.checkpoint.place import Place
from oarlock.checkpoint.store import open_store
from oarlock.client.job import JobSpec
from oarlock.cluster import epoch_end
from oarlock.cluster.evaluation import Evaluation
from oarlock.launch.config import load_toml, run_config
from oarlock.launch.folder import create, resume, stored_status
from oarlock.launch.origin import find_origin, values_of
from oarlock.launch.place import find, find_cut
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import InvalidArgument, NotFound, Unavailable

SECRET = "zebra-that-nobody-may-see"


class S3:
    """A server that speaks S3 on this machine; its credentials are in the environment."""

    def __init__(self, url: str) -> None:
        self.options = {"endpoint_url": url, "config_kwargs": {"retries": {"max_attempts": 1}}}
        fsspec.filesystem("s3", use_listings_cache=False, **self.options).mkdir("bucket")

    def files(self, prefix: str) -> dict[str, bytes]:
        client = fsspec.filesystem("s3", use_listings_cache=False, **self.options)
        return {path.removeprefix(f"{prefix}/"): client.cat_file(path) for path in client.find(prefix)}


@pytest.fixture(scope="session")
def threads_of_fsspec() -> None:
    """Start those in which it waits for networks and looks up names, before anything is counted; they last as the process."""
    loop, names = fsspec.asyn.get_loop(), ThreadPoolExecutor(1)
    names.submit(int).result()
    loop.call_soon_threadsafe(loop.set_default_executor, names)


@pytest.fixture(scope="module")
def s3(threads_of_fsspec: None) -> Iterator[S3]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: the S3 part of this test has NOT RUN")
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem
    from werkzeug.serving import WSGIRequestHandler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGIRequestHandler, "log", lambda *_: None)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        found = S3("http://{}:{}".format(*server.get_host_and_port()))
        yield found
        for client in list(S3FileSystem._cache.values()):
            S3FileSystem.close_session(client.loop, client._s3creator)
        S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://jobs/first"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def nothing_secret(folder: Path) -> None:
    """No file of a job's folder has the secret."""
    found = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert found == []


def goes_on(folder: Path, spec: JobSpec, run_job: Any, **changes: Any) -> dict[str, Any]:
    """Resume a job that is done, and train to its end."""
    again, path = resume(folder, changes)
    status: dict[str, Any] = run_job(again, folder, restore=path)
    assert (status["phase"], status["run"], len(status["history"])) == ("done", 2, again.epochs)
    return status


def test_a_job_keeps_its_checkpoints_where_it_is_told(start: Any, run_job: Any, memory: str, run_of: Any) -> None:
    spec, folder = start(epochs=2, checkpoint_path=memory, checkpoint_compress="zstd", workers=1)
    status = run_job(spec, folder)
    assert [c["path"] for c in status["checkpoints"]] == [f"{memory}/cut-000001", f"{memory}/cut-000002"]
    assert not (folder / "checkpoints").exists()
    plain = open_store(memory)
    assert plain.cuts() == [1, 2]
    manifest = plain.load_manifest()
    plain.verify(manifest)
    entry = next(e for e in manifest.blocks if e.kind == "dense")
    assert bytes(plain.files.read_file(f"cut-000002/{entry.file}")) != bytes(encode(plain.load_block(manifest, entry)))
    # People's tools find it by the job.
    store, found = find_cut(str(folder))
    assert (store.files.root, found.cut) == (memory, 2)
    assert find(f"{folder}@1")[1] == 1
    assert find_cut(f"{memory}@1")[1].cut == 1
    # Nobody else gets it.
    other = folder.parent / "other"
    with pytest.raises(InvalidArgument, match=f"{memory} has checkpoints of another job \\({spec.job}\\)"):
        create(other, "other", run_of(checkpoint_path=memory))
    assert not other.exists()
    assert load_toml(folder / "job.toml")["checkpoint_path"] == memory
    status = goes_on(folder, spec, run_job, epochs=3, servers=3)
    assert plain.cuts()[-1] == status["checkpoints"][-1]["cut"]


def test_the_cut_of_the_best_epoch_stays(start: Any, run_job: Any, monkeypatch: Any) -> None:
    results = iter([0.1, 0.5, 0.9, 0.3, 0.2, 0.95])
    monkeypatch.setattr(epoch_end, "merge", lambda found, names: Evaluation(dict.fromkeys(names, next(results)), 1))
    spec, folder = start(epochs=5, workers=1, checkpoints_kept=1, checkpoint_keep_best=1)
    status = run_job(spec, folder)
    assert status["cut"]["best"] == stored_status(folder)["cut"]["best"] == 3
    store = open_store(folder / "checkpoints")
    assert store.cuts() == [3, 5]
    assert store.load_manifest(3).metrics["hr@10"] == 0.9
    store.verify(store.load_manifest(3))
    assert goes_on(folder, spec, run_job, epochs=6)["cut"]["best"] == 6
    assert store.cuts() == [6]


def test_a_job_that_is_overtaken_by_another_one_in_the_same_place_writes_nothing(
    start: Any, run_job: Any, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were made while the place was empty."""
    monkeypatch.setattr("oarlock.cluster.cuts.LAST_PAUSES", (0.05,) * 4)
    first, second = start("first", epochs=1, checkpoint_path=memory), start("second", epochs=1, checkpoint_path=memory)
    run_job(*first)
    before = dict(fsspec.filesystem("memory").store)
    status = run_job(*second)
    assert status["phase"] == "failed"
    assert f"has checkpoints of another job ({first[0].job})" in status["reason"]
    assert fsspec.filesystem("memory").store == before


def test_checkpoints_move_with_the_next_resume(start: Any, run_job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    spec, folder = start(epochs=1, workers=1)
    run_job(spec, folder)
    monkeypatch.chdir(tmp_path)
    status = goes_on(folder, spec, run_job, epochs=2, checkpoint_path="elsewhere")
    root = tmp_path / "elsewhere"
    assert status["checkpoints"][-1]["path"] == str(root / "cut-000002")
    assert (open_store(root).cuts(), open_store(folder / "checkpoints").cuts()) == ([2], [1])
    # Wherever it is resumed from.
    monkeypatch.chdir(folder)
    assert resume(folder, {"epochs": 3})[1] == str(root / "cut-000002")
    open_store(root).files.delete("cut-000002/manifest.json")
    with pytest.raises(NotFound, match=f"{root} holds no whole checkpoint"):
        resume(folder, {"epochs": 3})


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_a_place_that_does_not_answer_is_said(run_of: Any, tmp_path: Path) -> None:
    options = {"endpoint_url": "http://127.0.0.1:9", "anon": True, "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises(Unavailable, match="the checkpoints in s3://bucket/x cannot be read: "):
        create(tmp_path / "job", "job", run_of(checkpoint_path="s3://bucket/x", checkpoint_options=options))


@pytest.mark.slow
def test_a_job_in_one_process_and_on_s3(start: Any, run_job: Any, s3: S3, tmp_path: Path) -> None:
    where = {"checkpoint_path": "s3://bucket/inprocess", "checkpoint_options": s3.options}
    spec, folder = start(epochs=1, **where)
    status = run_job(spec, folder)
    assert [c["path"] for c in status["checkpoints"]] == ["s3://bucket/inprocess/cut-000001"]
    status = goes_on(folder, spec, run_job, epochs=2, servers=1)
    store, manifest = find_cut(str(folder))
    assert (store.cuts(), manifest.run, manifest.epoch) == ([1, 2], 2, 2)
    store.verify(manifest)
    nothing_secret(folder)
    assert all(SECRET.encode() not in data for data in s3.files("bucket/inprocess").values())
    # It is there once: a second put of a manifest is refused by the server itself.
    with pytest.raises(FileExistsError):
        store.files.commit_file("cut-000002/manifest.json", b"another")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_of_processes_on_s3(start: Any, s3: S3) -> None:
    where = {"checkpoint_path": "s3://bucket/processes", "checkpoint_options": s3.options}
    spec, folder = start(epochs=2, servers=2, workers=2, checkpoint_every="1s", lease_seconds=20.0, **where)
    seen: set[str] = set()

    def watch(status: dict[str, Any]) -> bool:
        for member in status.get("members", []):
            line = Path(f"/proc/{member['pid']}/cmdline")
            seen.add(line.read_bytes().decode() if line.exists() else "")
        return True

    status = asyncio.run(LocalProcesses(spec, folder, log_level="info").run(watch))
    assert status["phase"] == "done", status["reason"]
    assert seen
    assert not any(SECRET in line for line in seen)
    again, path = resume(folder, {"epochs": 3, "servers": 3, "workers": 1})
    assert path.startswith("s3://bucket/processes/cut-")
    status = asyncio.run(LocalProcesses(again, folder, restore=path, log_level="info").run(watch))
    assert (status["phase"], status["run"], len(status["history"])) == ("done", 2, 3)
    store = Place("s3://bucket/processes", s3.options).open(folder)
    manifest = store.load_manifest()
    store.verify(manifest)
    assert manifest.epoch == 3
    nothing_secret(folder)
    assert json.loads((folder / "job.json").read_text())["checkpoint_options"] == s3.options


@pytest.mark.slow
def test_a_new_job_begins_with_a_checkpoint_of_a_place_with_options(
    start: Any, run_job: Any, run_of: Any, s3: S3, tmp_path: Path
) -> None:
    where = {"checkpoint_path": "s3://bucket/origin", "checkpoint_options": s3.options}
    spec, folder = start(epochs=1, **where)
    assert run_job(spec, folder)["phase"] == "done"
    mine = {"checkpoint_path": "s3://bucket/second", "checkpoint_options": s3.options}
    run = run_config({**values_of(find_origin(str(folder))), "epochs": 2, **mine})
    status = run_job(create(tmp_path / "second", "second", run), tmp_path / "second")
    assert (status["phase"], len(status["history"])) == ("done", 2)
    mine["checkpoint_path"] = "s3://bucket/warm"
    run = run_of(epochs=1, warm_start={"path": str(folder)}, **mine)
    status = run_job(create(tmp_path / "warm", "warm", run), tmp_path / "warm")
    assert status["phase"] == "done"
    # Without its options nobody finds it, and that is said when the job is made.
    with pytest.raises(Unavailable, match="s3://bucket/origin"):
        create(tmp_path / "third", "third", run_config({**values_of(find_origin(str(folder))), "epochs": 2}))
