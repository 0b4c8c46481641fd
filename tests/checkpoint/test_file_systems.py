# SPDX-License-Identifier: Apache-2.0
"""One promise over every file system: a folder, memory, fsspec's view of a folder, and a server that speaks S3."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_faulty_files import MODES, FaultyFiles
from checkpoint_story import SPEC, block, check, story, write

from oarlock.checkpoint.chain import rebase
from oarlock.checkpoint.files import Files, LocalFiles
from oarlock.checkpoint.fsspec_files import FsspecFiles
from oarlock.checkpoint.store import CheckpointStore, LocalStore, open_checkpoint, open_store
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound

KINDS = ["local", "memory", "file", "s3"]
KEYS = {"key": "test", "secret": "test"}
NUMBERS = itertools.count()


class S3:
    """A server that speaks S3 on this machine, and what a client needs to find it."""

    def __init__(self, url: str) -> None:
        self.options = {**KEYS, "endpoint_url": url, "config_kwargs": {"retries": {"max_attempts": 1}}}
        fsspec.filesystem("s3", use_listings_cache=False, **self.options).mkdir("bucket")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: the S3 part of this test has NOT RUN")
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem
    from werkzeug.serving import WSGIRequestHandler

    quiet = pytest.MonkeyPatch()
    quiet.setattr(WSGIRequestHandler, "log", lambda *_: None)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    found = S3("http://{}:{}".format(*server.get_host_and_port()))
    yield found
    client = fsspec.filesystem("s3", use_listings_cache=False, **found.options)
    S3FileSystem.close_session(client.loop, client._s3creator)
    S3FileSystem.clear_instance_cache()
    server.stop()
    quiet.undo()


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest) -> tuple[str, S3 | None]:
    return request.param, request.getfixturevalue("s3") if request.param == "s3" else None


@pytest.fixture
def make(place: tuple[str, S3 | None], tmp_path: Path) -> Callable[[], Files]:
    """Return what makes a new, empty place of a kind each time."""
    kind, s3 = place

    def new() -> Files:
        number = next(NUMBERS)
        if s3 is not None:
            return FsspecFiles(f"s3://bucket/jobs/{number}", s3.options)
        if kind == "local":
            return LocalFiles(tmp_path / str(number))
        return FsspecFiles(f"memory://job{number}" if kind == "memory" else f"file://{tmp_path}/{number}")

    return new


# The operations


def test_files_come_and_go(make: Callable[[], Files]) -> None:
    files = make()
    assert (files.folders(), files.list("cut-000001")) == ([], [])
    files.write_file("cut-000001/a", b"one")
    files.write_file("cut-000001/a", memoryview(b"three"))
    files.write_file("cut-000001/b", b"")
    files.write_file("cut-000002/c", b"x" * 3_000_000)
    assert files.folders() == ["cut-000001", "cut-000002"]
    assert files.list("cut-000001") == ["a", "b"]
    assert (bytes(files.read_file("cut-000001/a")), bytes(files.read_file("cut-000001/b"))) == (b"three", b"")
    assert files.sizes("cut-000001") == {"a": 5, "b": 0}
    assert files.sizes("cut-000009") == {}
    assert [files.size(path) for path in ("cut-000001/a", "cut-000001/b", "cut-000002/c")] == [5, 0, 3_000_000]
    files.sync_folder("cut-000001")
    with pytest.raises(OSError, match=r"not empty|Directory not empty"):
        files.delete_folder("cut-000001")
    for name in ("a", "b"):
        files.delete(f"cut-000001/{name}", durable=True)
    files.delete_folder("cut-000001")
    assert files.folders() == ["cut-000002"]


def test_what_is_not_there_is_not_found(make: Callable[[], Files]) -> None:
    files = make()
    for _ in range(2):
        for action in (files.read_file, files.size):
            with pytest.raises(FileNotFoundError) as caught:
                action("cut-000001/a")
            assert caught.value.errno == 2
        files.write_file("cut-000001/b", b"1")


@pytest.mark.parametrize("path", ["../x/y", "a/../b", "a/b/c", "/etc/passwd", "a/", "a", "./b", "a/.", "a/\0"])
def test_paths_stay_below_the_root(make: Callable[[], Files], path: str) -> None:
    files = make()
    for action in (files.read_file, files.size, files.delete, lambda p: files.write_file(p, b"x")):
        with pytest.raises(InvalidArgument, match=r"not the plain name"):
            action(path)
    assert files.folders() == []


def test_a_manifest_is_put_where_there_is_none(make: Callable[[], Files]) -> None:
    files = make()
    files.commit_file("cut-000001/manifest.json", b"one")
    files.commit_file("cut-000001/manifest.json", b"one")
    if not isinstance(files, LocalFiles):
        with pytest.raises(FileExistsError):
            files.commit_file("cut-000001/manifest.json", b"two")
    assert bytes(files.read_file("cut-000001/manifest.json")) == b"one"
    assert files.list("cut-000001") == ["manifest.json"]


# The store over them


def test_chains_compaction_and_collection(make: Callable[[], Files], make_manifest: Any) -> None:
    store = CheckpointStore(make())
    done: list[int] = []
    write(store, make_manifest, 1, 1, None)
    story(store, make_manifest, done)
    assert done == [2, 3]
    assert check(store) == [3]
    write(store, make_manifest, 4, 4, None)
    assert store.keep_last(1) == [3]
    assert store.files.folders() == ["cut-000004"]
    for name in ("rows-user-00000.arrow", "manifest.json"):
        data = bytes(store.files.read_file(f"cut-000004/{name}"))
        store.files.write_file(f"cut-000004/{name}", data[:-1])
        with pytest.raises(CorruptCheckpoint, match=f"cut-000004/{name}: (truncated|altered)"):
            store.verify(store.load_manifest(4))
        store.files.write_file(f"cut-000004/{name}", data)
    assert check(store) == [4]


@pytest.mark.parametrize("bucket", ["memory://", "s3://bucket/"])
def test_of_two_coordinators_one_commits(bucket: str, s3: S3, make_manifest: Any) -> None:
    """Both have looked, and neither saw a manifest."""
    store = open_store(f"{bucket}race{next(NUMBERS)}", options=s3.options if bucket.startswith("s3") else None)
    entries = [store.write_block(1, block(i, 1, [])) for i in (0, 1)]
    manifests = [make_manifest(1, entries, tables=(SPEC,), dense=(), step=step) for step in (1, 2)]
    looked = threading.Barrier(2)

    def coordinator(manifest: Any) -> str:
        own = CheckpointStore(store.files)
        real = own.is_committed

        def look(cut: int) -> bool:
            found = real(cut)
            looked.wait(10)
            return found

        own.is_committed = look  # type: ignore[method-assign]
        try:
            own.commit(manifest)
        except InvalidArgument as error:
            return str(error)
        return "committed"

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(coordinator, manifests))
    assert said == ["committed", "cut 1 was committed by another coordinator: a cut's number is never used twice"]
    assert store.load_manifest() in manifests


def test_urls_and_paths_open(tmp_path: Path, make_manifest: Any, s3: S3) -> None:
    write(LocalStore(tmp_path / "a"), make_manifest, 12, 1, None)
    for path in (
        tmp_path / "a",
        f"{tmp_path}/a",
        f"file://{tmp_path}/a",
        f"{tmp_path}/a@12",
        f"{tmp_path}/a/cut-000012",
    ):
        store, found = open_checkpoint(path)
        assert isinstance(store, LocalStore)
        assert (found.cut, check(store)) == (12, [12])
    assert isinstance(open_store(f"file://{tmp_path}/with%20space").files, LocalFiles)
    assert open_store(f"file://{tmp_path}/with%20space").files.root == f"{tmp_path}/with space"
    with pytest.raises(NotFound, match=r"no committed cut 3 .* there is: 12"):
        open_checkpoint(f"{tmp_path}/a@3")
    write(LocalStore(tmp_path / "job@3"), make_manifest, 5, 1, None)
    assert open_checkpoint(tmp_path / "job@3")[1].cut == 5
    assert open_checkpoint(f"{tmp_path}/job@3@5")[1].cut == 5
    url = "s3://bucket/some/job"
    for cut in (1, 2):
        write(open_store(url, options=s3.options), make_manifest, cut, 1, None)
    assert open_checkpoint(url, options=s3.options)[1].cut == 2
    assert open_checkpoint(f"{url}@1", options=s3.options)[1].cut == 1
    assert open_checkpoint(f"{url}/cut-000001/", options=s3.options)[1].cut == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gopher://x/y", "no file system for it: ValueError: Protocol not known: gopher"),
        ("memory://", "name a folder"),
        ("file://elsewhere/x", "give a path of this machine"),
    ],
)
def test_urls_that_lead_nowhere_are_refused(url: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        open_store(url)


# Failures


@pytest.mark.parametrize("mode", MODES)
def test_some_steps_over_memory(mode: str, make_manifest: Any) -> None:
    fail_at_steps(itertools.count(2 + 3 * MODES.index(mode), 23), mode, make_manifest)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_step_over_memory(mode: str, make_manifest: Any) -> None:
    fail_at_steps(itertools.count(1), mode, make_manifest)


def fail_at_steps(steps: Iterator[int], mode: str, make_manifest: Any) -> None:
    """A job's story in a store that fails once, in one way and at some operations: kept cuts are whole, and it goes on."""
    for fail_at in steps:
        files = FsspecFiles(f"memory://faulty{next(NUMBERS)}")
        good = CheckpointStore(files)
        write(good, make_manifest, 1, 1, None)
        faulty = FaultyFiles(files, fail_at, mode)
        done = [1]
        with contextlib.suppress(OSError, CorruptCheckpoint):
            story(CheckpointStore(faulty), make_manifest, done)
        cuts = good.cuts()
        if mode == "half" and any(len(entry.links) > 1 for entry in good.load_manifest().blocks):
            # What a store has lost behind our back is told when it is looked at, not before.
            with contextlib.suppress(CorruptCheckpoint):
                check(good)
        else:
            assert check(good) == cuts, faulty.log[fail_at - 1]
        assert cuts[-1] in (done[-1], done[-1] + 1), faulty.log[fail_at - 1]
        good.discard_incomplete()
        write(good, make_manifest, 8, 8, None)
        good.keep_last(1)
        assert check(good) == [8]
        assert files.folders() == ["cut-000008"]
        if len(faulty.log) < fail_at:
            break
    assert fail_at > 90


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", [[4, 5], pytest.param(range(1, 10), marks=pytest.mark.slow)])
def test_s3_that_answers_errors_in_mid_write(
    late: bool, steps: Any, s3: S3, make_manifest: Any, monkeypatch: Any
) -> None:
    """Its answer to the n-th put is 500 Internal Error, again and again: before it was done, or after."""
    from botocore.exceptions import ClientError
    from s3fs import S3FileSystem

    url = f"s3://bucket/errors/{next(NUMBERS)}"
    store = open_store(url, options=s3.options)
    before = list(write(store, make_manifest, 1, 1, None).blocks)
    real, outcomes = S3FileSystem._call_s3, []
    for fail_at in steps:
        puts = 0

        async def call(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
            nonlocal puts
            puts += method == "put_object"
            fails = method == "put_object" and puts == fail_at  # noqa: B023
            if not fails or late:
                answer = await real(self, method, *arguments, **options)
            if fails:
                raise OSError(5, "We encountered an internal error.") from ClientError(
                    {"Error": {"Code": "InternalError"}, "ResponseMetadata": {"HTTPStatusCode": 500}}, "PutObject"
                )
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(S3FileSystem, "_call_s3", call)
            try:
                write(store, make_manifest, 10 + fail_at, 2, before)
                outcomes.append("committed")
            except OSError as error:
                outcomes.append("failed" if error.errno == 5 else str(error))
        assert (10 + fail_at in check(store)) == (outcomes[-1] == "committed")
        if puts < fail_at:
            break
    # Three files and a manifest; of that the answer alone may be lost, since what is there can be read.
    assert outcomes[-2:] == ["committed" if late else "failed", "committed"]
    assert outcomes[:-2] == ["failed"] * len(outcomes[:-2])
    store.discard_incomplete()
    assert check(store) == store.cuts()


def test_a_server_that_is_away_is_an_error_of_files(make_manifest: Any) -> None:
    files = FsspecFiles("memory://away")

    class Gone(Exception):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise Gone("no route to it")

    for name in ("pipe_file", "cat_file", "info", "ls", "rm_file"):
        patch = pytest.MonkeyPatch()
        patch.setattr(type(files._fs), name, fail)
        actions = {
            "pipe_file": lambda: files.write_file("a/b", b""),
            "cat_file": lambda: files.read_file("a/b"),
            "info": lambda: files.size("a/b"),
            "ls": files.folders,
            "rm_file": lambda: files.delete("a/b"),
        }
        with pytest.raises(OSError, match="Gone: no route to it") as caught:
            actions[name]()
        patch.undo()
        assert caught.value.errno == 5
    assert CheckpointStore(files).cuts() == []


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_folder_that_takes_nothing_leaves_what_was(tmp_path: Path, what: str, quick: Any, make_manifest: Any) -> None:
    store = quick(tmp_path)
    before = list(write(store, make_manifest, 1, 1, None).blocks)
    failing = CheckpointStore(FaultyFiles(store.files, 1, what))
    for action in (
        lambda: write(failing, make_manifest, 2, 2, before),
        lambda: write(failing, make_manifest, 2, 2, None),
    ):
        with pytest.raises(OSError, match="nothing can be written"):
            action()
    assert check(store) == [1]
    two = write(store, make_manifest, 2, 2, before)
    with pytest.raises(OSError, match="nothing can be written"):
        failing.compact(two)
    if what == "read-only":
        with pytest.raises(OSError, match="nothing can be written"):
            failing.keep_last(1)
    assert check(store) == [1, 2]
    assert rebase(two.blocks[0], store.compact(two)[0]).folder == "compact-000002"
    assert sorted(os.listdir(tmp_path)) == ["compact-000002", "cut-000001", "cut-000002"]
