# SPDX-License-Identifier: Apache-2.0
"""Images of blocks, and what members refuse: operations that do not follow on what they have, and blocks that are no copies."""

from dataclasses import replace

import numpy as np
import pytest
from copies_rig import Copies, canonical, spec_of

from oarlock.client.closed import ClosedSet
from oarlock.embedding.live import LiveBlock
from oarlock.proto.errors import Internal, Malformed, OutOfMemory, PSError, StalePlacement
from oarlock.ps import blocks, does
from oarlock.ps.images import image_of, take
from oarlock.ps.operations import Operation, Pushed, Stepped, apply, sequences_of
from oarlock.ps.rank_marks import STEP_MARK
from oarlock.ps.replace import Order, Replacing
from oarlock.ps.shard import Shard


@pytest.fixture
def made():
    """Make Copies with one member that has all blocks; what is told is kept."""
    all_made = []

    def make(mode="async", ranks=2, **named):
        copies = Copies(spec_of(mode=mode, ranks=ranks * (mode != "async")), 5, members=1, **named)
        all_made.append(copies)
        copies.copy(1.0)
        return copies

    yield make
    for each in all_made:
        each.close()


def everything(shard):
    return [canonical(shard, number) for number in range(shard.layout.blocks)]


def histories(copies):
    """Yield operations one by one, each before it is applied to the member."""
    for _ in range(30):
        if copies.owner.staged is None:
            for act in (copies.push, copies.sweep, copies.undo):
                act()
        else:
            copies.train_step(2)
        queue, copies.queue = copies.queue, []
        yield from queue


@pytest.mark.parametrize("mode", ["async", "hybrid", "sync"])
def test_what_does_not_follow_is_refused_without_change(made, mode):
    copies = made(mode)
    member, kinds, before = copies.members[0], set(), None
    for operation in histories(copies):
        if before is not None and mode != "sync" and operation.numbers[0] == before.numbers[0]:
            # One is left out.
            refused(member, operation, before)
        if before is not None:
            apply(member, before)
            if not isinstance(before.does, Pushed) or type(before.does).__name__ not in kinds:
                kinds.add(type(before.does).__name__)
                refused(member, before)
        before = operation
    apply(member, before)
    copies.same()
    assert kinds >= ({"Pushed", "Swept", "Undone"} if mode == "async" else {"Pushed", "Stepped"})


def refused(member, operation, missing=None):
    """Have an operation refused that was applied before, or whose predecessor was not."""
    if missing is not None and isinstance(operation.does, Pushed):
        # Blocks that make way for rows may have been changed twice by one operation.
        exact = [n not in (10, 11) and n in missing.numbers for n in operation.numbers.tolist()]
        operation = operation.only(np.array(exact))
        if operation is None or operation.does.rank != -1 or getattr(missing.does, "rank", -1) >= 0:
            return
    elif missing is not None:
        return
    state = everything(member)
    with pytest.raises(Internal, match=r"block \d+.*copy the block anew"):
        apply(member, operation)
    assert everything(member) == state


def test_blocks_that_are_no_copies_are_refused(made):
    copies = made()
    copies.push()
    operation = copies.queue[0]
    number = int(operation.numbers[-1])
    for shard, error, text in (
        (copies.owner, Internal, "is owned here, and follows no other"),
        (Shard(copies.job.spec), StalePlacement, "there is no copy of block"),
    ):
        with pytest.raises(error, match=text):
            apply(shard, operation)
        shard.close()
    member = copies.members[0]
    blocks.drop(member, number)
    state = [canonical(member, n) for n in range(number)]
    with pytest.raises(StalePlacement, match=f"there is no copy of block {number}") as caught:
        apply(member, operation)
    assert caught.value.details["block"] == number
    assert [canonical(member, n) for n in range(number)] == state
    with pytest.raises(Internal, match="is owned here, and takes no copy"):
        take(copies.owner, image_of(copies.owner, number))
    assert sequences_of(member, np.array([0, number], np.int32)).tolist()[1] == -1


def test_an_image_takes_the_place_of_all_that_was_there(made):
    copies = made("sync")
    staging = copies.stage(2)
    next(staging)
    image = image_of(copies.owner, 0)
    for _ in staging:
        pass
    copies.deliver()
    member = copies.members[0]
    assert member.staged.nbytes > 0
    assert len(image_of(member, 0).staged) >= len(image.staged)
    empty = replace(image, staged=(), marks={STEP_MARK: 7}, sequence=70)
    take(member, empty)
    assert canonical(member, 0)[:2] == (70, {STEP_MARK: 7})
    assert image_of(member, 0).staged == ()
    assert member.staged.steps[:2].tolist() == [7, 0]
    blocks.drop(member, 1)
    assert not member.staged._parts.have[:, 1].any()


def test_marks_of_closed_splits_are_not_taken_over(made):
    copies = made()
    for _ in range(8):
        copies.push()
    copies.deliver()
    image, member = image_of(copies.owner, 0), copies.members[0]
    assert len(image.marks) > 1
    gone = next(iter(image.marks))
    take(member, replace(image, closed=ClosedSet(0, [gone])))
    assert gone in member.closed
    assert member.marks.of_split(gone) is None
    assert image_of(member, 0).marks == {s: g for s, g in image.marks.items() if s != gone}


def test_an_image_that_is_none_of_the_job_changes_nothing(made):
    copies, ranked = made(), made("sync")
    for each in (copies, ranked):
        (each.push if each is copies else lambda: next(ranked.stage(2)))()
        each.deliver()
    image, staged = image_of(copies.owner, 0), image_of(ranked.owner, 0)
    dense = image_of(copies.owner, copies.layout.dense_base)
    part = Pushed(0, 0, 1, (), (), 0)
    for shard, wrong, text in (
        (copies, replace(image, marks={5000: 1}), "group 1 of split 5000"),
        (copies, replace(image, marks={1: -1}), "group -1 of split 1"),
        (copies, replace(image, marks={STEP_MARK: 1}), "of split"),
        (copies, replace(image, staged=(part,)), "it is not staged"),
        (copies, replace(dense, number=0), "but its image is dense"),
        (copies, replace(image, number=copies.layout.dense_base), "but its image has rows"),
        (copies, replace(image, content=LiveBlock(np.zeros((1, 3), np.uint8))), "records of 3 bytes"),
        (ranked, replace(staged, marks={}), "has no step, or several"),
        (ranked, replace(staged, marks={STEP_MARK: 1 << 62}), "has no step"),
        (ranked, replace(staged, staged=(part, part)), "or two of one"),
        (ranked, replace(staged, staged=(replace(part, rank=2),)), "of rank 2"),
        (ranked, replace(staged, staged=(part,)), "is of other blocks"),
        (ranked, replace(staged, marks={STEP_MARK: 3}, staged=(part,)), "is of other blocks"),
    ):
        member = shard.members[0]
        state = everything(member)
        with pytest.raises(Malformed, match=text):
            take(member, wrong)
        assert everything(member) == state


def test_operations_of_another_mode_are_refused(made):
    copies, ranked, hybrid = made(), made("sync"), made("hybrid")
    copies.push()
    pushed = next(o for o in copies.queue if isinstance(o.does, Pushed))
    numbers = np.array([0], np.int32)
    step = Operation(numbers, sequences_of(copies.owner, numbers), Stepped(1, 1))
    for shard, wrong in (
        (copies, replace(pushed, sequences=pushed.sequences - 1, does=replace(pushed.does, rank=0))),
        (copies, step),
        (ranked, pushed),
        (hybrid, pushed),
        (hybrid, replace(pushed, sequences=pushed.sequences - 1, does=replace(pushed.does, rank=0))),
        (ranked, replace(pushed, sequences=pushed.sequences - 1, does=replace(pushed.does, rank=2))),
        (hybrid, step),
    ):
        state = everything(shard.members[0])
        with pytest.raises(PSError):
            apply(shard.members[0], wrong)
        assert everything(shard.members[0]) == state


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_what_fails_in_the_middle_is_told_as_far_as_it_came(made, mode):
    copies = made(mode)
    table = copies.owner.tables[1]
    real = table.push

    def failing(keys, blocks, counts, gradients, *, occurrences, clicks, **named):
        del table.push
        n = int(counts[0])
        aside = {"occurrences": occurrences[:n], "clicks": clicks[:n]}
        real(keys[:n], blocks[:1], counts[:1], gradients[:n], **aside, **named)
        raise OutOfMemory("no memory left", groups=1)

    failed = 0
    for _ in range(12):
        try:
            if mode == "sync":
                for _ in copies.stage(2):
                    pass
            copies.same()
            table.push = failing
            if mode == "sync":
                copies.commit_again(2)
            else:
                copies.push()
        except OutOfMemory:
            failed += 1
            copies.same()
            # Sent again, it is finished.
            copies.commit_again(2) if mode == "sync" else retry(copies)
        vars(table).pop("push", None)
        copies.same()
    assert failed > 5


def retry(copies):
    copies.last = copies.sent
    copies.again(copies.last)


def test_nothing_is_copied_where_nobody_listens(made, monkeypatch):
    copies = made()
    copies.owner.told = None
    monkeypatch.setattr(does, "copied", lambda part: pytest.fail("copied"))
    for act in (copies.push, copies.push, copies.sweep, copies.undo):
        act()
    assert copies.queue == []


def test_a_table_that_goes_back_is_told_block_by_block(made):
    copies = made()
    owner = copies.owner
    for _ in range(6):
        copies.push()
    copies.deliver()
    old = {number: owner.tables[0].export_block(number) for number in range(4)}
    for _ in range(6):
        copies.push()
    replacing = Replacing(owner)
    replacing._read = ("user", "/old", old)
    assert replacing.apply(owner, Order("user", "/old", 1, (), owner.generation)) > 0
    assert [type(o.does).__name__ for o in copies.queue[-4:]] == ["Image"] * 4
    copies.same()
    assert replacing.apply(owner, Order("user", "/old", 1, (), owner.generation)) > 0
    assert copies.queue == []


def test_a_sweep_is_told_if_it_did_something(made):
    copies = made()
    copies.push()
    copies.deliver()
    for _ in range(50):
        copies.sweep()
    assert all(len(o.does.gone) or len(o.does.decayed) for o in copies.queue)
    copies.same()
