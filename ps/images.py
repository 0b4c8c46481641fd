# SPDX-License-Identifier: Apache-2.0
"""Images: all that is known of one block, taken from its owner and taken over by a copy.

    content   rows with all that later operations depend on (embedding/live.py), or dense values with their state
    marks     the last group of each open split that it has applied, or the step that it is at
    closed    the closed set: a late push of a split that ended while the copy travelled must not look new
    staged    parts of its next step
    step      the highest step of an update on its owner, by which rows age

Invariant: a block made of an image, and the one that it was made of, are equal after each operation that both have taken. An
image that is refused changes nothing. The shard's push lock is held, but where rows are made ready for their place (``fill``).
"""

from typing import TYPE_CHECKING

from oarlock.checkpoint.writing import in_threads
from oarlock.client.closed import ClosedSet
from oarlock.client.processors import WORKER_NICENESS
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.live import Filled, LiveBlock
from oarlock.proto.errors import Internal, Malformed
from oarlock.ps.does import Image
from oarlock.ps.rank_marks import STEP_MARK
from oarlock.ps.request import STEP_LIMIT

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

GROUP_LIMIT = 1 << 31
# Above that of workers (client/processors.py), which train meanwhile.
COPYING_NICENESS = WORKER_NICENESS + 5
# By block, what ``fill`` made.
Ready = dict[int, Filled]


def image_of(shard: "Shard", number: int) -> Image:
    """Return all of a block that is stored here."""
    layout = shard.layout
    content: LiveBlock | DenseBlock
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        content = shard.dense[found.parameter].export_live(found.block)
    else:
        name, block = layout.name(number)
        content = shard.tables[layout.table_index[name]].export_live(block)
    return Image(
        number,
        shard.operations(number),
        content,
        shard.marks.of_block(number),
        ClosedSet(shard.closed.floor, shard.closed.above),
        shard.staged.of_block(number) if shard.staged is not None else (),
        shard.step,
    )


def fill(shard: "Shard", image: Image) -> Filled | None:
    """Return the rows of an image as they are stored, in no place yet; None if it has none. Without the push lock.

    That takes longer than a step of a small batch: on this host whoever trains comes first.
    """
    number, content = image.number, image.content
    if number >= shard.layout.dense_base or not isinstance(content, LiveBlock):
        return None
    name, block = shard.layout.name(number)
    table = shard.tables[shard.layout.table_index[name]]

    def made(content: LiveBlock) -> Filled:
        return table.fill_live(block, content, version=image.sequence)

    return in_threads([content], made, lambda _: 0, threads=1, niceness=COPYING_NICENESS)[0]


def take(shard: "Shard", image: Image, ready: Ready | None = None) -> None:
    """Store a block that is the one that the image was made of, in place of the copy that is here, if there is one.

    Rows that are ``ready`` for their place leave that list as they get there.

    Internal if the block is owned here; Malformed if it is none of this job's.
    """
    layout, number, staged = shard.layout, image.number, shard.staged
    if shard.owned[number]:
        raise Internal(f"block {number} is owned here, and takes no copy of another shard's", block=number)
    marks = _marks(shard, image)
    _check_staged(shard, image)
    # What needs memory comes first, and what cannot fail last.
    for split in marks:
        if split != STEP_MARK:
            shard.marks.open(split)
    if number >= layout.dense_base:
        found = layout.dense_blocks[number - layout.dense_base]
        if not isinstance(image.content, DenseBlock):
            raise Malformed(f"block {number} is dense, but its image has rows")
        shard.dense[found.parameter].import_live(found.block, image.content)
        shard.dense_sequence[number - layout.dense_base] = image.sequence
    else:
        name, block = layout.name(number)
        if not isinstance(image.content, LiveBlock):
            raise Malformed(f"block {number} is of table {name}, but its image is dense")
        table = shard.tables[layout.table_index[name]]
        filled = ready.pop(number, None) if ready is not None else None
        table.place_live(block, filled or table.fill_live(block, image.content, version=image.sequence))
    shard.closed.merge(image.closed)
    shard.marks.drop_block(number)
    shard.marks.restore(number, marks)
    shard.marks.drop_closed(shard.closed)
    if staged is not None:
        staged.drop(number)
        for pushed in image.staged:
            staged.take(pushed)
    reached(shard, image.step)


def reached(shard: "Shard", step: int) -> None:
    """Take note of the step of an update elsewhere: rows of copies age with their owner's."""
    if not shard.step and step:
        shard.sweeper.begin(step)
    shard.step = max(shard.step, step)


def _marks(shard: "Shard", image: Image) -> dict[int, int]:
    """Return the marks of splits that are open, or the step; Malformed if they are none of such a block."""
    number, marks = image.number, image.marks
    if shard.staged is not None and number >= shard.staged.first:
        if list(marks) != [STEP_MARK] or not 0 <= marks[STEP_MARK] < STEP_LIMIT:
            raise Malformed(f"block {number}: its image has no step, or several", block=number)
        return marks
    floor = max(shard.closed.floor, image.closed.floor)
    for split, group in marks.items():
        if not 0 <= group < GROUP_LIMIT or split - floor >= shard.closed_window:
            raise Malformed(
                f"block {number}: its image has group {group} of split {split}, the closed ones begin at {floor}",
                block=number,
            )
    return {s: group for s, group in marks.items() if s not in shard.closed and s not in image.closed}


def _check_staged(shard: "Shard", image: Image) -> None:
    """Raise Malformed unless what is staged can be taken, once the block is there."""
    if not image.staged:
        return
    ranks = [pushed.rank for pushed in image.staged]
    if shard.staged is None or image.number < shard.staged.first:
        raise Malformed(f"block {image.number}: parts of a step, but it is not staged", block=image.number)
    if len(set(ranks)) < len(ranks) or not 0 <= min(ranks) <= max(ranks) < shard.staged.ranks:
        raise Malformed(
            f"block {image.number}: parts of a step of rank {max(ranks)}, or two of one", block=image.number
        )
    for pushed in image.staged:
        if pushed.numbers.tolist() != [image.number] or pushed.step != image.marks[STEP_MARK] + 1:
            raise Malformed(
                f"block {image.number}: a part of step {pushed.step} of rank {pushed.rank} is of other blocks, or not of "
                "its next step",
                block=image.number,
            )
