# SPDX-License-Identifier: Apache-2.0
"""Many blocks at once: writing a cut's and reading one back, in several threads within a bound of memory.

Invariant: results come in the order of the tasks; what is in memory at once is at most ``bytes_in_flight`` (a single larger block
goes alone); the first error ends the rest, once what is under way has ended, and is raised. Threads live for one call, which
any thread may make. They help although Python runs one at a time: a disk's wait, checksums, copies and sums do not hold it.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.direct import buffers
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import NONE_GONE, CheckpointStore
from oarlock.proto.errors import InvalidArgument

BYTES_IN_FLIGHT = 256 << 20
Progress = Callable[[int, int], None]
Result = TypeVar("Result")
Task = TypeVar("Task")


@dataclass(frozen=True, eq=False)
class Change:
    """What is to be written of one block: all of it, or with ``after`` what changed and the keys that left since."""

    image: BlockImage
    after: BlockEntry | None = None
    gone: NDArray[np.uint64] = field(default_factory=lambda: NONE_GONE)


@dataclass(frozen=True, eq=False)
class BlockTask:
    """A block that is to be written. ``make`` is called in a writer's thread, when there is room for ``bytes``."""

    bytes: int
    make: Callable[[], Change]


def write_blocks(
    store: CheckpointStore,
    cut: int,
    tasks: Iterable[BlockTask],
    *,
    threads: int = 3,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
    progress: Progress | None = None,
    niceness: int = 0,
) -> list[BlockEntry]:
    """Write blocks of a cut; return their entries. ``progress(done, total)`` is told the tasks' bytes, from one thread at a time.

    A block counts twice its bytes while it is written: its arrays, and those in order of key. Of three threads one waits for the
    disk most of the time. ``niceness``: of the threads, beside that of the process; 0: none.
    """

    def write(task: BlockTask) -> BlockEntry:
        change = task.make()
        return store.write_block(cut, change.image, after=change.after, gone=change.gone)

    return in_threads(
        list(tasks),
        write,
        lambda task: 2 * task.bytes,
        threads=threads,
        bytes_in_flight=bytes_in_flight,
        progress=None if progress is None else lambda done, total: progress(done // 2, total // 2),
        niceness=niceness,
    )


def read_blocks(
    store: CheckpointStore,
    manifest: Manifest,
    entries: Iterable[BlockEntry],
    use: Callable[[BlockEntry, BlockImage], Result],
    *,
    threads: int = 2,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
    checked: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Load blocks and give each to ``use`` in a reader's thread; return what it returned. The image is not kept.

    ``checked``: as of ``load_block``. A block of a chain counts twice: its files, and what they are merged into.
    """

    def read(entry: BlockEntry) -> Result:
        return use(entry, store.load_block(manifest, entry, checked=checked))

    return in_threads(
        list(entries),
        read,
        lambda entry: 2 * entry.total_bytes,
        threads=threads,
        bytes_in_flight=bytes_in_flight,
        progress=None if progress is None else lambda done, total: progress(done // 2, total // 2),
    )


def _let_others_first(niceness: int) -> None:
    """Let other threads of the host come before the calling one, as Linux does by a niceness of its own for each thread."""
    if niceness:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + niceness)


def in_threads(
    tasks: Sequence[Task],
    do: Callable[[Task], Result],
    size: Callable[[Task], int],
    *,
    threads: int = 2,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
    progress: Progress | None = None,
    niceness: int = 0,
) -> list[Result]:
    """Return ``do(task)`` of all tasks, in their order. ``size(task)``: what it holds in memory, of which progress is told.

    ``niceness``: of the threads, beside that of the process; 0: none.
    """
    if threads < 1 or bytes_in_flight < 1:
        raise InvalidArgument(f"threads = {threads}, bytes_in_flight = {bytes_in_flight}: give at least 1 of each")
    work = _Work(sum(size(task) for task in tasks), bytes_in_flight, progress)

    def one(task: Task) -> Result:
        try:
            found = do(task)
            work.done(size(task))
            return found
        except BaseException:
            work.stop()
            raise
        finally:
            work.leave(size(task))

    futures: list[Future[Result]] = []
    with ThreadPoolExecutor(
        min(threads, max(1, len(tasks))), "checkpoint", initializer=_let_others_first, initargs=(niceness,)
    ) as pool:
        try:
            for task in tasks:
                # The room is taken here, in the order of the tasks, so that a large one waits for small ones once only.
                if not work.enter(size(task)):
                    break
                futures.append(pool.submit(one, task))
        except BaseException:
            work.stop()
            raise
    buffers.let_go()
    # Of several errors that of the earliest task; a task after it may have been given up before it began.
    return [future.result() for future in futures]


class _Work:
    """What is in memory, what is done, and whether to go on. All methods from any thread."""

    def __init__(self, total: int, limit: int, progress: Progress | None) -> None:
        self._changed = threading.Condition()
        self._total, self._limit, self._progress = total, limit, progress
        self._held = self._done = 0
        self._stopped = False

    def enter(self, size: int) -> bool:
        """Wait for room and take it; False once the rest is not to be done."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._held or self._held + size <= self._limit)
            if not self._stopped:
                self._held += size
            return not self._stopped

    def leave(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def done(self, size: int) -> None:
        with self._changed:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total)
