# SPDX-License-Identifier: Apache-2.0
"""Compacting: a shard makes whole files of its own chains that became long, beside training, so that cuts are increments only.

    committed(n)    the cut is on disk, whole: its chains that are due are queued
    step()          one block of the queue
    rebased(...)    what the next cut's increments follow: the chains, with what was compacted in place of their beginning
    writing()       a cut is being written: nothing else uses the disk meanwhile

Invariant: nothing here changes a cut or holds up training; what fails is told and tried again with the next cut. What was written
is used only by a cut that follows on the one that was compacted, or on a later one of the same chains. ``step`` from one
thread at a time, everything else from any.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from threading import Condition
from typing import Any, cast

from oarlock.checkpoint.chain import MAX_LINKS, rebase, should_be_compacted
from oarlock.checkpoint.compaction import Used, compact_block, in_use
from oarlock.checkpoint.direct import buffers
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.files import Files
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.proto.errors import PSError

logger = logging.getLogger(__name__)

# After a block nothing is done for this many times as long: a fifth of one core and of the disk, at most.
REST = 4.0
Entries = Mapping[int, BlockEntry]


class Stopped(Exception):
    """The shard ends."""


class Compacting:
    """The chains of one shard. ``links``: from which length on a chain is compacted."""

    def __init__(self, *, links: int = MAX_LINKS) -> None:
        self._links = links
        self._changed = Condition()
        self._writers = 0
        self._stopped = False
        # The newest cut that was written here, and the newest of those that is known to be committed.
        self._written: tuple[int, Entries, CheckpointStore | None] = (0, {}, None)
        self._cut = 0
        self._store: CheckpointStore | None = None
        self._manifest: Manifest | None = None
        self._used: Used = {}
        self._queue: deque[tuple[int, BlockEntry]] = deque()
        # Entries of whole files by number of block, for the next cuts to follow on.
        self._done: dict[int, BlockEntry] = {}
        # What went wrong last, until something goes well.
        self.trouble = ""
        self.counts = {"blocks": 0, "bytes": 0, "failed": 0}
        self.seconds = 0.0
        # Of the last step: how long it stood still for a cut.
        self.waited = 0.0

    def written(self, cut: int, entries: Entries, store: CheckpointStore) -> None:
        """Note what a cut has, which may be committed or come to nothing."""
        with self._changed:
            self._written = (cut, entries, store)

    def committed(self, cut: int) -> None:
        """Queue the chains of the newest committed cut that are due, if this shard knows them. May be called again."""
        with self._changed:
            known, entries, store = self._written
            if cut != known or cut <= self._cut or store is None:
                return
            self._cut, self._manifest = cut, None
            self._store = CheckpointStore(cast(Files, _Gentle(store.files, self._pass)), compress=store.compress)
            self._done = {n: done for n, done in self._done.items() if _stands_in(done, entries.get(n))}
            after = self._rebased(entries)
            self._queue = deque((n, entry) for n, entry in after.items() if should_be_compacted(entry, self._links))

    def rebased(self, cut: int, entries: Entries) -> dict[int, BlockEntry]:
        """Return the entries of the committed ``cut`` as the next one's increments follow them."""
        with self._changed:
            if self._written[0] != cut:
                # A cut was written since and came to nothing, perhaps by a file of these that is not what it should be.
                self._done.clear()
            return self._rebased(entries)

    def _rebased(self, entries: Entries) -> dict[int, BlockEntry]:
        done = self._done
        return {n: rebase(entry, done[n]) if n in done else entry for n, entry in entries.items()}

    @property
    def due(self) -> bool:
        """Whether there is something to do."""
        return bool(self._queue) and not self._stopped

    def step(self) -> None:
        """Compact one block. Whatever goes wrong with it is told, and ends this cut's compaction.

        One block is in memory at a time: its chain, and what that is merged into.
        """
        with self._changed:
            if not self.due:
                return
            (number, entry), cut = self._queue.popleft(), self._cut
            store, manifest, used = self._store, self._manifest, self._used
        assert store is not None, "there is one as soon as there is a queue"
        begun, self.waited = time.monotonic(), 0.0
        try:
            if manifest is None:
                manifest = store.load_manifest(cut)
                used = in_use(store, manifest)
            found = compact_block(store, store.write_files, manifest, entry, used)
        except Stopped:
            return
        except Exception as error:
            # Also what nobody thought of: training does not end by it.
            self._failed(cut, entry, store, error)
            return
        finally:
            # It rests now, for longer than fresh memory would take.
            buffers.let_go()
        with self._changed:
            self.counts["blocks"] += 1
            self.counts["bytes"] += found.total_bytes
            self.seconds += time.monotonic() - begun - self.waited
            self.trouble = ""
            if cut == self._cut:
                self._manifest, self._used = manifest, used
            if self._store is not None and _stands_in(found, self._written[1].get(number)):
                self._done[number] = found
        logger.info(
            "event=compacted cut=%d block=%r links=%d bytes=%d left=%d",
            cut,
            entry.where,
            len(entry.links),
            found.total_bytes,
            len(self._queue),
        )

    def _failed(self, cut: int, entry: BlockEntry, store: CheckpointStore, error: Exception) -> None:
        with contextlib.suppress(Exception):
            newest = store.latest()
            if newest is not None and newest.cut != cut:
                # What it was to stand for may be collected by now, and nobody wants it any more.
                logger.info("event=compaction_outlived cut=%d block=%r error=%s", cut, entry.where, error)
                with self._changed:
                    if cut == self._cut:
                        self._queue.clear()
                return
        known = isinstance(error, PSError | OSError)
        logger.warning("event=compaction_failed cut=%d block=%r", cut, entry.where, exc_info=None if known else error)
        with self._changed:
            if self._stopped:
                return
            self.counts["failed"] += 1
            self.trouble = (
                f"the chain of {entry.where} could not be made one file, so checkpoints take longer to read: "
                f"{error or type(error).__name__}"
            )
            if cut == self._cut:
                # A disk that is full is not tried again for each block; the next cut brings all of them back.
                self._queue.clear()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Do nothing while the body runs."""
        with self._changed:
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Have ``step`` end at its next file, and do nothing from now on."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            self._changed.notify_all()

    def told(self) -> dict[str, Any]:
        """Return what was done, JSON-ready."""
        with self._changed:
            return {**self.counts, "seconds": round(self.seconds, 3), "due": len(self._queue)}

    def _pass(self) -> None:
        """Wait while a cut is being written; Stopped once the shard ends."""
        with self._changed:
            if self._writers:
                begun = time.monotonic()
                self._changed.wait_for(lambda: self._stopped or not self._writers)
                self.waited += time.monotonic() - begun
            if self._stopped:
                raise Stopped


def _stands_in(done: BlockEntry, entry: BlockEntry | None) -> bool:
    """Tell whether a compacted file can take the place of links of ``entry``."""
    whole = done.links[-1]
    return entry is not None and any(
        link.number == whole.number and link.folder != whole.folder and link.seq == whole.seq for link in entry.links
    )


class _Gentle:
    """``files``, each of whose operations waits for ``turn`` first."""

    def __init__(self, files: Files, turn: Callable[[], None]) -> None:
        self._files, self._turn = files, turn

    @property
    def root(self) -> str:
        return self._files.root

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._files, name)

        def wait_and_do(*arguments: Any, **options: Any) -> Any:
            self._turn()
            return operation(*arguments, **options)

        return wait_and_do
