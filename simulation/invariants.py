# SPDX-License-Identifier: Apache-2.0
"""What must hold after every event, and what must have come of it at the end. Names are those of docs/consistency.md.

Invariant: what was applied is read off the *values* (each batch has keys and dense elements of its own, see counting.py),
never off marks, which are what is tested. Checks look only; they change nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import unpack_changes
from oarlock.cluster.coordinator import Coordinator
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.coordinator_pb2 import TRAIN
from oarlock.proto.errors import PSError
from oarlock.ps.shard import Shard
from oarlock.simulation.counting import LOSS, batches_of, trace_keys
from oarlock.simulation.data import KEYS, Data
from oarlock.simulation.state import Committed


class Violation(Exception):
    """An invariant does not hold."""


def require(holds: Any, name: str, what: str) -> None:
    if not holds:
        raise Violation(f"{name}: {what}")


class Checker:
    """Knows the job and what was seen so far."""

    def __init__(self, spec: JobSpec, data: Data, committed: Committed) -> None:
        self._spec = spec
        self._data = data
        self._committed = committed
        self._trace = spec.config["trace"]
        self._total = spec.dense[1].size
        self._per_split = self._total // (spec.splits * spec.epochs)
        keys = trace_keys(self._trace, self._total)
        # Per split: its keys grouped by block of the tracing table.
        self._keys = [
            np.ascontiguousarray(keys[s : s + self._per_split].T) for s in range(0, self._total, self._per_split)
        ]
        self._blocks = np.arange(self._trace, dtype=np.int32)
        self._base = spec.tables[0].blocks
        self._layout = Layout(spec.tables, spec.dense)
        self._dense_trace = self._layout.dense_base + 1
        # Groups that a block has of a split, by (split, block).
        self._have: dict[int, dict[int, int]] = {}
        # Splits that each shard knew as closed.
        self._closed_at: dict[int, set[int]] = {}
        # Which split of the plan stands where differs by epoch; with files cut evenly all have equally many batches.
        assert set(batches_of(spec)) == {self._per_split}, "the simulation's files make splits of equal size"
        self._groups = -(-self._per_split // spec.accumulate)
        # Blocks that say which batches were; and what the first dense value comes to.
        self._traced = self._trace + 1
        self._counted: float = self._total

    # Shards

    def pushed(self, shard: Shard, split: int) -> None:
        """After a push of ``split`` was handled by ``shard``, whatever came of it."""
        if split < len(self._keys):
            self._check_split(shard, split)

    def pulled(self, shard: int, silent: float) -> None:
        """After a shard answered a pull, ``silent`` seconds after it sent the last heartbeat that was answered."""
        if silent > self._spec.lease_seconds:
            raise Violation(f"K4: shard {shard} answered a pull {silent:.3f} s after its lease was last renewed")

    def told_closed(self, shard: Shard) -> None:
        """After a shard heard which splits are closed."""
        now = {split for split in range(len(self._keys)) if split in shard.closed}
        before = self._closed_at.get(id(shard), set())
        require(before <= now, "M1", f"a shard forgot that splits {sorted(before - now)} are closed")
        self._closed_at[id(shard)] = now
        closed = self._closed()
        for split in range(shard.closed.floor):
            require(split in closed, "K1", f"a shard knows split {split} as closed, which is not on disk")
        for split in shard.closed:
            require(split in closed, "K1", f"a shard knows split {split} as closed, which is not on disk")
        for split in range(len(self._keys)):
            if split in shard.closed:
                self._check_split(shard, split)

    def _check_split(self, shard: Shard, split: int) -> None:
        have, closed = self._have.setdefault(split, {}), split in shard.closed
        marks = shard.marks.of_split(split)
        for block, values in self._values(shard, split):
            if not ((values == 0) | (values == 1)).all():
                raise Violation(f"M1: block {block} has the batches of split {split} {values.tolist()} times")
            groups = values[:: self._spec.accumulate]
            if not np.array_equal(np.repeat(groups, self._spec.accumulate)[: len(values)], values):
                raise Violation(
                    f"M1: block {block} has parts of groups: the batches of split {split} {values.tolist()} times"
                )
            count = int(groups.sum())
            # Ones and then zeros: none before its predecessor.
            if groups[count:].any():
                raise Violation(f"M3: block {block} has the groups of split {split} {groups.tolist()} times")
            if closed:
                if count != self._groups:
                    raise Violation(f"M1: split {split} is closed, and block {block} has {count} groups of it")
            elif count - 1 != (-1 if marks is None else int(marks[block])):
                raise Violation(f"M1: block {block} has {count} groups of split {split}, and its mark says otherwise")
            have[block] = count
        # Group n + 1 is sent after every block has n, so no two blocks are further apart than one group.
        if len(have) == self._traced and max(have.values()) - min(have.values()) > 1:
            raise Violation(f"M3: blocks have {have} groups of split {split}")

    def _values(self, shard: Shard, split: int) -> list[tuple[int, NDArray[np.float32]]]:
        """Return (block, float32[batches of the split]: how often each one was applied) of the blocks that are here."""
        out = self._row_values(shard, split)
        if shard.owned[self._dense_trace]:
            dense = np.empty(self._total, np.float32)
            shard.dense[1].pull_block(0, dense)
            out.append((self._dense_trace, dense[split * self._per_split : (split + 1) * self._per_split]))
        return out

    def _row_values(self, shard: Shard, split: int) -> list[tuple[int, NDArray[np.float32]]]:
        """As _values, of the rows."""
        here = shard.owned[self._base : self._base + self._trace]
        out: list[tuple[int, NDArray[np.float32]]] = []
        if here.any():
            blocks = self._blocks[here]
            counts = np.full(len(blocks), self._per_split, np.int32)
            rows = np.empty((len(blocks) * self._per_split, 1), np.float32)
            shard.tables[1].pull(self._keys[split][here].reshape(-1), blocks, counts, rows)
            out.extend(zip((self._base + blocks).tolist(), rows.reshape(len(blocks), -1), strict=True))
        return out

    def handled(self, shard: Shard, method: str, request: Any, reply: Any) -> None:
        """After a shard handled a message, whatever came of it."""

    def gone(self, shard: Shard) -> None:
        """A shard died, or was struck off: what it has counts no more."""

    def went_back(self) -> None:
        """The job goes on from a cut."""
        self._have.clear()

    def cuts(self, folder: Path) -> Any:
        """Return what looks at the cuts in ``folder`` in place of cuts.py, None if there is nothing."""
        return None

    # Coordinator: record, then tell

    def judged(self, member: str, silent: float) -> None:
        """When a lease is judged ended after ``silent`` seconds in which the coordinator could have heard the member."""
        if silent < self._spec.lease_seconds - 1e-6:
            raise Violation(f"K3: {member} was judged after {silent:.3f} s of silence")

    def _closed(self) -> ClosedSet:
        found = self._committed.facts.get("closed", {"floor": 0, "above": []})
        return ClosedSet(found["floor"], found["above"])

    def answered(self, method: str, request: Any, reply: Any) -> None:
        """After the coordinator answered a message."""
        if isinstance(reply, PSError) or reply is None:
            return
        facts = self._committed.facts
        if method == "Coordinator.Join":
            require(reply.incarnation in self._committed.members, "K1", "an incarnation was told that is not on disk")
            require(
                reply.term == facts.get("term"), "K1", f"term {reply.term} was told, {facts.get('term')} is on disk"
            )
            require(reply.run == facts.get("run", 1), "K1", f"run {reply.run} was told, which is not on disk")
            self._placed(reply.placement)
        elif method == "Coordinator.Placement":
            self._placed(reply)
        elif method == "Coordinator.CloseSplit" and request.work == TRAIN:
            require(
                request.split in self._closed(), "K1", f"split {request.split} was acknowledged as closed, not on disk"
            )
        elif method == "Coordinator.CloseSplit":
            over = request.split // self._spec.evaluation_splits in self._committed.epochs
            known = over or request.split in self._committed.evaluations
            require(known, "K1", f"the sums of evaluation split {request.split} were acknowledged and are not on disk")

    def _placed(self, placement: Any) -> None:
        if not placement.generation:
            return
        told = unpack_changes(self._layout, placement)
        for block, generation, owner in zip(
            told.blocks.tolist(), told.generations.tolist(), told.owners.tolist(), strict=True
        ):
            known = self._committed.records.get((block, generation))
            require(known == owner, "K1", f"block {block} of generation {generation} was told, which is not on disk")

    # The end

    def finish(self, coordinator: Coordinator, shards: list[Shard]) -> None:
        """After the last event of a job that is done: the counting table against the files (SEMANTICS section 11)."""
        spec, data = self._spec, self._data
        counts, batches = np.zeros(KEYS, np.int64), 0.0
        found = KeySorter().build(np.arange(KEYS, dtype=np.uint64), table_salt("key"), 3, np.arange(8, dtype=np.int32))
        ends = np.cumsum(found.counts)
        for block, first, last in zip(found.blocks.tolist(), ends - found.counts, ends, strict=True):
            for shard in (s for s in shards if s.owned[block]):
                rows = np.empty((last - first, 1), np.float32)
                one = (np.array([block], np.int32), np.array([last - first], np.int32))
                shard.tables[0].pull(found.keys[first:last], *one, rows)
                counts[found.keys[first:last].astype(np.int64)] += rows[:, 0].astype(np.int64)
        for shard in shards:
            if shard.owned[self._dense_trace - 1]:
                value = np.empty(1, np.float32)
                shard.dense[0].pull_block(0, value)
                batches += float(value[0])
        expected = data.occurrences() * spec.epochs
        lost, doubled = np.maximum(expected - counts, 0).sum(), np.maximum(counts - expected, 0).sum()
        require(not lost and not doubled, "M1", f"the counting table: {lost} occurrences lost, {doubled} counted twice")
        require(batches == self._counted, "M1", f"{batches:g} batches were counted, there are {self._counted:g}")
        for split in range(len(self._keys)):
            for shard in shards:
                for block, values in self._values(shard, split):
                    require(values.all(), "M1", f"block {block} lacks batches of split {split}: {values}")
        steps, groups = coordinator.work.steps, self._groups * len(self._keys)
        require(steps == groups, "E1", f"{steps} groups were reported trained, there are {groups}")
        history = coordinator.work.history
        require(len(history) == spec.epochs, "E1", f"{len(history)} epochs ended of {spec.epochs}")
        for epoch, result in enumerate(history):
            rows_of_epoch = len(data.values["train"])
            require(
                result.samples == rows_of_epoch,
                "E1",
                f"epoch {epoch} counted {result.samples} of {rows_of_epoch} samples",
            )
            require(abs(result.loss - LOSS) < 1e-9, "E1", f"epoch {epoch} has the mean loss {result.loss}")
            wanted, measured = data.expected_metric(epoch), result.metrics[spec.metrics[0]]
            require(
                measured is not None and abs(measured - wanted) < 1e-9,
                "E1",
                f"epoch {epoch} was evaluated as {measured}, the files say {wanted}",
            )
