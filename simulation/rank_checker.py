# SPDX-License-Identifier: Apache-2.0
"""What must hold after every event of a sync job (SEMANTICS section 5), against the course that plain numpy takes (ranked.py).

    S1    a block goes to step t only when every part of step t is staged at its owner, and by one step at a time
    S2    what a rank sends of a step to a block is the same, whoever sends it and however often
    S3    what a block holds after step t, and the rows that a pull is answered with, are those of the course after step t
    C1    a committed cut is of one step, and its blocks hold what the course has there

Invariant: what was staged is read off messages, what was applied off the values. Checks look only; they change nothing.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.cluster.coordinator import Coordinator
from oarlock.data.files import files_from_json
from oarlock.data.splits import plan_splits
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import PSError
from oarlock.ps.rank_marks import RankMarks
from oarlock.ps.shard import Shard
from oarlock.simulation.counting import COLUMNS
from oarlock.simulation.cuts import compacted_blocks
from oarlock.simulation.data import Data
from oarlock.simulation.invariants import Checker, require
from oarlock.simulation.ranked import TABLES, Course, Part, Values
from oarlock.simulation.state import Committed

Rows = dict[int, tuple[list[int], list[int]]]


class RankChecker(Checker):
    """Knows the course of a job, and what was seen of it so far."""

    def __init__(self, spec: JobSpec, data: Data, committed: Committed) -> None:
        self._spec = spec
        self._data = data
        self._committed = committed
        self._layout = Layout(spec.tables, spec.dense)
        self._closed_at: dict[int, set[int]] = {}
        # Of the base class, which follows splits by it.
        self._keys = [np.empty(0, np.uint64)] * (spec.splits * spec.epochs)
        plan = plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)
        self.course = course = Course(spec, [data.reader.read(split, COLUMNS) for split in plan])
        # After each step: rows by block, as bits, and dense values; and the blocks that each rank's part is for.
        self._rows: list[dict[int, Rows]] = [self._snapshot()]
        self._dense: list[Values] = [course.state.dense]
        self._weights: list[dict[str, dict[int, Values]]] = [self._of_keys()]
        self._wanted: list[list[set[int]]] = [[]]
        while course.steps < course.total:
            parts = course.step()
            self._wanted.append([self._blocks_of_part(part) for part in parts])
            self._rows.append(self._snapshot())
            self._dense.append(course.state.dense)
            self._weights.append(self._of_keys())
        # The last step of each split.
        self._ends = {u[0]: s for s, of in enumerate(course.of_steps, 1) for u in of if u is not None}
        # By (step, rank): blocks whose owner has its part; by (step, rank, block): what came first.
        self._staged: dict[tuple[int, int], set[int]] = {}
        self._sent: dict[tuple[int, int, int], bytes] = {}
        self._at: dict[tuple[int, int], tuple[int, int]] = {}

    def _of_keys(self) -> dict[str, dict[int, Values]]:
        state = self.course.state
        return {"key": {key: weights for key, (weights, _) in state.key.items()}, "wide": dict(state.wide)}

    def _block(self, number: int, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        spec, out = TABLES[number], np.empty(len(keys), np.int32)
        blocks_of(keys, table_salt(spec.name), spec.blocks.bit_length() - 1, out)
        return out + np.int32(self._layout.table_base[number])

    def _snapshot(self) -> dict[int, Rows]:
        """Return the rows of each block, which has any, by key: the bits of weights and state."""
        state, out = self.course.state, dict[int, Rows]()
        tables: tuple[dict[int, Any], ...] = (state.key, state.wide)
        for number, rows in enumerate(tables):
            keys = np.array(sorted(rows), np.uint64)
            for key, block in zip(keys.tolist(), self._block(number, keys).tolist(), strict=True):
                weights, columns = rows[key] if number == 0 else (rows[key], np.empty(0, np.float32))
                out.setdefault(block, {})[key] = _bits(weights), _bits(columns)
        return out

    def _blocks_of_part(self, part: Part | None) -> set[int]:
        if part is None:
            return set()
        out = {self._layout.dense_base}
        for number, spec in enumerate(TABLES):
            keys = np.array(sorted(part[1].get(spec.name, {})), np.uint64)
            out |= set(self._block(number, keys).tolist())
        return out

    # Shards

    def _check_split(self, shard: Shard, split: int) -> None:
        """A split has no marks."""

    def handled(self, shard: Shard, method: str, request: Any, reply: Any) -> None:
        """After a shard handled a message, whatever came of it."""
        if method == "Shard.Push" and not isinstance(reply, PSError):
            self._pushed(request, reply)
        self._look(shard, adopted=method == "Shard.Adopt")
        if method == "Shard.Pull" and not isinstance(reply, PSError) and not reply.waits:
            self._answered(shard, request, reply)

    def _pushed(self, request: Any, reply: Any) -> None:
        step, rank = request.step + 1, request.rank - 1
        moved = set(unpack(reply.moved, np.int32, "moved").tolist())
        have = self._staged.setdefault((step, rank), set())
        for block, data in _of_blocks(self._layout, request):
            known = self._sent.setdefault((step, rank, block), data)
            require(known == data, "S2", f"rank {rank} sent block {block} two different parts of step {step}")
            if block not in moved:
                have.add(block)

    def _look(self, shard: Shard, *, adopted: bool = False) -> None:
        """Compare those blocks of a shard that may have changed with the course; some may have come out of a checkpoint."""
        marks = shard.marks
        assert isinstance(marks, RankMarks)
        for block in np.flatnonzero(shard.owned).tolist():
            now = int(marks.steps[block]), shard.operations(block)
            before = self._at.get((id(shard), block), (0, 0))
            if now == before:
                continue
            self._at[id(shard), block] = now
            step = now[0]
            if adopted:
                before = now
            require(
                step - before[0] in (0, 1),
                "S1",
                f"block {block} went from step {before[0]} to step {step} in one event",
            )
            if step > before[0]:
                for rank, wanted in enumerate(self._wanted[step] if step < len(self._wanted) else []):
                    lacking = wanted - self._staged.get((step, rank), set())
                    require(
                        not lacking,
                        "S1",
                        f"block {block} applied step {step}, and the part of rank {rank} for blocks {sorted(lacking)} is nowhere",
                    )
            self._check_block(block, step, self._content(shard, block))

    def _content(self, shard: Shard, block: int) -> Any:
        if block >= self._layout.dense_base:
            return shard.dense[0].export_block(0).weights
        name, local = self._layout.name(block)
        rows = shard.tables[self._layout.table_index[name]].export_block(local)
        return _rows(rows.keys, rows.weights, rows.state)

    def _check_block(self, block: int, step: int, content: Any) -> None:
        require(step <= self.course.total, "S3", f"block {block} is at step {step} of {self.course.total}")
        if block >= self._layout.dense_base:
            same = _bits(content) == _bits(self._dense[step])
        else:
            same = content == self._rows[step].get(block, {})
        require(same, "S3", f"block {block} is at step {step}, and does not hold what the course has there")

    def _answered(self, shard: Shard, request: Any, reply: Any) -> None:
        """Compare the rows of an answer with the course."""
        if not reply.rows:
            return
        marks = shard.marks
        assert isinstance(marks, RankMarks)
        step = int(marks.steps[shard.owned].max())
        if request.rank and (reply.lowest, reply.highest) != (request.state, request.state):
            return
        if request.rank:
            require(step == request.state, "S3", f"a rank asked for step {request.state} and got rows of step {step}")
        elif step != int(marks.steps[shard.owned].min()):
            return
        for keys, rows in zip(request.tables, reply.rows, strict=True):
            spec = TABLES[keys.table]
            found = unpack(rows, np.float32, "rows", dims=2)
            known, none = self._weights[step][spec.name], np.zeros(spec.dim, np.float32)
            for key, row in zip(unpack(keys.keys, np.uint64, "keys").tolist(), found, strict=True):
                same = _bits(row) == _bits(known.get(key, none))
                require(same, "S3", f"key {key} of {spec.name} was answered otherwise than it is after step {step}")

    # The end

    def finish(self, coordinator: Coordinator, shards: list[Shard]) -> None:
        """After the last event of a job that is done."""
        spec, total = self._spec, self.course.total
        for shard in shards:
            # Some are its own by a record that was made just before the end, and that it has not heard of.
            self._look(shard, adopted=True)
            marks = shard.marks
            assert isinstance(marks, RankMarks)
            steps = set(marks.steps[shard.owned].tolist())
            require(steps <= {total}, "S3", f"the job is over, and blocks are at steps {steps} of {total}")
        work, rows = coordinator.work, self._data.values["train"]
        groups = sum(unit is not None for step in self.course.of_steps for unit in step)
        require(work.steps == groups, "E1", f"{work.steps} groups were reported trained, there are {groups}")
        require(len(work.history) == spec.epochs, "E1", f"{len(work.history)} epochs ended of {spec.epochs}")
        for epoch, result in enumerate(work.history):
            require(result.samples == len(rows), "E1", f"epoch {epoch} counted {result.samples} of {len(rows)} samples")
            known = self._weights[self.course.before[epoch + 1]]["key"]
            none = np.zeros(TABLES[0].dim, np.float32)
            wanted = np.mean([float(known.get(int(a), none)[0]) for a in self._data.values["test"][:, 0]])
            measured = result.metrics[spec.metrics[0]]
            right = measured is not None and abs(measured - wanted) < 1e-9
            require(right, "E1", f"epoch {epoch} was evaluated as {measured}, the course says {wanted}")

    def went_back(self) -> None:
        """The job goes on from a cut: what was staged is gone with the shards that had it; what it says stays the same."""
        self._staged.clear()

    def cuts(self, folder: Path) -> "RankCuts":
        return RankCuts(self, folder)

    def check_cut(self, manifest: Manifest, images: list[BlockImage]) -> None:
        """Compare a committed cut with the course."""
        cut, closed = manifest.cut, manifest.closed
        steps = {step for image in images for step in image.marks.values()}
        require(len(steps) == 1, "C1", f"cut {cut} has blocks at steps {sorted(steps)}")
        (step,) = steps
        for image in images:
            self._check_block(self._number(image), step, _of_image(image))
        for split, ended in self._ends.items():
            known = split < closed.floor or split in closed.above
            require(known or ended >= step, "C1", f"cut {cut} is of step {step} and has split {split} open")
            require(not known or ended <= step, "C1", f"cut {cut} is of step {step} and has split {split} closed")

    def _number(self, image: BlockImage) -> int:
        if image.kind == "dense":
            return self._layout.dense_base
        return self._layout.table_base[self._layout.table_index[image.name]] + image.block


class RankCuts:
    """The cuts of one job in ``folder``: as in cuts.py."""

    def __init__(self, checker: RankChecker, folder: Path) -> None:
        self._checker = checker
        self._store = LocalStore(folder)
        self.committed = self.compacted = 0

    def watch(self, c: Coordinator) -> None:
        """Look at every cut that this coordinator commits."""
        commit = c.cuts.commit

        def committed(manifest: Manifest, path: str) -> None:
            commit(manifest, path)
            self.committed += 1
            self.compacted += compacted_blocks(manifest)
            read = self._store.load_manifest(manifest.cut)
            self._checker.check_cut(read, [self._store.load_block(read, entry) for entry in read.blocks])

        c.cuts.commit = committed  # type: ignore[method-assign]

    def went_back(self, c: Coordinator, cut: int) -> None:
        """The job goes on from a cut, which nobody may have heard of."""
        read = self._store.load_manifest(cut)
        self._checker.check_cut(read, [self._store.load_block(read, entry) for entry in read.blocks])

    def leased(self, request: Any, reply: Any) -> None:
        """Ranks are leased, and not splits."""

    def stood(self, worker: int, cut: int) -> None:
        """Nobody has to stand at a gate."""

    def pushed(self, request: Any, reply: Any) -> None:
        """Nothing is changed by a push."""


def _of_image(image: BlockImage) -> Any:
    return image.weights[0] if image.kind == "dense" else _rows(image.keys, image.weights, image.state)


def _rows(keys: NDArray[np.uint64], weights: Values, state: Values) -> Rows:
    return {k: (_bits(w), _bits(s)) for k, w, s in zip(keys.tolist(), weights, state, strict=True)}


def _bits(values: Values) -> list[int]:
    out: list[int] = np.ascontiguousarray(values).view(np.uint32).reshape(-1).tolist()
    return out


def _of_blocks(layout: Layout, request: Any) -> list[tuple[int, bytes]]:
    """Return of each block of a push what it says of it."""
    out = []
    for part in request.tables:
        keys = unpack(part.keys.keys, np.uint64, "keys")
        gradients = unpack(part.gradients, np.float32, "gradients", dims=2)
        numbers = layout.table_base[part.keys.table] + unpack(part.keys.blocks, np.int32, "blocks")
        at = 0
        for block, count in zip(numbers.tolist(), unpack(part.keys.counts, np.int32, "counts").tolist(), strict=True):
            run = slice(at, at + count)
            at += count
            order = np.argsort(keys[run])
            data = keys[run][order].tobytes() + gradients[run][order].tobytes() + repr(part.rate).encode()
            out.append((block, hashlib.sha256(data).digest()))
    for each in request.dense:
        values = unpack(each.gradients, np.float32, "dense gradients")
        out.append((layout.dense_base, hashlib.sha256(values.tobytes() + repr(each.rate).encode()).digest()))
    return out
