# SPDX-License-Identifier: Apache-2.0
"""Bugs of cuts, planted on purpose: at the gate, in the numbers of pushes, in views, in files, in what a manifest says."""

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.closed import ClosedSet
from oarlock.client.gate import Gate
from oarlock.cluster import cutting, recovery
from oarlock.cluster.cuts import Cuts
from oarlock.cluster.cutting import Cutting
from oarlock.cluster.gate import Gate as GateOfJob
from oarlock.cluster.moment import Moment
from oarlock.embedding.view import TableView
from oarlock.ps import compacting, view
from oarlock.ps.cuts import Cuts as CutsOfShard
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard

Patch = pytest.MonkeyPatch


def gate_shut_with_pushes_under_way(patch: Patch) -> None:
    """A worker says that it stands at the gate while a push of its own is not acknowledged yet."""

    @asynccontextmanager
    async def passed(self: Gate) -> AsyncIterator[None]:
        while not self.is_open:
            await self._is_open.wait()
        yield

    patch.setattr(Gate, "passed", passed)


def the_fastest_worker_opens_the_gate(patch: Patch) -> None:
    """The coordinator goes on as soon as one worker has come."""
    patch.setattr(GateOfJob, "passed", property(lambda self: bool(self._come) or not self._missing))


def gate_opened_before_the_views(patch: Patch) -> None:
    """Workers push again while the last owners begin their views."""
    original = Cutting._cut

    async def cut(self: Cutting, number: int, *arguments: Any) -> None:
        self._c.cuts.opened = number
        await original(self, number, *arguments)

    patch.setattr(Cutting, "_cut", cut)


def silent_workers_are_not_waited_for_after_a_restart(patch: Patch) -> None:
    """A coordinator that was started again takes a worker that has not told what it holds for one that holds nothing."""

    def pushing(self: Cuts) -> list[int]:
        c = self._c
        holders = {holder for (kind, _), holder in c.work.leases.items() if kind == "train"}
        return [m.incarnation for m in c.members.alive("worker") if m.incarnation in holders]

    patch.setattr(Cuts, "_pushing", pushing)


def views_that_begin_late_are_believed(patch: Patch) -> None:
    """A coordinator that was stopped for long takes what workers said at their gates for what is so."""
    patch.setattr(cutting, "PATIENCE", math.inf)


def late_pushes_are_taken_for_new_ones(patch: Patch) -> None:
    """A push of before the cut is applied after it, whoever sends it, and nothing is said of it. The coordinator's clock, which
    keeps the same rule where clocks go alike, is not looked at."""
    views_that_begin_late_are_believed(patch)
    patch.setattr(CutsOfShard, "check", lambda self, header: None)


def tears_are_not_looked_at(patch: Patch) -> None:
    """A view that a worker tore is committed all the same, and the coordinator's clock is not looked at."""
    views_that_begin_late_are_believed(patch)
    original = ShardService.write

    def write(self: ShardService, request: Any) -> Any:
        shard = self._joined[1] if self._joined is not None else None
        if shard is not None:
            shard.cuts.torn = False
        return original(self, request)

    patch.setattr(ShardService, "write", write)


def told_when_it_is_committed(patch: Patch) -> None:
    """What a manifest says is what the coordinator knows once files are written, not when the views began."""
    original = cutting.moment_of
    last: list[tuple[Any, int]] = []

    def moment_of(c: Any, cut: int) -> Moment:
        last[:] = [(c, cut)]
        return original(c, cut)

    def manifest(self: Moment, spec: Any, entries: Any) -> Manifest:
        later = original(*last[0])
        return honest(later, spec, entries)

    honest = Moment.manifest
    patch.setattr(cutting, "moment_of", moment_of)
    patch.setattr(Moment, "manifest", manifest)


def told_before_the_views_begin(patch: Patch) -> None:
    """Splits that are closed while owners begin their views are open in the manifest, though marks of them are forgotten."""
    original = cutting.moment_of
    early: dict[int, Moment] = {}
    cut = Cutting._cut

    async def before(self: Cutting, number: int, workers: list[int], commits: Any, at: int) -> None:
        early[number] = original(self._c, number)
        await cut(self, number, workers, commits, at)

    patch.setattr(Cutting, "_cut", before)
    patch.setattr(cutting, "moment_of", lambda c, number: early[number])


def views_of_later(patch: Patch) -> None:
    """What is written is what is there when it is written."""
    patch.setattr(TableView, "content", lambda self, block: self._table.export_block(block))
    patch.setattr(TableView, "changes", lambda self, block: None)


def marks_of_later(patch: Patch) -> None:
    """Marks are those of when a block is written."""
    original = view.View.__init__

    def init(self: view.View, shard: Shard, number: int, base: Mapping[int, Any]) -> None:
        original(self, shard, number, base)
        self._marks = shard.marks._marks

    patch.setattr(view.View, "__init__", init)


def changes_are_counted_from_a_cut_that_was_given_up(patch: Patch) -> None:
    """What changed before a cut that came to nothing is missing in the next one."""
    original = view.Views.begin

    def begin(self: view.Views, number: int, committed: int) -> None:
        for table in self._shard.tables:
            if self._last.number:
                table.commit_view(self._last.number)
        original(self, number, committed)

    patch.setattr(view.Views, "begin", begin)


def a_changed_row_is_left_out(patch: Patch) -> None:
    """An increment has the rows that changed but for one."""
    original = TableView.changes

    def changes(self: TableView, block: int) -> Any:
        found = original(self, block)
        if found is None or len(found.rows.keys) < 2:
            return found
        rows = found.rows
        fewer = rows._replace(
            keys=rows.keys[1:], weights=rows.weights[1:], state=rows.state[1:], counters=rows.counters[1:]
        )
        return found._replace(rows=fewer)

    patch.setattr(TableView, "changes", changes)


def restored_with_the_closed_splits_of_the_end(patch: Patch) -> None:
    """A restore begins with one split more closed than the cut has."""
    original = recovery.go_back

    def go_back(c: Any, manifest: Manifest, path: str) -> None:
        original(c, manifest, path)
        free = next(s for s in range(c.spec.splits * c.spec.epochs + 1) if s not in c.work.closed)
        if free < c.spec.splits * c.spec.epochs:
            c.work.closed = ClosedSet(c.work.closed.floor, [*c.work.closed.above, free])

    from oarlock.cluster import coordinator

    patch.setattr(coordinator, "go_back", go_back)


def restored_without_marks(patch: Patch) -> None:
    """Blocks come back without what they have of splits that were open."""
    from oarlock.ps.marks import Marks

    patch.setattr(Marks, "restore", lambda self, block, marks: None)


def dense_blocks_are_taken_for_unchanged(patch: Patch) -> None:
    """A dense block stands as the cut before wrote it, though it was updated since."""
    original = view.View._stands

    def stands(self: view.View, number: int) -> bool:
        known = number >= self._layout.dense_base and number in self._base
        return known or original(self, number)

    patch.setattr(view.View, "_stands", stands)


def compaction_leaves_out_the_newest_increment(patch: Patch) -> None:
    """What stands for a chain is what it was one cut before."""
    original = compacting.compact_block

    def compact_block(store: Any, write: Any, manifest: Manifest, entry: BlockEntry, used: Any) -> BlockEntry:
        before = BlockEntry(entry.kind, entry.name, entry.block, **entry.base[-1].__dict__, base=entry.base[:-1])

        class Older:
            files = store.files

            def load_block(self, manifest: Manifest, _: BlockEntry) -> Any:
                newest = store.load_block(manifest, entry)
                return replace(store.load_block(manifest, before), seq=newest.seq, marks=newest.marks)

        return original(Older(), write, manifest, entry, used)

    patch.setattr(compacting, "compact_block", compact_block)


def increments_after_what_was_compacted_are_dropped(patch: Patch) -> None:
    """A cut follows on a compacted file, whatever was written since its chain was."""
    original = compacting.rebase

    def rebase(entry: BlockEntry, done: BlockEntry) -> BlockEntry:
        return entry if original(entry, done) is entry else done

    patch.setattr(compacting, "rebase", rebase)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    gate_shut_with_pushes_under_way,
    the_fastest_worker_opens_the_gate,
    gate_opened_before_the_views,
    silent_workers_are_not_waited_for_after_a_restart,
    late_pushes_are_taken_for_new_ones,
    tears_are_not_looked_at,
    told_when_it_is_committed,
    told_before_the_views_begin,
    views_of_later,
    marks_of_later,
    changes_are_counted_from_a_cut_that_was_given_up,
    a_changed_row_is_left_out,
    restored_with_the_closed_splits_of_the_end,
    restored_without_marks,
    dense_blocks_are_taken_for_unchanged,
    compaction_leaves_out_the_newest_increment,
    increments_after_what_was_compacted_are_dropped,
)
