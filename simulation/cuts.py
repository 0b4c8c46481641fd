# SPDX-License-Identifier: Apache-2.0
"""Cuts, read back from their files as soon as they are committed: each group is in all blocks or in none (SEMANTICS C1, C2).

Invariant: what a cut holds is read off its values (each batch has keys and dense elements of its own, see counting.py), of all
blocks, whatever chain of files they are in, and never off its marks, which are checked against that. Only one group of a worker
that is gone, opened its gate by itself, or ends since a shard refused its push for good, may be in some blocks and not in others.
"""

from pathlib import Path

import numpy as np

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.proto.coordinator_pb2 import TRAIN, LeaseReply, LeaseRequest
from oarlock.proto.errors import PSError
from oarlock.proto.shard_pb2 import PushReply, PushRequest
from oarlock.simulation.counting import LOSS, batches_of, trace_keys
from oarlock.simulation.faults import TRAIN_ROWS
from oarlock.simulation.invariants import require


class Cuts:
    """The cuts of one job in ``folder``; ``committed``: how many there were; ``compacted``: blocks in them that begin with a
    file of compaction."""

    # Whether dense values tell groups apart, too.
    _traces_dense = True

    def __init__(self, spec: JobSpec, folder: Path) -> None:
        self._spec = spec
        self._store = LocalStore(folder)
        self.committed = self.compacted = 0
        # Who was ever leased a split.
        self._holders: dict[int, set[int]] = {}
        # The newest gate at which a worker said to stand, and splits of which it pushed something new by an older number since.
        self._stood: dict[int, int] = {}
        self._alone: dict[int, int] = {}
        # Whose pushes of a split were refused for good.
        self._refused: dict[int, set[int]] = {}
        self._trace = spec.config["trace"]
        self._total = spec.dense[1].size
        self._per_split = self._total // (spec.splits * spec.epochs)
        keys = trace_keys(self._trace, self._total)
        # uint64[splits, blocks, batches of a split], and the order in which a block's file has them.
        self._keys = keys.reshape(-1, self._per_split, self._trace).transpose(0, 2, 1)
        assert set(batches_of(spec)) == {self._per_split}, "the simulation's files make splits of equal size"
        self._groups = -(-self._per_split // spec.accumulate)

    def watch(self, c: Coordinator) -> None:
        """Look at every cut that this coordinator commits."""
        commit = c.cuts.commit

        def committed(manifest: Manifest, path: str) -> None:
            commit(manifest, path)
            self.committed += 1
            self.compacted += compacted_blocks(manifest)
            self._check(c, self._store.load_manifest(manifest.cut))

        c.cuts.commit = committed  # type: ignore[method-assign]

    def went_back(self, c: Coordinator, cut: int) -> None:
        """The job goes on from a cut. Splits of which it has whole groups are as if nobody had had them."""
        counts, _ = self._read(self._store.load_manifest(cut))
        for split in list(self._holders):
            if counts[split].max() == counts[split].min():
                del self._holders[split]

    def leased(self, request: LeaseRequest, reply: LeaseReply | PSError) -> None:
        if not isinstance(reply, PSError) and reply.work == TRAIN:
            for split in reply.splits:
                self._holders.setdefault(split, set()).add(request.header.sender)

    def stood(self, worker: int, cut: int) -> None:
        self._stood[worker] = max(cut, self._stood.get(worker, 0))

    def pushed(self, request: PushRequest, reply: PushReply | PSError) -> None:
        """After a shard handled a push: a worker that stood at a gate and did not hear of its opening has opened it itself.

        One whose push was refused for good ends, and stands at a gate until it has: nothing of it is under way any more.
        """
        if isinstance(reply, PSError) and not reply.retryable:
            self._refused.setdefault(request.split, set()).add(request.header.sender)
        cut = self._stood.get(request.header.sender, 0)
        if request.header.cut < cut and not isinstance(reply, PSError) and reply.applied:
            self._alone[request.split] = cut

    def _check(self, c: Coordinator, manifest: Manifest) -> None:
        name = f"cut {manifest.cut}"
        require((manifest.job, manifest.run) == (c.spec.job, c.run), "C2", f"{name} is of another history")
        closed = ClosedSet(manifest.closed.floor, manifest.closed.above)
        counts, marks = self._read(manifest)
        for split in range(len(self._keys)):
            have = counts[split]
            if split in closed:
                require(
                    (have == self._groups).all(), "C1", f"{name}: split {split} is closed, blocks have {have} groups"
                )
                # A block that did not change since the cut before it stands as that wrote it.
                told = {of[split] for of in marks if split in of}
                require(told <= {self._groups - 1}, "C2", f"{name}: split {split} is closed, with marks {told}")
                continue
            had = [of.get(split, -1) + 1 for of in marks]
            require(have.tolist() == had, "C2", f"{name}: blocks have {have} groups of split {split}, marks say {had}")
            spread = int(have.max() - have.min())
            require(spread <= 1, "M3", f"{name}: blocks have {have} groups of split {split}")
            require(
                not spread or self._left(c, split) or self._alone.get(split) == manifest.cut,
                "C1",
                f"{name}: blocks have {have} groups of split {split}: torn",
            )
        self._check_counted(manifest, closed)

    def _left(self, c: Coordinator, split: int) -> bool:
        """Whether a worker that had the split is gone, or about to be, or it went from one to another."""
        alive = {m.incarnation for m in c.members.alive("worker")} - self._refused.get(split, set())
        holders = self._holders.get(split, set())
        return len(holders) > 1 or not holders <= alive

    def _read(self, manifest: Manifest) -> tuple[np.ndarray, list[dict[int, int]]]:  # type: ignore[type-arg]
        """Return groups int64[splits, blocks] that the tracing blocks have, the dense one last; and their marks."""
        images = {(e.kind, e.name, e.block): self._store.load_block(manifest, e) for e in manifest.blocks}
        traced = [images["rows", "trace", block] for block in range(self._trace)]
        dense = [images["dense", "applied", 0]] if self._traces_dense else []
        applied = np.empty((len(self._keys), self._trace + len(dense), self._per_split), np.float32)
        for block, image in enumerate(traced):
            at = np.searchsorted(image.keys, self._keys[:, block])
            at = np.minimum(at, max(0, len(image.keys) - 1))
            there = image.keys[at] == self._keys[:, block] if len(image.keys) else np.zeros(at.shape, np.bool_)
            applied[:, block] = np.where(there, image.weights[at, 0], 0) if len(image.keys) else 0
        for image in dense:
            applied[:, -1] = image.weights[0].reshape(len(self._keys), self._per_split)
        require(((applied == 0) | (applied == 1)).all(), "M1", f"cut {manifest.cut}: a batch is in a block twice")
        groups = applied[:, :, :: self._spec.accumulate].astype(np.int64)
        counts = groups.sum(axis=2)
        expected = np.arange(groups.shape[2]) < counts[:, :, None]
        require((groups == expected).all(), "M3", f"cut {manifest.cut}: a group is there and not the one before it")
        return counts, [dict(image.marks) for image in (*traced, *dense)]

    def _check_counted(self, manifest: Manifest, closed: ClosedSet) -> None:
        """What the manifest counts is what its closed splits are."""
        spec, name = self._spec, f"cut {manifest.cut}"
        done = closed.floor + len(closed.above)
        require(manifest.step == done * self._groups, "C2", f"{name}: {manifest.step} steps, {done} splits are closed")
        history, counted = manifest.metrics["history"], manifest.metrics["counted"]
        samples = sum(r["samples"] for r in history) + counted["samples"]
        if done % spec.splits == 0:
            whole = done // spec.splits * TRAIN_ROWS
            require(samples == whole, "C2", f"{name}: {samples} samples are counted, closed splits have {whole}")
        loss = counted["loss_sum"] - LOSS * counted["samples"]
        require(abs(loss) < 1e-6, "C2", f"{name}: the loss is not that of what is counted: {loss}")


def compacted_blocks(manifest: Manifest) -> int:
    """Return how many blocks of a cut begin with a file that compaction wrote."""
    return sum(entry.links[0].folder.startswith("compact-") for entry in manifest.blocks)
