# SPDX-License-Identifier: Apache-2.0
"""Shard: the blocks that this process owns, and what the messages do to them.

Invariant: a group is applied to a block at most once: under the push lock, a block whose mark has reached the group is
skipped, any other is changed and then marked. A malformed push changes and marks nothing. Called from many threads.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.place import place_of
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.packed import encode_dense, encode_rows, packed
from oarlock.embedding.dense_group import DenseGroup
from oarlock.embedding.descriptor import PENDING_KEYS, SPILLED_ROWS
from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import AnyTable, make_table
from oarlock.embedding.newer import Newer
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, pack
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import InvalidArgument, OutOfMemory, PSError, StalePlacement, Unavailable
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest
from oarlock.proto.work import expects, refuse_late
from oarlock.ps.cuts import Cuts
from oarlock.ps.does import Does, Done, Pushed, telling
from oarlock.ps.marks import Marks
from oarlock.ps.parts import along
from oarlock.ps.rank_marks import HybridMarks, RankMarks
from oarlock.ps.request import (
    DensePush,
    Keys,
    RowPush,
    read_codecs,
    read_dense,
    read_dense_codec,
    read_dense_numbers,
    read_kept,
    read_keys,
    read_rows,
    read_step,
    refuse_parts,
    refuse_repeated,
    refuse_unpacked,
)
from oarlock.ps.staged import Staged
from oarlock.ps.staleness import Staleness
from oarlock.ps.sweep import Sweeper

# A push takes milliseconds, an order of the coordinator may take seconds: those who sweep have other things to do meanwhile.
SWEEP_WAIT_SECONDS = 0.02
# Rows of answers whose memory is kept for the next ones, of at most 16 MiB each (proto/buffers.py).
MOST_ANSWERS = 8

_NONE = np.empty(0, np.int32)
_NO_VERSIONS = np.empty(0, np.uint32)

# What policies did, by table: keys that wait for a row, rows in the spill file, rows that were expanded, and since the shard
# began rows evicted and gradients refused.
_TOLD: dict[str, Callable[[AnyTable], int]] = {
    "waiting": lambda table: int(table.descriptors[:, PENDING_KEYS].sum()),
    "spilled": lambda table: int(table.descriptors[:, SPILLED_ROWS].sum()),
    "expanded": lambda table: table.expanded if isinstance(table, ExpandingTable) else 0,
    "evicted": lambda table: table.evicted,
    "refused": lambda table: table.refused,
}


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
        self._counting = Lock()
        self._answers = Buffers(MOST_ANSWERS)
        self.counters: Counter[str] = Counter()
        self.staleness = Staleness()
        self.closed = ClosedSet()
        self.generation = 0
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
        self.owned: NDArray[np.bool_] = np.zeros(self.layout.blocks, np.bool_)
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
        # Hears what is done to blocks that are owned here, by their numbers, in its order; None: no block has copies.
        self.told: Callable[[NDArray[np.int32], Does], None] | None = None
        self.sweeper = Sweeper(self, epoch_steps=-(-epoch_groups // max(1, spec.ranks)))

    @property
    def sequence(self) -> NDArray[np.int64]:
        """Return int64[blocks]: how many operations changed each block. A table counts those of its own blocks."""
        out = np.zeros(self.layout.blocks, np.int64)
        for base, table in zip(self.layout.table_base, self.tables, strict=True):
            for block in table.owned.tolist():
                out[base + block] = table.version(block)
        out[self.layout.dense_base :] = self.dense_sequence
        return out

    def operations(self, number: int) -> int:
        """Return how many operations changed a block that is here."""
        layout = self.layout
        if number >= layout.dense_base:
            return int(self.dense_sequence[number - layout.dense_base])
        name, block = layout.name(number)
        return self.tables[layout.table_index[name]].version(block)

    def close(self) -> None:
        """Give back what is not memory, once nobody asks any more."""
        for table in self.tables:
            table.close()

    def pull(self, sent: PullRequest | Bulk) -> PullReply | Bulk:
        """Answer with the rows and dense values asked for, in the forms asked for; creates nothing. A Bulk gets a Bulk."""
        layout = self.layout
        request, parts = opened(sent)
        beside: list[Part] | None = [] if isinstance(sent, Bulk) else None
        reply = PullReply(pushes=self.counters["pushes"])
        refuse_parts(layout, len(request.tables))
        asked = [read_keys(layout, message, parts) for message in request.tables]
        kept = [read_kept(layout, m, keys, parts) for m, keys in zip(request.tables, asked, strict=True)]
        numbers = read_dense_numbers(layout, request.dense, parts)
        forms = read_codecs(layout, request)
        dense_form = read_dense_codec(request.dense_codec) if request.HasField("dense_codec") else None
        # Known before any of it is allocated: a small request may ask for an enormous answer.
        dense_values = int(layout.lengths_of(numbers).sum())
        values = dense_values + sum(len(keys.keys) * layout.tables[keys.table].dim for keys in asked)
        # A row of a cache comes with its position and version.
        values += 2 * sum(len(versions) for versions in kept if versions is not None)
        if values * 4 > MAX_MESSAGE_BYTES:
            raise OutOfMemory(
                f"the rows asked for are {values * 4} bytes, over the limit of {MAX_MESSAGE_BYTES} bytes in one message: "
                "ask for fewer at once"
            )
        if request.rank:
            if self.staged is None:
                raise InvalidArgument(f"a pull of rank {request.rank - 1}, but the job's mode has no ranks")
            without = self.staged.answer(request)
            if without is not None:
                return without if beside is None else Bulk(without, beside)
        # Encoded rows lie beside those that they were made of.
        expects(values * (4 if forms is None else 8))
        # A block may have been elsewhere between two placements, where it did not take along what is said of evicted rows.
        believed = request.header.generation == self.generation
        found = [
            self._rows(keys, versions if believed or versions is None else np.zeros_like(versions), message.bound)
            for keys, versions, message in zip(asked, kept, request.tables, strict=True)
        ]
        travelled = 0
        for i, newer in enumerate(found):
            if forms is None:
                reply.rows.append(pack(newer.rows, beside))
                travelled += newer.rows.nbytes
            else:
                encoded = encode_rows(forms[i], newer.rows)
                reply.packed.append(packed(forms[i], encoded, newer.rows.size, beside))
                travelled += reply.packed[i].payload.shape[0]
        if any(versions is not None for versions in kept):
            reply.positions.extend(pack(newer.positions, beside) for newer in found)
            reply.versions.extend(pack(newer.versions, beside) for newer in found)
        self._owns(numbers)
        dense = self._answers.array((dense_values,), np.float32)
        self.dense_group.pull((numbers - layout.dense_base).astype(np.int64), dense)
        if dense_form is None:
            reply.dense.CopyFrom(pack(dense, beside))
            travelled += dense.nbytes
        else:
            encoded = encode_dense(dense_form, dense, layout.lengths_of(numbers).tolist())
            reply.packed_dense.CopyFrom(packed(dense_form, encoded, dense.size, beside))
            travelled += reply.packed_dense.payload.shape[0]
        with self._counting:
            self.counters["pull_bytes"] += travelled
            self.counters["pull_bytes_saved"] += sum(newer.rows.nbytes for newer in found) + dense.nbytes - travelled
            self.counters["pulls"] += 1
            for keys, newer in zip(asked, found, strict=True):
                self.counters["rows_pulled"] += len(newer.rows)
                self.rows_pulled[keys.table] += len(newer.rows)
                self.rows_asked[keys.table] += len(keys.keys)
        if request.rank and self.staged is not None and (passed := self.staged.after(request, reply)) is not None:
            return passed if beside is None else Bulk(passed, [])
        return reply if beside is None else Bulk(reply, beside)

    def _rows(self, keys: Keys, kept: NDArray[np.uint32] | None, bound: int) -> Newer:
        """Return the rows of ``keys``: those that who keeps these versions must get, or all (None), without versions."""
        self._owns(keys.numbers)
        table = self.tables[keys.table]
        table.check(keys.keys, keys.blocks, keys.counts)
        if kept is not None:
            return table.pull_newer(keys.keys, keys.blocks, keys.counts, kept, bound=bound)
        rows = self._answers.array((len(keys.keys), table.spec.dim), np.float32)
        table.pull(keys.keys, keys.blocks, keys.counts, rows)
        return Newer(_NONE, rows, _NO_VERSIONS)

    def _owns(self, numbers: NDArray[np.int32]) -> None:
        elsewhere = numbers[~self.owned[numbers]]
        if len(elsewhere):
            raise StalePlacement(
                f"block {int(elsewhere[0])} is not on this shard: fetch the placement", block=int(elsewhere[0])
            )

    def push(self, sent: PushRequest | Bulk) -> PushReply:
        """Apply the group to the blocks that have not got it; say which blocks live elsewhere. Blocks of ranks are staged."""
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
                self.step = max(self.step, step)
                with telling(self, split, group, step) as done:
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
        return reply

    def _todo(self, split: int, group: int, numbers: NDArray[np.int32], here: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return bool[m]: the blocks that are here and have not got the group."""
        # A late duplicate of a closed split finds no mark: the closed set is what tells that it is old.
        if split in self.closed:
            return np.zeros(len(numbers), np.bool_)
        return here & self.marks.missing(split, group, numbers)

    def did(self, numbers: NDArray[np.int32], does: Does) -> None:
        """Tell what was just done to blocks that are owned here. The push lock is held."""
        if self.told is not None:
            self.told(numbers, does)

    def _push_rows(self, to: Done, part: RowPush, reply: PushReply) -> None:
        keys = part.keys
        if not len(keys.blocks):
            return
        table = self.tables[keys.table]
        try:
            found = table.push(
                keys.keys,
                keys.blocks,
                keys.counts,
                part.gradients,
                rate=part.rate,
                step=to.step,
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
        return {
            **dict(self.counters),
            "staleness": self.staleness.summary(),
            "rows": sum(t.rows for t in self.tables),
            "bytes": sum(t.nbytes for t in self.tables) + sum(d.nbytes for d in self.dense),
            "marks_bytes": self.marks.nbytes,
            **({"staged_bytes": self.staged.nbytes} if self.staged is not None else {}),
            "blocks": int(self.owned.sum()),
            "sweeps": self.sweeper.slices,
            "tables": {t.spec.name: t.rows for t in self.tables},
            "table_bytes": {t.spec.name: t.nbytes for t in self.tables},
            # Of most tables there is nothing to say here.
            **{what: found for what in _TOLD if (found := self._told(what))},
        }

    def _told(self, what: str) -> dict[str, int]:
        return {t.spec.name: n for t in self.tables if (n := _TOLD[what](t))}
