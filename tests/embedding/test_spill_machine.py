# SPDX-License-Identifier: Apache-2.0
"""A spill file against a dict, under random sequences of everything that can be done to it."""

import tempfile
from pathlib import Path

import embedding_reference as reference
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile


class SpillMachine(RuleBasedStateMachine):
    @initialize(width=st.sampled_from([1, 8, 13]), segment=st.sampled_from([1, 3, 8, 11]))
    def start(self, width, segment):
        self.folder = tempfile.TemporaryDirectory()
        self.width, self.segment = width, segment
        size = segment * (-(-width // 8) * 8 + 8)
        self.file = SpillFile(Path(self.folder.name), width, segment_bytes=size, limit_bytes=1 << 20)
        self.file.open()
        self.live = {}
        self.pins = {}  # token -> what was live then
        self.serial = 0

    def teardown(self):
        if hasattr(self, "file"):
            self.file.close()
            assert list(Path(self.folder.name).iterdir()) == []
            self.folder.cleanup()

    @rule(n=st.integers(0, 40))
    def append(self, n):
        self.serial += 1
        content = np.random.default_rng(self.serial).integers(0, 256, (n, self.width)).astype(np.uint8)
        records = self.file.append(address_of(content), n).tolist()
        kept = set(self.live).union(*self.pins.values())
        assert not kept & set(records)
        assert len(set(records)) == n
        self.live |= zip(records, (line.tobytes() for line in content), strict=True)

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def free(self, data):
        records = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        self.file.free(np.array(records, np.int64))
        for record in records:
            del self.live[record]

    @rule(keep=st.integers(1, 9))
    @precondition(lambda self: self.live)
    def free_most(self, keep):
        records = [record for record in self.live if record % 10 >= keep]
        self.file.free(np.array(records, np.int64))
        for record in records:
            del self.live[record]

    @rule()
    @precondition(lambda self: len(self.pins) < 4)
    def pin(self):
        self.pins[self.file.pin()] = dict(self.live)

    @rule(data=st.data())
    @precondition(lambda self: self.pins)
    def unpin(self, data):
        token = data.draw(st.sampled_from(sorted(self.pins)))
        self.file.unpin(token)
        del self.pins[token]

    @rule(segments=st.none() | st.integers(1, 3))
    def compact(self, segments):
        def move(old, new, content):
            for a, b, line in zip(old.tolist(), new.tolist(), content, strict=True):
                assert self.live.pop(a) == line.tobytes()
                self.live[b] = line.tobytes()

        self.file.compact(move, segments=segments)
        if segments is None and not self.pins:
            assert self.file.counts.dead_records <= len(self.live) + self.segment

    @invariant()
    def reads_what_lives_or_is_pinned(self):
        for rows in (self.live, *self.pins.values()):
            out = np.empty((len(rows), self.width), np.uint8)
            self.file.read(np.array(list(rows), np.int64), out)
            assert out.tobytes() == b"".join(rows.values())
        assert self.file.counts.live_records == len(self.live)


TestSpill = SpillMachine.TestCase
TestSpill.settings = settings(
    max_examples=60 if reference.JIT else 8, stateful_step_count=30, deadline=None, derandomize=True
)
