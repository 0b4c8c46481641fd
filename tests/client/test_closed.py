# SPDX-License-Identifier: Apache-2.0
import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from oarlock.client.closed import SPLIT_WINDOW, ClosedSet
from oarlock.proto.common_pb2 import ClosedSplits
from oarlock.proto.errors import Malformed

SPLITS = st.integers(0, 40)
SETS = st.builds(ClosedSet, SPLITS, st.lists(SPLITS))


def members(closed):
    return {s for s in range(200) if s in closed}


class Twin(RuleBasedStateMachine):
    """A ClosedSet beside a plain set of the same splits."""

    def __init__(self):
        super().__init__()
        self.closed, self.plain = ClosedSet(), set()

    @rule(split=SPLITS)
    def add(self, split):
        self.closed.add(split)
        self.plain.add(split)

    @rule(other=SETS)
    def merge(self, other):
        before = members(other)
        self.closed.merge(other)
        self.plain |= before
        assert members(other) == before

    @rule()
    def travel(self):
        self.closed = ClosedSet.unpack(ClosedSplits.FromString(self.closed.pack().SerializeToString()))

    @invariant()
    def same(self):
        assert members(self.closed) == self.plain
        assert sorted(self.closed) == sorted(s for s in self.plain if s >= self.closed.floor)
        # As low as it can be said: one form for one set.
        assert self.closed.floor == next(s for s in range(201) if s not in self.plain)


TestTwin = Twin.TestCase


@given(SETS, SETS)
def test_merging_is_the_union_in_either_order(a, b):
    left, right = ClosedSet(a.floor, a.above), ClosedSet(b.floor, b.above)
    left.merge(b)
    right.merge(a)
    assert left == right
    assert members(left) == members(a) | members(b)


def test_bits_count_from_the_floor():
    assert ClosedSet(5, [6, 8, 13, 14]).pack() == ClosedSplits(floor=5, bitmap=bytes([0b00001010, 0b00000011]))
    assert ClosedSet(5).pack() == ClosedSplits(floor=5)
    assert ClosedSet.unpack(ClosedSplits()) == ClosedSet()
    assert ClosedSet.unpack(ClosedSplits(floor=2, bitmap=b"\x03\x00\x00")) == ClosedSet(4)


def test_the_widest_window_travels():
    wide = ClosedSet(0, range(1, SPLIT_WINDOW))
    assert ClosedSet.unpack(wide.pack()) == wide
    large = ClosedSet(1 << 40, [(1 << 40) + 1023])
    assert ClosedSet.unpack(large.pack()) == large


@pytest.mark.parametrize("size", [SPLIT_WINDOW // 8 + 2, 1 << 20])
def test_a_bitmap_wider_than_the_window_is_malformed(size):
    with pytest.raises(Malformed, match=f"reaches {size * 8} splits above its floor, at most 1024"):
        ClosedSet.unpack(ClosedSplits(floor=1, bitmap=b"\xff" * size))


def test_sets_differ_by_what_is_in_them():
    assert ClosedSet(3) == ClosedSet(0, [0, 1, 2])
    assert ClosedSet(3) != ClosedSet(4)
    assert ClosedSet(3) != {3}
    with pytest.raises(TypeError, match="unhashable"):
        hash(ClosedSet())
