# SPDX-License-Identifier: Apache-2.0
"""Views of a table whose rows begin narrow: both of its tables as they were at one instant."""

import expanding_rig as rig
import numpy as np
import pytest
import view_rig

from oarlock.embedding.spec import Admission, Eviction, TableSpec
from oarlock.proto.errors import InvalidArgument

RULES = [Eviction(), Eviction(score=0.6, decay=0.7), Eviction(age=3)]


@pytest.mark.parametrize("seed", range(6))
def test_a_view_is_what_an_export_was_and_changes_bring_a_store_up_to_date(seed):
    rng = np.random.default_rng(seed)
    admission = Admission("count", 2) if seed % 2 else Admission()
    spec = TableSpec("t", 4, parts=rig.PARTS, blocks=2, expand_score=1.0, admission=admission, eviction=RULES[seed % 3])
    table = rig.make(spec)
    step, disk, whole, expanded = 0, {}, 0, 0

    def change():
        nonlocal step
        step += 1
        if spec.eviction != RULES[0] and step % 4 == 0:
            table.sweep(step // 4 % 2, tick=step, buckets=9)
        keys = rng.choice(60, 12, replace=False).tolist()
        amounts = rng.integers(1, 6, len(keys)).astype(np.uint32)
        rig.push(table, keys, occurrences=amounts, clicks=np.zeros(len(keys), np.float32), step=step)

    for number in range(30):
        for _ in range(rng.integers(4)):
            change()
        before = {block: view_rig.as_dict(table.export_block(block)) for block in range(2)}
        view = table.begin_view(number)
        assert (view.number, view.blocks.tolist()) == (number, [0, 1])
        assert view.version(1) == table.version(1)
        expanded = max(expanded, table.expanded)
        for block in range(2):
            change()
            changes = view.changes(block)
            assert (changes is None) == (block not in disk)
            assert view_rig.as_dict(view.content(block)) == before[block]
            if changes is not None:
                assert view_rig.merged(disk[block], changes) == before[block]
                whole += len(changes.rows.keys) == len(before[block][0]) > 0
        if number % 3 != 1:
            assert table.commit_view(number)
            disk = before
            view.close()
        assert not table.commit_view(number - 1)
    assert expanded > 0
    assert whole < 30 or spec.eviction.score  # mostly, changes are less than all, unless all rows decay


def test_blocks_are_kept_until_they_are_released():
    table = rig.make()
    rig.push(table, range(100))
    before = view_rig.as_dict(table.export_block(0))
    view = table.begin_view(1)
    table.drop(0)
    table.adopt(0)
    rig.push(table, range(50))
    assert view_rig.as_dict(view.content(0)) == before
    view.release(1)
    with pytest.raises(InvalidArgument, match="released"):
        view.content(1)
    assert view.content(2)
    view.close()
    with pytest.raises(InvalidArgument, match="released"):
        view.content(2)
    assert table.commit_view(1)
    view = table.begin_view(2)
    assert view.changes(0) is None
    keys = table.export_block(1).keys.tolist()
    assert sorted(view.changes(1).rows.keys.tolist()) == sorted(key for key in keys if key < 50)
