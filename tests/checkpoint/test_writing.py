# SPDX-License-Identifier: Apache-2.0
"""Several blocks at once: the same files as one after the other, within the bound of memory, and the first error ends it."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_story import SPEC, block, check, write

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import BlockEntry
from oarlock.checkpoint.store import CheckpointStore, LocalStore
from oarlock.checkpoint.writing import BlockTask, Change, read_blocks, write_blocks
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument


def tasks_of(images: list[BlockImage], size: int = 100) -> list[BlockTask]:
    return [BlockTask(size, lambda image=image: Change(image)) for image in images]  # type: ignore[misc]


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_it_is_what_one_after_the_other_gives(
    tmp_path: Path, threads: int, quick: Any, images: Any, make_manifest: Any, same: Any
) -> None:
    one, many = quick(tmp_path / "one"), quick(tmp_path / "many")
    told: list[tuple[int, int]] = []
    entries = write_blocks(
        many, 1, tasks_of(images(1)), threads=threads, progress=lambda done, total: told.append((done, total))
    )
    assert entries == [one.write_block(1, image) for image in images(1)]
    assert told == [(100 * n, 500) for n in range(1, 6)]
    manifest = make_manifest(1, entries)
    many.commit(manifest)
    where: set[str] = set()

    def use(entry: BlockEntry, image: BlockImage) -> BlockImage:
        where.add(threading.current_thread().name)
        return image

    told.clear()
    found = read_blocks(many, manifest, entries, use, threads=threads, progress=lambda *each: told.append(each))
    assert all(same(image, wanted) for image, wanted in zip(found, images(1), strict=True))
    assert told[-1] == (sum(entry.bytes for entry in entries),) * 2
    assert threading.current_thread().name not in where


@pytest.mark.parametrize("niceness", [0, 3])
def test_threads_that_write_may_let_others_come_first(tmp_path: Path, niceness: int, quick: Any, images: Any) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    found: list[int] = []

    def make(image: BlockImage) -> Change:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        return Change(image)

    tasks = [BlockTask(100, lambda image=image: make(image)) for image in images(1)]  # type: ignore[misc]
    write_blocks(quick(tmp_path), 1, tasks, threads=2, niceness=niceness)
    assert set(found) == {mine + niceness}
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


def test_increments_are_written_too(tmp_path: Path, quick: Any, make_manifest: Any) -> None:
    store = quick(tmp_path)
    before = write(store, make_manifest, 1, 1, None).blocks
    gone = np.empty(0, np.uint64)
    made = [Change(block(at, 2, [[2], [102]][at]), after, gone) for at, after in enumerate(before)]
    entries = write_blocks(store, 2, [BlockTask(10, lambda change=change: change) for change in made])  # type: ignore[misc]
    store.commit(make_manifest(2, entries, tables=(SPEC,), dense=(), step=2))
    assert [len(entry.links) for entry in entries] == [2, 2]
    assert check(store) == [1, 2]


def test_what_is_in_memory_is_bounded(tmp_path: Path, quick: Any, images: Any) -> None:
    """Three blocks of 40 count 80 each: of 200 bytes two may be in work, and one of 5000 is so alone."""
    lock, inside, most, alone = threading.Lock(), [0], [0], []
    both = threading.Barrier(2)

    class Store(CheckpointStore):
        def write_block(self, cut: int, image: BlockImage, **options: Any) -> BlockEntry:
            try:
                return super().write_block(cut, image, **options)
            finally:
                with lock:
                    inside[0] -= 1

    def make(at: int) -> Change:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if at == 2:
                alone.append(inside[0])
        if at < 2:
            both.wait(10)  # two are in work at once
        return Change(images(1)[at])

    sizes = [40, 40, 5000, 40, 40]
    tasks = [BlockTask(size, lambda at=at: make(at)) for at, size in enumerate(sizes)]  # type: ignore[misc]
    store = Store(quick(tmp_path).files)
    assert len(write_blocks(store, 1, tasks, threads=5, bytes_in_flight=200)) == 5
    assert (most, alone, inside) == ([2], [1], [0])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_error_ends_it(tmp_path: Path, threads: int, quick: Any, images: Any) -> None:
    made: list[int] = []

    def make(at: int) -> Change:
        made.append(at)
        if at == 1:
            raise OSError(28, "No space left on device")
        return Change(images(1)[at % 5])

    tasks = [BlockTask(100, lambda at=at: make(at)) for at in range(50)]  # type: ignore[misc]
    with pytest.raises(OSError, match="No space left"):
        write_blocks(quick(tmp_path), 1, tasks, threads=threads, bytes_in_flight=400)
    assert len(made) <= 5
    with pytest.raises(RuntimeError, match="nobody looks"):
        write_blocks(
            quick(tmp_path), 2, tasks[:1], progress=lambda *_: (_ for _ in ()).throw(RuntimeError("nobody looks"))
        )


def test_a_reader_that_fails_ends_it(tmp_path: Path, quick: Any, write: Any) -> None:
    store = quick(tmp_path)
    manifest = write(store, 1, 1)
    path = tmp_path / "cut-000001" / manifest.blocks[3].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{manifest.blocks[3].file}: truncated"):
        read_blocks(store, manifest, manifest.blocks, lambda entry, image: None)


def test_limits_are_checked(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for options in ({"threads": 0}, {"bytes_in_flight": 0}):
        with pytest.raises(InvalidArgument, match="give at least 1 of each"):
            write_blocks(store, 1, [], **options)
    assert write_blocks(store, 1, []) == []
