# SPDX-License-Identifier: Apache-2.0
"""What must hold after every event of a hybrid job: rows as in every mode that leases splits, dense values as in sync.

    M1, M3  of rows, read off the tracing table, as invariants.py says
    S1      a dense block goes to step t only when every part of step t is staged at its owner, and when the rows of every group
            up to step t are in all blocks; by one step at a time. Rows of step t + 1 come when all dense blocks are at step t
    S2      what a rank sends of a step to a dense block is the same, whoever sends it: no row enters it here
    S3      what a dense block holds after step t, and what a rank's pull is answered with, is what plain numpy has (mixed.py)
    C1      a committed cut is of one step t: dense values of the course there, rows of all groups up to it and of no later one;
            if no worker was alive when it was made, some of step t + 1, too

Invariant: what was staged is read off messages, what was applied off the values. Checks look only; they change nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from oarlock.checkpoint.manifest import Manifest
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.cluster.coordinator import Coordinator
from oarlock.data.files import files_from_json
from oarlock.data.splits import plan_splits
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import PSError
from oarlock.ps.rank_marks import STEP_MARK, HybridMarks
from oarlock.ps.shard import Shard
from oarlock.simulation.counting import COLUMNS
from oarlock.simulation.cuts import Cuts
from oarlock.simulation.data import Data
from oarlock.simulation.invariants import Checker, require
from oarlock.simulation.mixed import DenseCourse
from oarlock.simulation.state import Committed


class MixedChecker(Checker):
    """Knows the dense course of a job, and what was seen of it so far."""

    def __init__(self, spec: JobSpec, data: Data, committed: Committed) -> None:
        super().__init__(spec, data, committed)
        self._layout = Layout(spec.tables, spec.dense)
        plan = plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)
        self.course = course = DenseCourse(spec, [data.reader.read(split, COLUMNS) for split in plan])
        self._traced, self._counted = self._trace, course.total
        self.step_of = {
            (unit[0], unit[2]): step
            for step, units in enumerate(course.of_steps, 1)
            for unit in units
            if unit is not None
        }
        self._dense_blocks = set(range(self._layout.dense_base, self._layout.blocks))
        self._shards: dict[int, Shard] = {}
        # Those that are gone, and blocks whose next owner may lack the last step of the one before.
        self._gone: set[int] = set()
        self._behind: set[int] = set()
        # By (step, rank): dense blocks whose owner has its part; by (step, rank, block): what came first.
        self._staged: dict[tuple[int, int], set[int]] = {}
        self._sent: dict[tuple[int, int, int], bytes] = {}
        self._at: dict[int, tuple[int, int]] = {}

    def _values(self, shard: Shard, split: int) -> Any:
        return self._row_values(shard, split)

    def pushed(self, shard: Shard, split: int) -> None:
        super().pushed(shard, split)
        if split not in {s for s, _ in self.step_of}:
            return
        for block, values in self._row_values(shard, split):
            groups = int(values[:: self._spec.accumulate].sum())
            step = self.step_of[split, groups - 1] if groups else 0
            lowest = min((at for at, _ in self._at.values()), default=0)
            require(
                step <= lowest + 1,
                "S1",
                f"block {block} has rows of step {step}, and a dense block is at step {lowest}",
            )

    def handled(self, shard: Shard, method: str, request: Any, reply: Any) -> None:
        """After a shard handled a message, whatever came of it."""
        if id(shard) in self._gone:
            return
        self._shards[id(shard)] = shard
        failed = isinstance(reply, PSError)
        if method == "Shard.Push" and not failed:
            self._staged_by(request, reply)
        self._look(shard, adopted=method == "Shard.Adopt")
        if method == "Shard.Pull" and not failed and request.rank and not reply.waits:
            self._answered(request, reply)

    def gone(self, shard: Shard) -> None:
        super().gone(shard)
        self._shards.pop(id(shard), None)
        self._gone.add(id(shard))
        self._behind |= self._dense_blocks & set(np.flatnonzero(shard.owned).tolist())

    def _staged_by(self, request: Any, reply: Any) -> None:
        step, rank = request.step + 1, request.rank - 1
        moved = set(unpack(reply.moved, np.int32, "moved").tolist())
        for part in request.dense:
            numbers = unpack(part.blocks, np.int32, "blocks")
            values, at = unpack(part.gradients, np.float32, "dense gradients"), 0
            for block, size in zip(numbers.tolist(), self._layout.lengths_of(numbers).tolist(), strict=True):
                data = values[at : at + size].tobytes()
                at += size
                known = self._sent.setdefault((step, rank, block), data)
                require(known == data, "S2", f"rank {rank} sent dense block {block} two different parts of step {step}")
                if block not in moved:
                    self._staged.setdefault((step, rank), set()).add(block)

    def _look(self, shard: Shard, *, adopted: bool = False) -> None:
        """Compare the dense blocks of a shard that may have changed; some may have come out of a checkpoint."""
        marks = shard.marks
        assert isinstance(marks, HybridMarks)
        for block in sorted(self._dense_blocks & set(np.flatnonzero(shard.owned).tolist())):
            now = int(marks.steps[block]), shard.operations(block)
            before = self._at.get(block, (0, 0))
            if now == before:
                continue
            self._at[block] = now
            step = now[0]
            if block in self._behind:
                require(step - before[0] in (-1, 0, 1), "S1", f"block {block} went from step {before[0]} to {step}")
                self._behind.discard(block)
            elif not adopted:
                require(step - before[0] in (0, 1), "S1", f"block {block} went from step {before[0]} to {step} at once")
                if step > before[0]:
                    self._check_step(block, step)
            place = self._layout.dense_blocks[block - self._layout.dense_base]
            self.check_dense(block, step, shard.dense[place.parameter].export_block(place.block).weights)

    def _check_step(self, block: int, step: int) -> None:
        """Check that a block may go to a step: all that it needs is where it has to be."""
        units = self.course.of_steps[step - 1] if step <= self.course.total else []
        for rank, unit in enumerate(units):
            if unit is None:
                continue
            lacking = self._dense_blocks - self._staged.get((step, rank), set())
            require(
                not lacking, "S1", f"block {block} is at step {step}; blocks {lacking} lack the part of rank {rank}"
            )
            split, _, group = unit
            for shard in self._shards.values():
                for other, values in self._row_values(shard, split):
                    groups = int(values[:: self._spec.accumulate].sum())
                    require(
                        groups > group,
                        "S1",
                        f"dense block {block} is at step {step}; block {other} has {groups} groups of split {split}",
                    )

    def check_dense(self, block: int, step: int, values: Any) -> None:
        """Compare a dense block with the course."""
        require(step <= self.course.total, "S3", f"block {block} is at step {step} of {self.course.total}")
        place = self._layout.dense_blocks[block - self._layout.dense_base]
        right = self.course.values[step][place.offset : place.offset + place.length]
        same = np.asarray(values, np.float32).reshape(-1).tobytes() == right.tobytes()
        require(same, "S3", f"block {block} is at step {step}, and does not hold what the course has there")

    def _answered(self, request: Any, reply: Any) -> None:
        numbers = unpack(request.dense, np.int32, "blocks")
        values, at = unpack(reply.dense, np.float32, "dense values"), 0
        for block, size in zip(numbers.tolist(), self._layout.lengths_of(numbers).tolist(), strict=True):
            if reply.highest <= request.state:
                self.check_dense(block, request.state, values[at : at + size])
            at += size

    def finish(self, coordinator: Coordinator, shards: list[Shard]) -> None:
        """After the last event of a job that is done."""
        super().finish(coordinator, shards)
        steps = {at for at, _ in self._at.values()}
        require(steps == {self.course.total}, "S3", f"the job is over, and dense blocks are at steps {steps}")

    def went_back(self) -> None:
        """The job goes on from a cut: shards and what was staged there are gone; what ranks send of a step stays the same."""
        super().went_back()
        self._shards.clear()
        self._staged.clear()
        self._at.clear()
        self._behind.clear()

    def cuts(self, folder: Path) -> "MixedCuts":
        return MixedCuts(self, self._spec, folder)


class MixedCuts(Cuts):
    """The cuts of one hybrid job in ``folder``."""

    _traces_dense = False

    def __init__(self, checker: MixedChecker, spec: JobSpec, folder: Path) -> None:
        super().__init__(spec, folder)
        self._checker = checker
        self._layout = Layout(spec.tables, spec.dense)
        # Cuts that were made while no worker was alive, which could have ended its step.
        self._alone_at: set[int] = set()

    def watch(self, c: Coordinator) -> None:
        super().watch(c)
        opened = c.cuts.open

        def open_() -> None:
            if c.cuts.deserted:
                self._alone_at.add(c.cuts.last)
            opened()

        c.cuts.open = open_  # type: ignore[method-assign]

    def went_back(self, c: Coordinator, cut: int) -> None:
        """Which step a group is of says all that there is to say of it."""

    def stood(self, worker: int, cut: int) -> None:
        """Nobody has to stand at a gate."""

    def pushed(self, request: Any, reply: Any) -> None:
        """Which step a push is of says whether it is in a cut."""

    def _check(self, c: Coordinator, manifest: Manifest) -> None:
        name, checker = f"cut {manifest.cut}", self._checker
        require((manifest.job, manifest.run) == (c.spec.job, c.run), "C2", f"{name} is of another history")
        step = self._step_of(manifest)
        counts, marks = self._read(manifest)
        closed = ClosedSet(manifest.closed.floor, manifest.closed.above)
        for (split, group), at in checker.step_of.items():
            have, done = counts[split], split in closed
            if at <= step:
                require(
                    (have > group).all(), "C1", f"{name} is of step {step}; blocks have {have} groups of split {split}"
                )
            elif at > step + 1 or manifest.cut not in self._alone_at:
                require(
                    (have <= group).all(), "C1", f"{name} is of step {step}; blocks have {have} groups of split {split}"
                )
            if group == self._groups - 1:
                require(done or at >= step, "C1", f"{name} is of step {step} and has split {split} open")
                require(not done or at <= step, "C1", f"{name} is of step {step} and has split {split} closed")
            if done:
                continue
            had = [of.get(split, -1) + 1 for of in marks]
            require(have.tolist() == had, "C2", f"{name}: blocks have {have} groups of split {split}, marks say {had}")
        self._check_counted(manifest, closed)

    def _step_of(self, manifest: Manifest) -> int:
        """Return the step of a cut's dense blocks, after comparing them with the course."""
        steps = set()
        for entry in (e for e in manifest.blocks if e.kind == "dense"):
            image = self._store.load_block(manifest, entry)
            (step,) = image.marks.values()
            require(list(image.marks) == [STEP_MARK], "C2", f"cut {manifest.cut}: {entry.name} has marks {image.marks}")
            number = self._number(entry.name, entry.block)
            self._checker.check_dense(number, step, image.weights)
            steps.add(step)
        require(len(steps) == 1, "C1", f"cut {manifest.cut} has dense blocks at steps {sorted(steps)}")
        return int(steps.pop())

    def _number(self, name: str, block: int) -> int:
        names = [spec.name for spec in self._layout.dense]
        blocks = self._layout.dense_blocks
        place = next(i for i, b in enumerate(blocks) if names[b.parameter] == name and b.block == block)
        return self._layout.dense_base + place
