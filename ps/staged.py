# SPDX-License-Identifier: Apache-2.0
"""Ranks on a shard: parts of a step are staged, and applied once every rank has committed it (SEMANTICS section 5).

    which blocks              under sync all; under hybrid the dense ones, while rows are applied as they come (ps/shard.py)
    copies                    are told what was staged, and of steps, and do the same at their owner's word alone: they may be at
                              another step than what is owned here. What was staged of a copy is there when it is promoted
    push of (step, rank)      its part of each block is kept, unless it is there already or the block is past the step
    pull for step t + 1       the rank's commit of step t, with the number of its samples; its parts of t are staged everywhere
    all ranks have committed  per key the parts are added up in ascending rank, divided by the samples of all ranks, and given to
                              the table as one update; the same for dense blocks; then the blocks are at step t

Invariant: no block applies a step before every part of it is staged everywhere (S1), since a rank commits only after that; a
block applies each step once, and what it applies depends on the parts alone, not on the order in which they came, nor on which
other blocks are here. An update that fails in the middle leaves the blocks that had it at the step, and the parts of the
others staged. The shard's push lock covers all of it; called from many threads.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import Internal, InvalidArgument, Malformed, PSError, Unavailable
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest, RankCommits
from oarlock.proto.work import refuse_late
from oarlock.ps.does import Pushed, Stepped
from oarlock.ps.hold import Hold
from oarlock.ps.parts import StagedParts, along, copied, lengths_in, only
from oarlock.ps.rank_marks import RankMarks
from oarlock.ps.request import (
    STEP_LIMIT,
    DensePush,
    read_dense,
    read_rows,
    read_step,
    refuse_parts,
    refuse_repeated,
    refuse_unpacked,
)

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# float32 holds the samples of a step exactly.
MAX_SAMPLES = 1 << 24
_NONE = np.empty(0, np.int32)


class Staged:
    """The parts and commits of ``ranks`` ranks for the blocks of ``shard`` from number ``first`` on.

    ``marks`` says at which step each of them is.
    """

    def __init__(self, shard: "Shard", ranks: int, marks: RankMarks, first: int = 0) -> None:
        self._shard = shard
        # Blocks of the job from this number on are staged.
        self.first = first
        self._layout = shard.layout
        self._marks = marks
        self.ranks = ranks
        # The last commit of each rank, and how many samples it trained at that step.
        self.commits: NDArray[np.int64] = np.zeros(ranks, np.int64)
        self.samples: NDArray[np.int64] = np.zeros(ranks, np.int64)
        self._parts = StagedParts(shard.layout, ranks)
        self._hold = Hold()

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that are staged."""
        return self._parts.nbytes

    @property
    def steps(self) -> NDArray[np.int64]:
        """Return int64[blocks of the job]: the step that each of them here is at."""
        return self._marks.steps

    @property
    def all_blocks(self) -> bool:
        """Whether every block is staged, and none changed by a push."""
        return not self.first

    def _blocks(self) -> NDArray[np.int64]:
        """Return the numbers of the blocks here that are staged."""
        return np.flatnonzero(self._shard.owned[self.first :]) + self.first

    def range(self) -> tuple[int, int]:
        """Return the least and the most of the steps that the staged blocks here are at.

        Without any, under hybrid, the step that all ranks have committed here; 0 if there is nothing here at all.
        """
        steps = self._marks.steps[self._blocks()]
        if len(steps):
            return int(steps.min()), int(steps.max())
        least = int(self.commits.min()) if self.first and self._shard.owned.any() else 0
        return least, least

    def rank_of(self, told: int) -> int:
        """Return the rank that a message says, counted from 1 there."""
        if not 1 <= told <= self.ranks:
            mode = "sync" if self.all_blocks else "hybrid"
            raise InvalidArgument(f"rank {told - 1}: this job is {mode} and has {self.ranks} ranks, from 0 on")
        return told - 1

    # Pushes

    def push(self, sent: PushRequest | Bulk) -> PushReply | Pending:
        """Stage a rank's part of a step; say which blocks live elsewhere. The copies have it before that is answered."""
        layout, shard = self._layout, self._shard
        request, parts = opened(sent)
        rank, step = self.rank_of(request.rank), read_step(request.step)
        refuse_parts(layout, len(request.tables) + len(request.dense))
        refuse_unpacked(request)
        rows = [read_rows(layout, message, parts) for message in request.tables]
        dense = [read_dense(layout, message, parts) for message in request.dense]
        numbers = np.concatenate([_NONE, *(p.keys.numbers for p in rows), *(p.numbers for p in dense)])
        refuse_repeated(numbers)
        with shard.push_lock:
            refuse_late()
            here = shard.owned[numbers]
            fresh = self.fresh(rank, step, numbers, here)
            for part, chosen in along(here, rows):
                keys, _ = part.keys.only(chosen)
                shard.tables[keys.table].check(keys.keys, keys.blocks, keys.counts, unique=True)
            # Nothing above has changed anything: a message is staged whole, or not at all.
            self.keep(Pushed(request.split, request.group, step, tuple(rows), tuple(dense), rank), fresh)
            staged = int(fresh.sum())
            reply = PushReply(moved=pack(numbers[~here]), applied=staged, skipped=int(here.sum()) - staged)
            # Its rank commits the step by that: a copy that becomes the owner must not make it without these parts.
            return shard.answered(reply, numbers, here)

    def fresh(self, rank: int, step: int, numbers: NDArray[np.int32], here: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return bool[m]: of which blocks the part of a step is new. Unavailable if it came before the step before it."""
        steps = self._marks.steps[numbers]
        fresh: NDArray[np.bool_] = here & (steps < step) & ~self._parts.have[rank, numbers]
        # Its sender saw every block at the step before; whoever has this one now has it from there. Under hybrid rows wait, too:
        # what comes after a cut's step must not come before its view. A shard that came without such blocks knows no commits
        # before each rank's next pull.
        waits = self.first and (len(self._blocks()) or self._hold.cut) and self.range()[0] + 1 < step
        if (steps[fresh] + 1 < step).any() or waits:
            raise Unavailable(f"a part of step {step} came before every block here is at step {step - 1}")
        return fresh

    def keep(self, pushed: Pushed, fresh: NDArray[np.bool_]) -> None:
        """Stage what a rank pushed to those of its blocks that ``fresh`` says. The push lock is held."""
        kept = self._stage(pushed, fresh)
        self._shard.counters["parts_staged"] += int(fresh.sum())
        if self._shard.told is not None and fresh.any():
            self._shard.did(kept.numbers, kept)

    def _stage(self, pushed: Pushed, fresh: NDArray[np.bool_]) -> Pushed:
        """Stage what is pushed to some of its blocks; return just that, which outlives its message."""
        rows = tuple(copied(p.only(some)) for p, some in along(fresh, list(pushed.rows)) if some.any())
        dense, at = list[DensePush](), sum(len(p.keys.numbers) for p in pushed.rows)
        for part in pushed.dense:
            some = fresh[at : at + len(part.numbers)]
            at += len(some)
            if some.any():
                dense.append(only(part, some, lengths_in(part)))
        self._parts.add(pushed.rank, rows, dense)
        return replace(pushed, rows=rows, dense=tuple(dense))

    # Copies

    def take(self, pushed: Pushed) -> None:
        """Stage parts of copies as their owner did. The push lock is held.

        Internal, and nothing is changed, unless they are of the next step of each, and new.
        """
        numbers = pushed.numbers
        if pushed.rank >= self.ranks or numbers.min(initial=self.first) < self.first:
            raise Malformed(f"parts of rank {pushed.rank}, of {self.ranks}, for blocks that are not staged")
        wrong = (self._marks.steps[numbers] + 1 != pushed.step) | self._parts.have[pushed.rank, numbers]
        if wrong.any():
            block = int(numbers[wrong][0])
            raise Internal(
                f"block {block}: a part of step {pushed.step} of rank {pushed.rank}, but the copy is at step "
                f"{self._marks.steps[block]}, or has it: copy the block anew",
                block=block,
            )
        self._stage(pushed, np.ones(len(numbers), np.bool_))

    def has(self, rank: int, numbers: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return bool[m]: of which blocks the rank's part of their next step is staged; of no rank of this job none is."""
        if rank >= self.ranks:
            return np.zeros(len(numbers), np.bool_)
        found: NDArray[np.bool_] = self._parts.have[rank, numbers]
        return found

    def of_block(self, number: int) -> tuple[Pushed, ...]:
        """Return what is staged of a block. The push lock is held."""
        step = int(self._marks.steps[number]) + 1
        return tuple(Pushed(0, 0, step, *of, rank=rank) for rank, of in self._parts.of_block(number).items())

    def drop(self, number: int) -> None:
        """Forget what is staged of a block, which goes or is replaced. The push lock is held."""
        if self._parts.have[:, number].any():
            self._parts.forget(np.arange(self._layout.blocks) == number)

    # Commits

    def answer(self, request: PullRequest) -> PullReply | None:
        """Take in a rank's pull as its commit; return the answer if there are no rows for it now, None if it gets them."""
        rank = self.rank_of(request.rank)
        if request.state >= STEP_LIMIT or request.samples > MAX_SAMPLES:
            raise InvalidArgument(
                f"rank {rank} commits step {request.state} with {request.samples} samples: give at most {MAX_SAMPLES} of them"
            )
        with self._shard.push_lock:
            refuse_late()
            # Its sender has heard that the gate of that cut was opened again: this shard did not.
            self.let_go(request.header.cut)
            if self._hold.takes_in(request.state):
                self._commit(rank, request.state, request.samples)
                self._advance()
            elif request.state > self.commits[rank]:
                return self._waits()
            return self._waits() if self._hold.keeps_back(request.state) else self._without_rows(request.state)

    def after(self, request: PullRequest, reply: PullReply) -> PullReply | None:
        """Say with which step's rows a rank is answered; return another answer if it was passed while they were gathered."""
        with self._shard.push_lock:
            reply.lowest, reply.highest = self._reported()
            reply.generation = self._shard.generation
            return self._waits() if self._hold.keeps_back(request.state) else self._without_rows(request.state)

    def _reported(self) -> tuple[int, int]:
        """As ``range``, with blocks that are closed for a hand-over: they are this shard's until a record says otherwise."""
        steps = self._marks.steps[np.flatnonzero(self._shard.holdings.leads[self.first :]) + self.first]
        return (int(steps.min()), int(steps.max())) if len(steps) else self.range()

    def _waits(self) -> PullReply:
        lowest, highest = self._reported()
        return PullReply(waits=True, lowest=lowest, highest=highest, generation=self._shard.generation)

    def _without_rows(self, state: int) -> PullReply | None:
        lowest, highest = self._reported()
        if self._shard.holdings.lacks:
            return self._waits()
        # Under hybrid who leads no dense block keeps nobody: a rank that has ended commits no more to a shard that came since.
        if lowest == highest == state or not self._shard.holdings.leads[self.first :].any():
            # Not before the copies have made the step: one that becomes the owner would be behind who has its rows.
            everywhere = self._shard.leading.everywhere(self._blocks())
            return None if everywhere else self._waits()
        return PullReply(waits=lowest < state, lowest=lowest, highest=highest, generation=self._shard.generation)

    def _commit(self, rank: int, step: int, samples: int) -> None:
        if step > self.commits[rank]:
            self.commits[rank], self.samples[rank] = step, samples
        elif step == self.commits[rank] and samples and not self.samples[rank]:
            self.samples[rank] = samples
        elif step == self.commits[rank] and samples not in (0, self.samples[rank]) and step > self.range()[0]:
            # Of a step that all blocks are past nobody needs to know it any more, and who begins an epoch after it says 0.
            raise Malformed(
                f"rank {rank} committed step {step} with {self.samples[rank]} samples, and again with {samples}: the recipe's "
                "batches are not the same when they are made again"
            )

    def told(self) -> RankCommits:
        """Return the last commit of each rank."""
        return RankCommits(steps=pack(self.commits.astype(np.uint64)), samples=pack(self.samples.astype(np.uint64)))

    def hold(self, cut: int) -> None:
        """Take in no commits of ranks from now on, for cut ``cut`` (0: none). The push lock is held."""
        if cut > self._shard.cuts.number:
            self._hold.begin(cut)

    def let_go(self, cut: int) -> None:
        """Take in commits again, if they wait for no later cut. The push lock is held."""
        self._hold.end(cut)

    def level(self, cut: int, message: RankCommits, at: int = 0) -> bool:
        """Take in what other shards know of commits; return whether the view may begin. The push lock is held.

        Under sync all shards are at one step by that, and go on: they know the same commits until their views have begun, none
        that came since they were asked. Under hybrid they go on to step ``at`` and stay there.
        """
        if cut != self._hold.cut:
            raise InvalidArgument(f"this shard does not hold still for cut {cut}: it was given up", cut=cut)
        steps, samples = (unpack(m, np.uint64, "commits of ranks") for m in (message.steps, message.samples))
        if len(steps) != self.ranks or len(samples) != self.ranks:
            raise Malformed(f"commits of {len(steps)} and {len(samples)} ranks, this job has {self.ranks}")
        if max(int(steps.max()), int(samples.max())) >= STEP_LIMIT:
            raise Malformed(f"commits of a step or of samples beyond {STEP_LIMIT}")
        for rank, (step, count) in enumerate(zip(steps.tolist(), samples.tolist(), strict=True)):
            self._commit(rank, step, count)
        self._advance()
        if self.all_blocks:
            self._hold.end(cut)
            return True
        self._hold.limit = at
        lowest, highest = self.range()
        if highest > at:
            raise InvalidArgument(f"this shard is at step {highest}, past step {at} of cut {cut}", cut=cut)
        # One that has nothing begins a view of nothing.
        return lowest == at or not self._shard.owned.any()

    # The update

    def _advance(self) -> None:
        """Apply the next step if every rank has committed it."""
        step = self.range()[0] + 1
        if not self._shard.owned[self.first :].any() or int(self.commits.min()) < step:
            return
        if int(self.commits.max()) > step:
            raise Internal(f"a rank has committed step {int(self.commits.max())}, and a block here is at {step - 1}")
        self._apply(step)

    def _apply(self, step: int) -> None:
        """Apply a step to the blocks that are owned here and not at it; tell their copies which it was applied to."""
        shard, steps = self._shard, self._marks.steps
        mine = self._blocks()
        numbers, samples = mine[steps[mine] < step].astype(np.int32), int(self.samples.sum())
        try:
            self.apply(numbers, step, samples, counted=True)
        finally:
            done = numbers[steps[numbers] == step]
            if shard.told is not None and len(done):
                shard.did(done, Stepped(step, samples))
        shard.counters["pushes"] += 1

    def apply(self, numbers: NDArray[np.int32], step: int, samples: int, *, counted: bool = False) -> None:
        """Apply a step to blocks int32[m] that are at the one before it; ``samples``: of all ranks. The push lock is held.

        If that fails in the middle, each block is either at the step or as it was. Only what an owner does is ``counted``.
        """
        shard, steps = self._shard, self._marks.steps
        going = np.zeros(self._layout.blocks, np.bool_)
        going[numbers] = True
        total = np.float32(samples)
        try:
            if self.all_blocks:
                shard.step = max(shard.step, step)
                for table in range(len(shard.tables)):
                    self._apply_rows(table, step, total, going, counted)
            self._apply_dense(step, total, going, counted)
            # Also those that got no part of it.
            steps[numbers] = step
        finally:
            going[numbers] = steps[numbers] == step
            self._parts.forget(going)
            if self.all_blocks:
                shard.sweeper.sweep_at(step, going)

    def _apply_rows(self, number: int, step: int, total: np.float32, going: NDArray[np.bool_], counted: bool) -> None:
        """Add up all ranks' parts of some blocks of a table and apply them."""
        shard, steps = self._shard, self._marks.steps
        update = self._parts.sum_rows(number, going, total)
        if update is None:
            return
        keys = update.keys
        shard.feed.note(keys)
        try:
            done = shard.tables[number].push(
                keys.keys,
                keys.blocks,
                keys.counts,
                update.gradients,
                rate=update.rate,
                step=step,
                occurrences=update.occurrences,
                clicks=update.clicks,
            )
        except PSError as error:
            steps[keys.numbers[: error.details.get("groups", 0)]] = step
            raise
        steps[keys.numbers] = step
        if counted:
            shard.counters["rows_pushed"] += len(keys.keys)
            shard.rows_pushed[number] += len(keys.keys)
            shard.counters["rows_refused"] += done.refused
            shard.counters["rows_not_admitted"] += done.waiting

    def _apply_dense(self, step: int, total: np.float32, going: NDArray[np.bool_], counted: bool) -> None:
        """Add up all ranks' parts of some dense blocks and apply them."""
        shard = self._shard
        update = self._parts.sum_dense(going, total)
        if update is None:
            return
        blocks = (update.numbers - self._layout.dense_base).astype(np.int64)
        refused = shard.dense_group.push(blocks, update.starts, update.gradients, rate=update.rate, step=step)
        self._marks.steps[update.numbers] = step
        shard.dense_sequence[blocks] += 1
        if counted:
            shard.counters["dense_refused"] += int(refused.sum())
