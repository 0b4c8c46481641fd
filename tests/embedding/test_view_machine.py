# SPDX-License-Identifier: Apache-2.0
"""Views against a dict, under random sequences of everything that can be done to a table, also while a view is read.

The machine of ``test_table_machine.py`` does all that changes a table. This one notes the model when a view begins, and
keeps what a store would: a view must give what was noted, and its changes what the store lacks, whatever came between,
after any number of views that were never committed.
"""

import os
import sys
from collections import Counter
from typing import ClassVar
from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import view_rig
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from oarlock.embedding import view
from oarlock.embedding.descriptor import LIFE, STAMP
from oarlock.embedding.stamps import ROUND

machine = sys.modules["table_machine"]
as_dict = view_rig.as_dict
BLOCKS = st.integers(0, 3)
# What goes on while a view is read, one after each slice.
KINDS = st.sampled_from(["push", "sweep", "undo", "pull", "push", "move"])
MEANWHILE = st.lists(st.tuples(KINDS, st.integers(0, 99)), max_size=4)


class ViewMachine(machine.TableMachine):
    seen: ClassVar[Counter] = Counter()

    @initialize(spec=machine.specs())
    def start(self, spec):
        super().start(spec)
        self.patches.append(mock.patch.object(view, "SLICE", 3))
        self.patches[-1].start()
        self.view, self.number, self.begins = None, 0, 0
        self.disk = {}

    def life(self, block):
        return int(self.table.descriptors[block, LIFE])

    def noted(self):
        """Return {block: (life, version, content)} of all stored blocks, as the model has them."""
        rows = self.model.content()
        out = {}
        for block, version in self.model.versions.items():
            sketch = self.model.sketches.get(block)
            mine = {key: rows[key] for key in self.model.of(block)}
            waiting = {key: self.model.waiting[key] for key in self.model.of(block, self.model.waiting)}
            out[block] = self.life(block), version, (mine, waiting, sketch.export() if sketch is not None else b"")
        return out

    def meanwhile(self, what):
        """Return what ``os.sched_yield`` does, once for each slice that is read."""
        what = list(what)
        return mock.patch.object(os, "sched_yield", side_effect=lambda: self.change(*what.pop()) if what else None)

    def change(self, kind, seed):
        rng = np.random.default_rng(seed)
        pool = [*self.model.rows, *self.model.waiting, *machine.POOL[:9]]
        keys = list(dict.fromkeys(int(pool[i]) for i in rng.integers(len(pool), size=6)))
        if kind == "push":
            self.push(keys=keys, seed=seed, step=1 + seed % 20, bad=0, many=seed % 2 == 0)
        elif kind == "sweep":
            self.sweep(block=seed % 4, tick=seed % 31, buckets=1 + seed % 3)
        elif kind == "undo" and self.spec.guard.undo:
            self.undo(keys=keys, trained=0, steps=1)
        elif kind == "move" and seed % 3:
            self.export_and_import(block=seed % 4, version=seed % 10)
        elif kind == "move":
            self.drop_or_adopt(block=seed % 4, version=0)
        else:
            self.pull(keys=keys)
        self.count("meanwhile " + kind)

    @rule()
    def begin_view(self):
        self.snap = self.noted()
        self.number += 1
        self.begins += 1
        self.view, self.released = self.table.begin_view(self.number), set()
        assert self.view.number == self.number
        assert self.view.blocks.tolist() == sorted(self.snap)
        assert [self.view.version(block) for block in sorted(self.snap)] == [
            self.snap[block][1] for block in sorted(self.snap)
        ]

    def readable(self, block):
        return self.view is not None and block in self.snap and block not in self.released

    def known(self, block):
        """Tell whether changes of a block since the last committed view are known."""
        if block not in self.disk or self.disk[block][0] != self.snap[block][0]:
            return False
        _, version, _, begins = self.disk[block]
        tombstones = self.view.noted[block].block.tombstones  # also of a block that is not stored any more
        return self.begins - begins < ROUND and tombstones.since(version) is not None

    @rule(block=BLOCKS, what=MEANWHILE)
    def read_content(self, block, what):
        if self.readable(block):
            with self.meanwhile(what):
                found = self.view.content(block)
            assert as_dict(found) == self.snap[block][2]
            self.count("contents")
            self.count("contents of what went", self.life(block) != self.snap[block][0])

    @rule(block=BLOCKS, what=MEANWHILE)
    def read_changes(self, block, what):
        if self.readable(block):
            known = self.known(block)
            with self.meanwhile(what):
                changes = self.view.changes(block)
            assert (changes is not None) == known
            if known:
                self.merged(block, changes)

    def merged(self, block, changes):
        """Apply changes to what the store has: that must give the block as it was."""
        before = self.disk[block][2]
        assert view_rig.merged(before, changes) == self.snap[block][2]
        self.count("changes")
        self.count("gone", len(changes.gone))
        self.count("unwritten", len(set(before[0]) - set(changes.rows.keys.tolist()) - set(changes.gone.tolist())))

    @rule(block=BLOCKS)
    def release(self, block):
        if self.readable(block):
            self.view.release(block)
            self.released.add(block)

    @rule(what=MEANWHILE)
    def write_and_commit(self, what):
        """What a cut does with its view: each block whole or its changes, then all of it counts."""
        if self.view is None:
            return
        for block in sorted(self.snap):
            if self.readable(block):
                with self.meanwhile(what):
                    changes = self.view.changes(block)
                    if changes is None:
                        self.count("not known")
                        assert as_dict(self.view.content(block)) == self.snap[block][2]
                    else:
                        self.merged(block, changes)
                self.count("contents of what went", self.life(block) != self.snap[block][0])
                self.view.release(block)
        assert self.table.commit_view(self.number)
        self.disk = {block: (*noted, self.begins) for block, noted in self.snap.items() if self.life(block) == noted[0]}
        self.view = None
        self.count("committed")

    @rule(cuts=st.lists(st.tuples(MEANWHILE, MEANWHILE, st.booleans()), min_size=2, max_size=9))
    def cuts(self, cuts):
        """One cut after the other, some of them in vain, while the table goes on changing."""
        for before, while_read, good in cuts:
            for what in before:
                self.change(*what)
            self.begin_view()
            for what in while_read[1:]:
                self.change(*what)
            if good:
                self.write_and_commit(what=while_read)

    @precondition(lambda self: self.view is not None)
    @rule()
    def abort(self):
        self.view.close()
        self.view = None
        self.count("aborted")

    @rule()
    def commit_too_late(self):
        assert not self.table.commit_view(self.number - 1)
        assert not self.table.commit_view(self.number + 1)

    @rule(n=st.integers(1, 9))
    def wear_out(self, n):
        """Begin views that nobody reads, so that stamps come round."""
        for _ in range(n):
            self.begin_view()
        assert len({int(self.table.descriptors[block, STAMP]) for block in self.snap}) <= 1


TestViews = ViewMachine.TestCase
TestViews.settings = settings(
    max_examples=60 if reference.JIT else 10, stateful_step_count=25, deadline=None, derandomize=True
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_steps_of_views_are_those_of_a_dict():
    ViewMachine.seen.clear()
    machine.run_long(ViewMachine, 200 if reference.JIT else 120)
    seen = ViewMachine.seen
    assert seen["steps"] >= 10_000
    happened = ("contents", "changes", "not known", "gone", "unwritten", "committed", "aborted", "spilled")
    happened += (
        "contents of what went",
        "trimmed",
        "swept",
        "undone",
        "imported",
        "meanwhile push",
        "meanwhile sweep",
        "meanwhile undo",
        "meanwhile move",
    )
    assert all(seen[what] > 50 for what in happened), seen
