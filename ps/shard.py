# SPDX-License-Identifier: Apache-2.0
"""Shard: the blocks that this process owns, and what the messages do to them.

Invariant: a group is applied to a block at most once: under the push lock, a block whose mark has reached the group is
skipped, any other is changed and then marked. A malformed push changes and marks nothing. Called from many threads.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.place import place_of
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.embedding.dense_group import DenseGroup
from oarlock.embedding.make import AnyTable, make_table
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import InvalidArgument, PSError, Unavailable
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest
from oarlock.proto.work import refuse_late
from oarlock.ps.changes import Changes
from oarlock.ps.closing import Closing
from oarlock.ps.cuts import Cuts
from oarlock.ps.does import Does, Done, Pushed, telling
from oarlock.ps.feed import Feed
from oarlock.ps.holdings import Holdings
from oarlock.ps.leading import Leading
from oarlock.ps.marks import Marks
from oarlock.ps.operations import Operation, sequences_of
from oarlock.ps.parts import along
from oarlock.ps.pulling import Pulls
from oarlock.ps.rank_marks import HybridMarks, RankMarks
from oarlock.ps.reports import Reports
from oarlock.ps.request import (
    DensePush,
    RowPush,
    read_dense,
    read_rows,
    read_step,
    refuse_parts,
    refuse_repeated,
    refuse_unpacked,
)
from oarlock.ps.staged import Staged
from oarlock.ps.staleness import Staleness
from oarlock.ps.stats import stats_of
from oarlock.ps.sweep import Sweeper

# A push takes milliseconds, an order of the coordinator may take seconds: those who sweep have other things to do meanwhile.
SWEEP_WAIT_SECONDS = 0.02

_NONE = np.empty(0, np.int32)


def _saved(request: PushRequest) -> int:
    """Return how many bytes fewer a push's gradients took than as float32."""
    came = [part.packed for part in (*request.tables, *request.dense) if part.HasField("packed")]
    return sum(4 * each.values - each.payload.shape[0] for each in came)


class Shard:
    """The job's tables and dense parameters, as far as their blocks are ``owned`` bool[blocks] here.

    ``push_lock`` covers marks, the closed set, the sequence and all changes of blocks. ``step`` is the highest step of an
    update so far, by which rows age. Cold rows are spilled into ``spill_folder`` (None: the system's temporary folder).
    """

    def __init__(self, spec: JobSpec, *, spill_folder: Path | None = None) -> None:
        self.layout = Layout(spec.tables, spec.dense)
        self.push_lock = Lock()
        self._pulls = Pulls(self)
        self.counters: Counter[str] = Counter()
        self.staleness = Staleness()
        self.closed = ClosedSet()
        # The newest placement of which nothing is missing here.
        self.generation = 0
        # Versions of rows are believed to who knew a placement from here on when it kept them.
        self.unbroken = 0
        self.step = 0
        self.warm_start = spec.warm_start
        # Whose options checkpoints on file systems of its kind are opened with.
        self.place = place_of(spec)
        self.seed = spec.seed
        self.tables = [make_table(t, seed=spec.seed, spill_folder=spill_folder) for t in spec.tables]
        # By table; pulls count under their own lock, pushes under theirs.
        self.rows_asked = [0] * len(self.tables)
        self.rows_pulled = [0] * len(self.tables)
        self.rows_pushed = [0] * len(self.tables)
        self.dense_group = DenseGroup(spec.dense, seed=spec.seed)
        self.dense = self.dense_group.parameters
        self.holdings = Holdings(self.layout.blocks)
        self.reports = Reports()
        self.leading = Leading(self.holdings, self.reports)
        self.closing = Closing(self.holdings)
        # Hears what is done to blocks that are owned here, by their numbers, in its order; None: no block has copies.
        self.told: Callable[[NDArray[np.int32], Does], None] | None = None
        self.dense_sequence: NDArray[np.int64] = np.zeros(len(self.layout.dense_blocks), np.int64)
        self.marks: Marks = Marks(self.layout.blocks)
        self.cuts = Cuts()
        # Of a job with ranks, whose marks are steps: under sync of all blocks, under hybrid of the dense ones.
        self.staged: Staged | None = None
        if spec.ranks:
            first = self.layout.dense_base if spec.mode == "hybrid" else 0
            steps = HybridMarks(self.layout.blocks, first) if first else RankMarks(self.layout.blocks)
            self.marks, self.staged = steps, Staged(self, spec.ranks, steps, first)
        self.closed_window = spec.closed_window
        epoch_groups = spec.splits * spec.groups(spec.rows_per_split)
        self.sweeper = Sweeper(self, epoch_steps=-(-epoch_groups // max(1, spec.ranks)))
        # Hears of rows that change, for processes that serve them.
        self.feed = Feed(self)
        self.changes = Changes(self)

    @property
    def owned(self) -> NDArray[np.bool_]:
        """Return bool[blocks]: those for which this shard answers."""
        return self.holdings.owned

    @property
    def sequence(self) -> NDArray[np.int64]:
        """Return int64[blocks]: how many operations changed each block. A table counts those of its own blocks."""
        out = np.zeros(self.layout.blocks, np.int64)
        for base, table in zip(self.layout.table_base, self.tables, strict=True):
            for block in table.owned.tolist():
                out[base + block] = table.version(block)
        out[self.layout.dense_base :] = self.dense_sequence
        return out

    def tell(self) -> None:
        """Tell copies from now on what is done. The push lock is held."""
        self.told = self._tell

    def hush(self) -> None:
        """Tell nobody any more, if nobody has a copy, or is to get one. The push lock is held."""
        if not self.leading.listens:
            self.told = None

    def did(self, numbers: NDArray[np.int32], does: Does) -> None:
        """Tell what was just done to blocks that are owned here. The push lock is held."""
        if self.told is not None:
            self.told(numbers, does)

    def _tell(self, numbers: NDArray[np.int32], does: Does) -> None:
        self.leading.did(Operation(numbers, sequences_of(self, numbers), does))

    def operations(self, number: int) -> int:
        """Return how many operations changed a block that is here."""
        layout = self.layout
        if number >= layout.dense_base:
            return int(self.dense_sequence[number - layout.dense_base])
        name, block = layout.name(number)
        return self.tables[layout.table_index[name]].version(block)

    def close(self) -> None:
        """Give back what is not memory, once nobody asks any more."""
        close_all(self.tables)

    def pull(self, sent: PullRequest | Bulk) -> PullReply | Bulk | Pending:
        """Answer with the rows and dense values asked for, in the forms asked for; creates nothing. A Bulk gets a Bulk.

        StalePlacement, once it is known where they are, for blocks that are elsewhere, or on their way.
        """
        return self._pulls.answer(sent)

    def push(self, sent: PushRequest | Bulk) -> PushReply | Pending:
        """Apply the group to the blocks that have not got it; say which blocks live elsewhere. Blocks of ranks are staged.

        Where blocks have copies elsewhere the answer is given once they have the group, too.
        """
        staged = self.staged
        if staged is not None and staged.all_blocks:
            return staged.push(sent)
        layout = self.layout
        request, parts = opened(sent)
        if request.rank and staged is None:
            raise InvalidArgument(f"a push of rank {request.rank - 1}, but the job's mode has no ranks")
        rank = -1 if staged is None else staged.rank_of(request.rank)
        if request.group >= 1 << 31:
            raise InvalidArgument(f"group {request.group} is over the limit of 2^31 groups in a split")
        refuse_parts(layout, len(request.tables) + len(request.dense))
        refuse_unpacked(request)
        rows = [read_rows(layout, message, parts) for message in request.tables]
        dense = [read_dense(layout, message, parts) for message in request.dense]
        split, group, step = request.split, request.group, read_step(request.step)
        numbers = np.concatenate([_NONE, *(p.keys.numbers for p in rows), *(p.numbers for p in dense)])
        of_rows = sum(len(p.keys.numbers) for p in rows)
        refuse_repeated(numbers)
        with self.push_lock:
            # Pushes before it may have taken long.
            refuse_late()
            if staged is None:
                # A rank's push after a cut's step waits for all views; one of before changes nothing.
                self.cuts.check(request.header)
            if split - self.closed.floor >= self.closed_window:
                # Nobody was leased such a split, unless word of closed ones has not come yet; it would keep marks for ever.
                raise Unavailable(
                    f"split {split} is {self.closed_window} or more above {self.closed.floor}, below which this shard knows "
                    "all splits to be closed"
                )
            here = self.owned[numbers]
            # All of the message is checked before any of it is applied.
            for part, chosen in along(here, rows):
                keys, _ = part.keys.only(chosen)
                self.tables[keys.table].check(keys.keys, keys.blocks, keys.counts, unique=True)
            todo = self._todo(split, group, numbers, here)
            if staged is not None:
                todo[of_rows:] = staged.fresh(rank, step, numbers[of_rows:], here[of_rows:])
            applied = int(todo.sum())
            reply = PushReply(moved=pack(numbers[~here]), applied=applied, skipped=int(here.sum()) - applied)
            if staged is not None:
                staged.keep(Pushed(split, group, step, (), tuple(dense), rank), todo[of_rows:])
            if (todo if staged is None else todo[:of_rows]).any():
                self.marks.open(split)
                if not self.step:
                    self.sweeper.begin(step)
                # A worker that was held up knows an old step; rows that it changes were last changed now, not then. Their age is
                # all that this count has a say in.
                self.step = max(self.step, step)
                with telling(self, split, group, step, self.step) as done:
                    for part, chosen in along(todo, rows):
                        self._push_rows(done, part.only(chosen), reply)
                    at = of_rows
                    for each in dense if staged is None else ():
                        self._push_dense(done, each, todo[at : at + len(each.numbers)], reply)
                        at += len(each.numbers)
                # A repetition changes nothing, and staleness is counted in changes.
                if request.seen:
                    self.staleness.note(self.counters["pushes"] - (request.seen - 1))
                self.counters["pushes"] += 1
                values = sum(p.gradients.size for p in rows) + sum(p.gradients.size for p in dense)
                saved = _saved(request)
                self.counters["push_bytes"] += 4 * values - saved
                self.counters["push_bytes_saved"] += saved
            return self.answered(reply, numbers, here)

    def answered(self, reply: PushReply, numbers: NDArray[np.int32], here: NDArray[np.bool_]) -> PushReply | Pending:
        """Return the answer to a push to blocks, those that are ``here`` bool[m] and others. The push lock is held."""
        answer = self.leading.answer(reply, numbers[here])
        return answer if here.all() else self.closing.keep(numbers[~here], reply, answer)

    def _todo(self, split: int, group: int, numbers: NDArray[np.int32], here: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return bool[m]: the blocks that are here and have not got the group."""
        # A late duplicate of a closed split finds no mark: the closed set is what tells that it is old.
        if split in self.closed:
            return np.zeros(len(numbers), np.bool_)
        return here & self.marks.missing(split, group, numbers)

    def _push_rows(self, to: Done, part: RowPush, reply: PushReply) -> None:
        keys = part.keys
        if not len(keys.blocks):
            return
        table = self.tables[keys.table]
        self.feed.note(keys)
        try:
            found = table.push(
                keys.keys,
                keys.blocks,
                keys.counts,
                part.gradients,
                rate=part.rate,
                step=to.step,
                tick=to.tick,
                occurrences=part.occurrences,
                clicks=part.clicks,
            )
        except PSError as error:
            # Blocks that were changed before it failed are marked, or a repetition would change them again.
            groups = error.details.get("groups", 0)
            self.marks.record(to.split, to.group, keys.numbers[:groups])
            to.note_rows(part, groups)
            raise
        self.marks.record(to.split, to.group, keys.numbers)
        to.note_rows(part)
        reply.refused += found.refused
        self.counters["rows_pushed"] += len(keys.keys)
        self.rows_pushed[keys.table] += len(keys.keys)
        self.counters["rows_refused"] += found.refused
        self.counters["rows_not_admitted"] += found.waiting

    def _push_dense(self, to: Done, part: DensePush, todo: NDArray[np.bool_], reply: PushReply) -> None:
        numbers = part.numbers[todo]
        blocks = (numbers - self.layout.dense_base).astype(np.int64)
        found = self.dense_group.push(blocks, part.starts[todo], part.gradients, rate=part.rate, step=to.step)
        self.marks.record(to.split, to.group, numbers)
        self.dense_sequence[blocks] += 1
        to.note_dense(part, todo)
        refused = int(found.sum())
        reply.refused += refused
        self.counters["dense_refused"] += refused

    def sweep_some(self) -> bool:
        """Evict what is due of one slice of one block; return whether to come again soon."""
        # Under sync a step itself does it.
        if self.sweeper.idle or not self.step or (self.staged is not None and self.staged.all_blocks):
            return False
        if not self.push_lock.acquire(timeout=SWEEP_WAIT_SECONDS):
            return True
        try:
            return self.sweeper.sweep_some(self.step)
        finally:
            self.push_lock.release()

    def next_groups(self, splits: list[int]) -> list[int]:
        """Return per split 1 + the highest group that any block here has applied, 0 if none."""
        with self.push_lock:
            return [self.marks.highest(s) + 1 for s in splits]

    def close_splits(self, closed: ClosedSet) -> None:
        """Skip all later pushes of these splits and forget their marks."""
        with self.push_lock:
            self.closed.merge(closed)
            self.marks.drop_closed(self.closed)

    def stats(self) -> dict[str, Any]:
        """Return what this shard holds and has done."""
        return stats_of(self)


def close_all(tables: Iterable[AnyTable]) -> None:
    """Give back what tables have besides memory."""
    for table in tables:
        table.close()
