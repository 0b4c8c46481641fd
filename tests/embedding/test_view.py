# SPDX-License-Identifier: Apache-2.0
"""Views of a table, one case at a time; ``test_view_machine.py`` has the random ones."""

from unittest import mock

import embedding_reference as reference
import numpy as np
import pytest
import table_reference
import view_rig

from oarlock.embedding import block as block_module
from oarlock.embedding import cold
from oarlock.embedding.descriptor import SAVING
from oarlock.embedding.saved import Saved
from oarlock.embedding.sketch import Sketch
from oarlock.embedding.spec import Admission, Eviction, Guard, Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.spill_file import SpillFile
from oarlock.embedding.stamps import ROUND
from oarlock.proto.errors import Internal, InvalidArgument, OutOfMemory

push, stored = table_reference.push, table_reference.stored
as_dict, merged = view_rig.as_dict, view_rig.merged


def table(blocks=1, **more):
    return stored(TableSpec("t", 3, OptimizerSpec("adagrad"), Initializer("normal"), blocks, **more))


def whole(table, block=0):
    return as_dict(table.export_block(block))


def written(table, view, block=0):
    """Commit a view as a store that takes everything does; return what that has."""
    found = as_dict(view.content(block))
    assert table.commit_view(view.number)
    view.close()
    return found


def changed(view, block=0):
    changes = view.changes(block)
    return sorted(changes.rows.keys.tolist()), sorted(changes.gone.tolist())


def test_a_view_stays_as_it_was_while_rows_change_come_and_leave():
    t = table(eviction=Eviction(age=5))
    push(t, range(100), step=1)
    before = whole(t)
    view = t.begin_view(1)
    push(t, range(50, 150), step=7)
    while not t.sweep(0, tick=8)[1]:
        pass
    push(t, range(10), step=8)  # they left, and begin anew
    assert whole(t)[0].keys() == {*range(10), *range(50, 150)}
    for _ in range(2):
        found = view.content(0)
        assert (found.keys[1:] > found.keys[:-1]).all(), "as a file has them, whatever was saved meanwhile"
        assert as_dict(found) == before
    assert (view.number, view.blocks.tolist(), view.version(0)) == (1, [0], 1)


def test_changes_are_the_rows_that_changed_since_the_committed_view_and_no_others():
    t = table(eviction=Eviction(age=5))
    push(t, range(100), step=1)
    view = t.begin_view(1)
    assert view.changes(0) is None
    push(t, [3, 200], step=3)  # after the view began: the next one's
    disk = written(t, view)
    push(t, [5], step=4)
    view = t.begin_view(2)
    push(t, [6], step=4)
    assert changed(view) == ([3, 5, 200], [])
    disk = merged(disk, view.changes(0))
    assert disk == as_dict(view.content(0))
    view.close()
    assert t.commit_view(2)
    while not t.sweep(0, tick=8)[1]:
        pass
    push(t, [5, 50], step=8)  # 50 comes back, 5 had stayed
    view = t.begin_view(3)
    assert changed(view) == ([5, 6, 50], sorted({*range(100)} - {3, 5, 6, 50}))
    assert merged(disk, view.changes(0)) == whole(t)


def test_nothing_is_lost_by_views_that_are_not_committed():
    t = table()
    push(t, range(20))
    disk = written(t, t.begin_view(1))
    for number in range(2, 6):
        push(t, [number])
        view = t.begin_view(number)
        assert changed(view) == (list(range(2, number + 1)), [])
        if number == 3:
            view.close()
    assert not t.commit_view(4)  # a later one began
    assert merged(disk, view.changes(0)) == whole(t)
    assert t.commit_view(5)
    assert changed(t.begin_view(6)) == ([], [])


@pytest.mark.parametrize("read", [False, True])
def test_after_seven_begins_without_a_commit_changes_are_not_known_but_the_content_is(read):
    t = table()
    push(t, range(50))
    written(t, t.begin_view(1))
    for number in range(2, 20):
        push(t, [number])
        before = whole(t)
        view = t.begin_view(number)
        push(t, [number + 20])
        if read or number > 12:
            assert as_dict(view.content(0)) == before
        assert (view.changes(0) is not None) == (number < 1 + ROUND)
    disk = written(t, view)
    view = t.begin_view(20)
    assert changed(view) == ([39], [])
    assert merged(disk, view.changes(0)) == whole(t)


def test_keys_that_wait_are_saved_and_change_like_rows():
    t = table(admission=Admission("count", 3), eviction=Eviction(age=1))
    push(t, [1, 2, 3])
    push(t, [4], occurrences=np.array([3], np.uint32), step=1)
    before = whole(t)
    assert before[1] == {1: 1, 2: 1, 3: 1}
    view = t.begin_view(1)
    push(t, [1, 5])
    push(t, [2], occurrences=np.array([2], np.uint32), step=9)
    assert as_dict(view.content(0)) == before
    disk = written(t, view)
    t.sweep(0, tick=10)
    push(t, [4], step=10)  # its row left, and it waits again
    view = t.begin_view(2)
    changes = view.changes(0)
    assert (changes.rows.keys.tolist(), changes.gone.tolist()) == ([2], [4])
    assert as_dict(changes.rows)[1] == {1: 2, 4: 1, 5: 1}
    assert merged(disk, changes) == whole(t)


CHANGES = {
    "the byte budget": ({"eviction": Eviction(max_bytes=4000)}, lambda t: push(t, range(200, 260), step=2)),
    "undo": ({"guard": Guard(undo=2)}, lambda t: t.undo(np.arange(0, 40, 2, dtype=np.uint64))),
    "a sweep that evicts": ({"eviction": Eviction(norm=1.0)}, lambda t: t.sweep(0, tick=1)),
    "a sweep that decays": ({"eviction": Eviction(score=1e-9, decay=0.5)}, lambda t: t.sweep(0, tick=1)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_changes_rows_beside_pushes_saves_them_first(how):
    more, change = CHANGES[how]
    t = table(**more)
    push(t, range(60))
    push(t, range(60), step=2)
    disk = written(t, t.begin_view(1))
    view = t.begin_view(2)
    before = whole(t)
    change(t)
    assert whole(t) != before
    assert as_dict(view.content(0)) == before
    assert changed(view) == ([], [])
    view = t.begin_view(3)
    rows, gone = changed(view)
    left = set(before[0]) - set(whole(t)[0])
    assert set(gone) == left
    assert rows == sorted(key for key, row in whole(t)[0].items() if before[0].get(key) != row)
    assert merged(disk, view.changes(0)) == whole(t)


def test_a_sketch_is_copied_once_at_its_first_change():
    t = table(admission=Admission("sketch", 3, capacity=100))
    push(t, range(10))
    before = whole(t)
    view = t.begin_view(1)
    with mock.patch.object(Sketch, "export", autospec=True, side_effect=Sketch.export) as export:
        for _ in range(4):
            push(t, range(10))
        assert export.call_count == 1
    assert as_dict(view.content(0)) == before
    assert before[2] != whole(t)[2]
    assert view.content(0).sketch == before[2]


@pytest.mark.parametrize("how", ["drop", "import", "drop and adopt"])
def test_a_view_keeps_a_block_that_is_dropped_or_replaced_until_it_is_released(how):
    t = table(blocks=2, eviction=Eviction(age=5))
    empty = t.arena.used
    push(t, range(50))
    disk = written(t, t.begin_view(1))
    push(t, range(20, 40), step=3)
    while not t.sweep(0, tick=8)[1]:
        pass
    kept = [whole(t, block) for block in range(2)]
    view = t.begin_view(2)
    push(t, range(30), step=9)
    content = t.export_block(0)
    if how == "import":
        t.import_block(0, content)
    else:
        t.drop(0)
        if how != "drop":
            t.adopt(0)
        if how != "drop":
            push(t, range(25), step=9)
    assert [as_dict(view.content(block)) for block in range(2)] == kept
    changes = view.changes(0)
    assert merged(disk, changes) == kept[0]
    assert len(changes.gone) > 0
    assert t.commit_view(2)
    if how != "drop":
        push(t, range(30), step=9)
        view.release(0)
        view.release(0)
        with pytest.raises(InvalidArgument, match="released"):
            view.content(0)
        view = t.begin_view(3)
        assert view.changes(0) is None
        assert as_dict(view.content(0)) == whole(t)
        assert as_dict(view.content(1)) == whole(t, 1)
        written(t, view, 0)
        view = t.begin_view(4)
        assert changed(view) == ([], [])
        t.drop(0)
    t.begin_view(5)  # an older view ends, and lets go what it alone kept
    with pytest.raises(InvalidArgument, match="released"):
        view.content(0)
    t.drop(1)
    t.begin_view(6)
    assert t.arena.used == empty


def test_a_view_is_read_until_it_is_released_or_another_begins():
    t = table(blocks=2)
    push(t, range(50))
    size = t.nbytes
    view = t.begin_view(1)
    push(t, range(50))
    assert t.nbytes > size
    view.release(0)
    view.release(0)
    with pytest.raises(InvalidArgument, match="released"):
        view.content(0)
    assert view.content(1)
    later = t.begin_view(2)
    with pytest.raises(InvalidArgument, match="released"):
        view.content(1)
    view.close()
    assert later.content(1)
    later.close()
    later.close()
    assert t.nbytes == size
    t.drop(1)
    for act in (later.content, later.changes, later.release, later.version):
        with pytest.raises(InvalidArgument, match="block 5 was not stored here when view 2 began"):
            act(5)
    for number in (-1, 1.0, True):
        with pytest.raises(InvalidArgument, match="an integer from 0 on"):
            t.begin_view(number)
    assert t.begin_view(0).blocks.tolist() == [0]


def test_changes_are_not_known_once_tombstones_are_forgotten():
    t = table(eviction=Eviction(age=1))
    push(t, range(50), step=1)
    written(t, t.begin_view(1))
    t.sweep(0, tick=9)
    t.forget_tombstones(0, until=t.version(0))
    view = t.begin_view(2)
    assert view.changes(0) is None
    assert as_dict(view.content(0)) == whole(t)


def test_without_memory_to_save_a_push_goes_on_and_the_view_ends():
    t, other = table(), table()
    for each in (t, other):
        push(each, range(50))
    view = t.begin_view(1)
    with mock.patch.object(Saved, "make_room", side_effect=MemoryError):
        push(t, range(60))
    push(other, range(60))
    assert whole(t) == whole(other)
    with pytest.raises(InvalidArgument, match="could not be kept"):
        view.content(0)
    push(t, range(9))
    assert as_dict(t.begin_view(2).content(0)) == whole(t)


def test_a_change_that_was_not_saved_is_told_and_not_written():
    t = table()
    push(t, range(50))
    view = t.begin_view(1)
    t.descriptors[0, SAVING] = 0
    push(t, [7])
    with pytest.raises(Internal, match="49 rows and 0 waiting keys, not 50 and 0"):
        view.content(0)


def test_a_push_that_stops_half_way_saves_what_it_changes_once():
    """It is called again from the block that has no room; words it has marked before that must not be taken for saved."""
    t = table(blocks=4, memory_bytes=1)
    with mock.patch.object(cold, "LEAST_ROWS", 8):
        push(t, range(400))
        before = [whole(t, block) for block in range(4)]
        view = t.begin_view(1)
        push(t, range(0, 800, 2))
        push(t, range(1, 800, 2))
        assert [as_dict(view.content(block)) for block in range(4)] == before
    t.close()


@pytest.fixture
def spilling(tmp_path):
    """A table of one block that keeps eight rows in memory and the others in a file of small segments."""

    def small_segments(folder, width, slack):
        return SpillFile(folder, width, limit_bytes=1 << 20, segment_bytes=8 * (-(-width // 8) * 8 + 8), slack=slack)

    with (
        mock.patch.object(cold, "LEAST_ROWS", 8),
        mock.patch.object(cold, "TIDY_RECORDS", 1),
        mock.patch.object(cold, "SpillFile", small_segments),
    ):
        t = stored(TableSpec("t", 3, OptimizerSpec("adagrad"), blocks=1, memory_bytes=1), folder=tmp_path)
        push(t, range(300))
        yield t
        t.close()


def test_records_that_a_view_is_about_to_read_stay_readable(spilling):
    """Between the look at their words and the reading, pushes bring rows back, and others take the places in the file."""
    t = spilling
    before = whole(t)
    view = t.begin_view(1)
    read, calls = t._cold.read_of, []

    def read_late(keys, records):
        calls.append(len(keys))
        if len(calls) == 1:
            for turn in range(3):
                for start in range(0, 300, 20):
                    push(t, range(start, start + 20), step=turn + 1)
        return read(keys, records)

    with mock.patch.object(t._cold, "read_of", read_late):
        assert as_dict(view.content(0)) == before
    assert calls[0] > 100
    assert t._cold.file.counts.dead_records > 0


def test_rows_in_the_file_stay_readable_when_their_block_is_dropped(spilling):
    t = spilling
    before = whole(t)
    view = t.begin_view(1)
    push(t, range(200, 250))
    t.drop(0)
    t.adopt(0)
    for turn in range(4):
        for start in range(1000, 1300, 20):
            push(t, range(start, start + 20), step=turn + 1)
    assert as_dict(view.content(0)) == before
    written = t._cold.file.counts.dead_records
    view.release(0)  # what was held back for the view goes
    push(t, range(1000, 1020), step=9)
    assert t._cold.file.counts.dead_records < written


def test_growing_and_rehashing_leave_a_view_alone():
    t = table()
    push(t, range(reference.MANY // 10))
    before = whole(t)
    view = t.begin_view(1)
    push(t, range(reference.MANY))
    assert as_dict(view.content(0)) == before


def test_a_block_refuses_more_rows_than_words_can_number():
    t = table()
    with mock.patch.object(block_module, "MOST_SLOTS", 64):
        push(t, range(64))
        before = whole(t)
        with pytest.raises(OutOfMemory, match="a block holds 64 rows, and no more fit: give the table more blocks"):
            push(t, range(60, 70))
    assert whole(t) == before
