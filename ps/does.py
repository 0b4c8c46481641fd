# SPDX-License-Identifier: Apache-2.0
"""What is done to blocks, as copies of them are told it (ps/operations.py).

    Pushed    a group was applied; or (rank >= 0) parts of a step were staged, which is no operation of the block yet
    Swept     a slice of a sweep let rows of one block go, and others decay
    Undone    the last updates of keys were taken back
    Stepped   the staged parts of a step were added up, divided and applied; under sync the rows due by it were evicted, too
    Image     one block whole (ps/images.py)

Invariant: what is told depends on nothing but what is here and the blocks as they were: whoever does it to an equal block has an
equal block. The arrays are nobody's who changes them. Immutable; any thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import ClosedSet
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.live import LiveBlock
from oarlock.ps.parts import copied, lengths_in, only
from oarlock.ps.request import DensePush, Keys, RowPush

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# About what an operation takes beside its arrays.
OPERATION_BYTES = 1024


@dataclass(frozen=True)
class Pushed:
    """What a group added to blocks: those of ``rows`` and then of ``dense``, in this order.

    ``rank``: whose parts were staged. ``tick``: from which step on its rows' age counts, at least ``step``; 0: from that.
    """

    split: int
    group: int
    step: int
    rows: tuple[RowPush, ...]
    dense: tuple[DensePush, ...]
    rank: int = -1
    tick: int = 0

    @property
    def numbers(self) -> NDArray[np.int32]:
        found = [part.keys.numbers for part in self.rows] + [part.numbers for part in self.dense]
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def only(self, chosen: NDArray[np.bool_]) -> "Pushed":
        """Return what is for the chosen ones of its blocks."""
        rows, dense, at = list[RowPush](), list[DensePush](), 0
        for part in self.rows:
            some = chosen[at : at + len(part.keys.numbers)]
            at += len(some)
            if some.any():
                rows.append(part.only(some))
        for each in self.dense:
            some = chosen[at : at + len(each.numbers)]
            at += len(some)
            if some.any():
                dense.append(each if some.all() else only(each, some, lengths_in(each)))
        return replace(self, rows=tuple(rows), dense=tuple(dense))


@dataclass(frozen=True)
class Swept:
    """gone: uint64[g], the keys that left a block; decayed: uint64[d], of rows that stayed with less shows and clicks."""

    gone: NDArray[np.uint64]
    decayed: NDArray[np.uint64]


@dataclass(frozen=True)
class Undone:
    """The last ``steps`` updates of ``keys`` were taken back."""

    keys: Keys
    steps: int


@dataclass(frozen=True)
class Stepped:
    """A step was applied; ``samples``: of all ranks."""

    step: int
    samples: int


@dataclass(frozen=True)
class Image:
    """All of block ``number`` after ``sequence`` operations, for a copy that goes on with its owner.

    ``marks`` as ``Marks.of_block`` gives them; ``staged``: parts of its next step, one for each rank that sent one; ``step``: the
    highest of an update on its owner.
    """

    number: int
    sequence: int
    content: LiveBlock | DenseBlock
    marks: dict[int, int]
    closed: ClosedSet
    staged: tuple[Pushed, ...]
    step: int


Does = Pushed | Swept | Undone | Stepped | Image


@dataclass(frozen=True)
class Operation:
    """What was done to blocks ``numbers`` int32[m], after which so many ``sequences`` int64[m] of operations changed each."""

    numbers: NDArray[np.int32]
    sequences: NDArray[np.int64]
    does: Does

    def only(self, chosen: NDArray[np.bool_]) -> "Operation | None":
        """Return the same for some of its blocks: bool[m]; None if there are none."""
        if chosen.all():
            return self
        if not chosen.any():
            return None
        does = self.does
        if isinstance(does, Pushed):
            does = does.only(chosen)
        elif isinstance(does, Undone):
            does = Undone(does.keys.only(chosen)[0], does.steps)
        # The others are of one block, or the same for each.
        return Operation(self.numbers[chosen], self.sequences[chosen], does)


def nbytes(operation: Operation) -> int:
    """Return about how many bytes an operation holds in memory."""
    return OPERATION_BYTES + operation.numbers.nbytes + operation.sequences.nbytes + _bytes(operation.does)


def pieces(operation: Operation, most: int) -> list[Operation]:
    """Return the same as operations of at most so many bytes each, as far as single blocks are not larger: cut between blocks."""
    if nbytes(operation) <= most or len(operation.numbers) < 2:
        return [operation]
    first = np.arange(len(operation.numbers)) < len(operation.numbers) // 2
    halves = operation.only(first), operation.only(~first)
    return [piece for half in halves if half is not None for piece in pieces(half, most)]


def _bytes(does: Does) -> int:
    if isinstance(does, Pushed):
        rows = sum(_sizes(p.keys.keys, p.gradients, p.occurrences, p.clicks, p.keys.counts) for p in does.rows)
        return rows + sum(_sizes(p.gradients, p.numbers, p.starts) for p in does.dense)
    if isinstance(does, Swept):
        return _sizes(does.gone, does.decayed)
    if isinstance(does, Undone):
        return _sizes(does.keys.keys, does.keys.counts)
    if isinstance(does, Image):
        content = sum(len(v) if isinstance(v, bytes) else v.nbytes for v in does.content if not isinstance(v, int))
        return content + 64 * len(does.marks) + sum(map(_bytes, does.staged))
    return 0


def _sizes(*arrays: NDArray[Any]) -> int:
    return sum(array.nbytes for array in arrays)


@dataclass
class Done:
    """A group, and what of it was applied so far; nothing, if nobody is ``listening``."""

    split: int
    group: int
    step: int
    tick: int
    listening: bool
    rows: list[RowPush] = field(default_factory=list)
    dense: list[DensePush] = field(default_factory=list)

    def note_rows(self, part: RowPush, groups: int | None = None) -> None:
        """Take note of a part that was applied, or of as many of its blocks as were, which are its first ones."""
        if not self.listening or groups == 0:
            return
        if groups is not None and groups < len(part.keys.blocks):
            part = part.only(np.arange(len(part.keys.blocks)) < groups)
        self.rows.append(copied(part))

    def note_dense(self, part: DensePush, chosen: NDArray[np.bool_]) -> None:
        """Take note of the blocks of a part that were applied."""
        if self.listening and chosen.any():
            self.dense.append(only(part, chosen, lengths_in(part)))


@contextmanager
def telling(shard: "Shard", split: int, group: int, step: int, tick: int) -> Iterator[Done]:
    """Tell copies what of a group was applied, also if it fails in the middle. The push lock is held."""
    done = Done(split, group, step, tick, shard.told is not None)
    try:
        yield done
    finally:
        if done.rows or done.dense:
            pushed = Pushed(split, group, step, tuple(done.rows), tuple(done.dense), tick=tick)
            shard.did(pushed.numbers, pushed)
