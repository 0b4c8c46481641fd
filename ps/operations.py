# SPDX-License-Identifier: Apache-2.0
"""Operations: an owner tells what it did to blocks, and a member does just that to its copies of them.

    ps/does.py             what is done
    ps/operation_wire.py   as messages
    apply, here            on a member: the same kernels with the same values, block by block

Invariant: a copy that takes its owner's operations one after the other is equal to its owner's block to the bit, after each of
them, whatever other blocks are here: what an update makes of a block depends on the block and the update alone. ``apply`` checks
all blocks before it changes any. What fails in the middle leaves copies that are none: the caller lets them go. Under the
shard's push lock.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.descriptor import BUCKETS, VERSION
from oarlock.proto.errors import Internal, Malformed, StalePlacement
from oarlock.ps.does import Does as Does
from oarlock.ps.does import Image as Image
from oarlock.ps.does import Operation as Operation
from oarlock.ps.does import Pushed as Pushed
from oarlock.ps.does import Stepped as Stepped
from oarlock.ps.does import Swept as Swept
from oarlock.ps.does import Undone as Undone
from oarlock.ps.does import nbytes as nbytes
from oarlock.ps.does import pieces as pieces
from oarlock.ps.images import reached, take
from oarlock.ps.operation_wire import decode as decode
from oarlock.ps.operation_wire import encode as encode

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard
    from oarlock.ps.staged import Staged

Numbers = NDArray[np.int32]


def sequences_of(shard: "Shard", numbers: Numbers) -> NDArray[np.int64]:
    """Return int64[m]: how many operations changed each of these blocks; -1 of those that are not stored here."""
    layout = shard.layout
    out = np.empty(len(numbers), np.int64)
    # Of each table that is named, and of the dense blocks behind them, which count as one more.
    of = np.searchsorted(np.array([*layout.table_base, layout.dense_base]), numbers, side="right") - 1
    for which in np.unique(of).tolist():
        mine = of == which
        if which == len(layout.tables):
            blocks = numbers[mine] - layout.dense_base
            out[mine] = np.where(shard.dense_group.stored(blocks), shard.dense_sequence[blocks], -1)
        else:
            words = shard.tables[which].descriptors[numbers[mine] - layout.table_base[which]]
            out[mine] = np.where(words[:, BUCKETS] != 0, words[:, VERSION], -1)
    return out


def lead_of(shard: "Shard", operation: Operation) -> NDArray[np.int64]:
    """Return int64[m]: by how much an operation is ahead of each copy here: 1 if it is the next one, less if it was done.

    In a table with a byte budget more than 1 does not show: there an operation may be one more for the rows that make way.
    """
    does, numbers, staged = operation.does, operation.numbers, shard.staged
    if staged is not None and isinstance(does, Stepped):
        return does.step - staged.steps[numbers]
    if staged is not None and isinstance(does, Pushed) and does.rank >= 0:
        # Parts are no operation of their blocks yet: who has one says so itself.
        return np.where(staged.has(does.rank, numbers), 0, does.step - staged.steps[numbers])
    lead = operation.sequences - sequences_of(shard, numbers)
    if isinstance(does, Pushed):
        lead[_budgeted(shard, does, numbers) & (lead > 1)] = 1
    return lead


def apply(shard: "Shard", operation: Operation) -> None:
    """Do to copies what was done to their owner's blocks, to exactly these.

    StalePlacement if one of them is not here, Internal if one is owned here or not as its owner's was before: nothing is changed
    then. Any other error, and Internal if they are not as the owner's afterwards: they are no copies any more.
    """
    numbers, does = operation.numbers, operation.does
    if isinstance(does, Image):
        take(shard, does)
    else:
        before = _copies(shard, numbers)
        if isinstance(does, Pushed) and does.rank >= 0:
            _same(operation, before, operation.sequences)
            _stager(shard).take(does)
        elif isinstance(does, Stepped):
            _step(shard, numbers, does)
        else:
            expected = operation.sequences - 1
            if isinstance(does, Pushed):
                # Rows that make way for others in a table with a byte budget are one more.
                trimmed = before < expected
                expected = np.where(trimmed & _budgeted(shard, does, numbers), before, expected)
            _same(operation, before, expected)
            if isinstance(does, Pushed):
                _push(shard, does)
            elif isinstance(does, Swept):
                name, block = shard.layout.name(int(numbers[0]))
                shard.tables[shard.layout.table_index[name]].replay_sweep(block, does.gone, does.decayed)
            else:
                shard.tables[does.keys.table].undo(does.keys.keys, steps=does.steps)
    _same(operation, sequences_of(shard, numbers), operation.sequences)


def _copies(shard: "Shard", numbers: Numbers) -> NDArray[np.int64]:
    """Return how many operations changed each of the blocks, all of which are copies here."""
    if shard.owned[numbers].any():
        block = int(numbers[shard.owned[numbers]][0])
        raise Internal(f"block {block} is owned here, and follows no other shard", block=block)
    found = sequences_of(shard, numbers)
    if (found < 0).any():
        block = int(numbers[found < 0][0])
        raise StalePlacement(f"there is no copy of block {block} on this shard", block=block)
    return found


def _same(operation: Operation, found: NDArray[np.int64], wanted: NDArray[np.int64]) -> None:
    wrong = np.flatnonzero(found != wanted)
    if len(wrong):
        at = int(wrong[0])
        block, name = int(operation.numbers[at]), type(operation.does).__name__
        raise Internal(
            f"block {block} is changed by {found[at]} operations here and by {wanted[at]} at its owner, who tells of one "
            f"({name}): copy the block anew",
            block=block,
        )


def _budgeted(shard: "Shard", pushed: Pushed, numbers: Numbers) -> NDArray[np.bool_]:
    """Return bool[m]: which blocks are of tables whose rows make way for others."""
    found = np.zeros(len(numbers), np.bool_)
    at = 0
    for part in pushed.rows:
        end = at + len(part.keys.numbers)
        found[at:end] = shard.layout.tables[part.keys.table].eviction.max_bytes > 0
        at = end
    return found


def _stager(shard: "Shard") -> "Staged":
    if shard.staged is None:
        raise Malformed("parts of a step, but the job's mode has no ranks")
    return shard.staged


def _push(shard: "Shard", pushed: Pushed) -> None:
    """Apply a group to copies that are as their owner's were before it."""
    staged = shard.staged
    if staged is not None and (staged.all_blocks or pushed.dense):
        raise Malformed("blocks of ranks are changed by steps, and not by the push of a group")
    # Their owner may hear later than this shard that the split ended: the group counts, and leaves no mark.
    marked = pushed.split not in shard.closed
    if marked:
        shard.marks.open(pushed.split)
    reached(shard, max(pushed.step, pushed.tick))
    for part in pushed.rows:
        keys = part.keys
        shard.tables[keys.table].push(
            keys.keys,
            keys.blocks,
            keys.counts,
            part.gradients,
            rate=part.rate,
            step=pushed.step,
            tick=pushed.tick,
            occurrences=part.occurrences,
            clicks=part.clicks,
        )
        if marked:
            shard.marks.record(pushed.split, pushed.group, keys.numbers)
    for each in pushed.dense:
        blocks = (each.numbers - shard.layout.dense_base).astype(np.int64)
        shard.dense_group.push(blocks, each.starts, each.gradients, rate=each.rate, step=pushed.step)
        shard.dense_sequence[blocks] += 1
        if marked:
            shard.marks.record(pushed.split, pushed.group, each.numbers)


def _step(shard: "Shard", numbers: Numbers, stepped: Stepped) -> None:
    """Apply a step to copies that are at the one before it."""
    staged = _stager(shard)
    steps = staged.steps[numbers]
    wrong = (steps + 1 != stepped.step) | (numbers < staged.first)
    if wrong.any():
        block = int(numbers[wrong][0])
        raise Internal(
            f"block {block} is at step {int(steps[wrong][0])} here, and its owner applied step {stepped.step}: copy the block "
            "anew",
            block=block,
        )
    staged.apply(numbers, stepped.step, stepped.samples)
