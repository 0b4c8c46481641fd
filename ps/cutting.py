# SPDX-License-Identifier: Apache-2.0
"""Cutting: a shard's part in a cut (SEMANTICS section 7): its view begins, is written or digested, and is let go.

Invariant: marks, closed set and view are noted under one hold of the push lock. A view is read by one thread at a time, and who
comes meanwhile is sent away: in a store that hangs it may be for good, and each that waited would keep a thread. One for each run
of the job; called from many threads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from oarlock.checkpoint.entry import BlockEntry
from oarlock.proto.errors import Unavailable
from oarlock.proto.shard_pb2 import RankCommits
from oarlock.ps.replace import Replacing
from oarlock.ps.shard import Shard
from oarlock.ps.view import View, Views


class Cutting:
    """Cuts of ``shard``, whose ``views`` they begin; of ``replacing`` they drop what was read before."""

    def __init__(self, shard: Shard, views: Views, replacing: Replacing) -> None:
        self._shard = shard
        self._views = views
        self._replacing = replacing
        # The cut whose view is being read, by one thread; 0: none.
        self._reading, self._read = Lock(), 0

    @property
    def writing(self) -> dict[str, int] | None:
        """How far the cut is that is being written, None if none is."""
        return self._views.writing

    def begin(self, cut: int, workers: Sequence[int], committed: int, commits: RankCommits, *, at: int) -> None:
        """Begin a view, unless that was done; Unavailable if the blocks here are not yet at step ``at`` of a sync job."""
        shard = self._shard
        with shard.push_lock:
            if shard.cuts.is_new(cut):
                staged = shard.staged
                if staged is not None and not staged.level(cut, commits, at):
                    raise Unavailable(
                        f"the blocks here are at step {staged.range()[0]}, the cut is of step {at}", not_yet=True
                    )
                shard.cuts.begin(cut, workers)
                self._views.begin(cut, committed)
                # A cut comes before a table goes back, or after it.
                self._replacing.forget()

    def abort(self, cut: int) -> None:
        """Let go what is kept for a cut that came to nothing."""
        shard = self._shard
        with shard.push_lock:
            if shard.staged is not None:
                shard.staged.let_go(cut)
            if shard.cuts.give_up(cut):
                self._views.let_go()

    def let_go(self) -> None:
        """Let go what is kept for any cut: the run is over."""
        with self._shard.push_lock:
            self._views.let_go()

    def write(self, cut: int, root: str, *, alone: bool) -> list[BlockEntry] | None:
        """Write a cut's view to the checkpoints at ``root``; return its entries, None if it is torn."""
        view = self._begun(cut)
        if view is None:
            return None
        with self._alone(view):
            return self._views.write(view, root, alone=alone)

    def digest(self, cut: int) -> tuple[int, int] | None:
        """Return a cut's digest and how many rows it has, None if its view is torn."""
        view = self._begun(cut)
        if view is None:
            return None
        with self._alone(view):
            if view.digested is None:
                view.digested = view.digest()
            return view.digested

    def _begun(self, cut: int) -> View | None:
        """Take note that the views of all shards have begun; return this shard's, None if that is torn."""
        shard = self._shard
        with shard.push_lock:
            view = self._views.of(cut)
            if view.torn is None:
                view.torn = shard.cuts.torn
            if shard.staged is not None:
                # What the cut says of its job is taken.
                shard.staged.let_go(cut)
        return None if view.torn else view

    @contextmanager
    def _alone(self, view: View) -> Iterator[None]:
        """Have a view be read by nobody else; Unavailable while another one is, or this one."""
        with self._reading:
            busy, self._read = self._read, self._read or view.number
        if busy:
            raise Unavailable(
                f"cut {busy} is still under way here: if that lasts, see whether its store answers",
                cut=busy,
                not_yet=True,
            )
        try:
            yield
        finally:
            self._read = 0
