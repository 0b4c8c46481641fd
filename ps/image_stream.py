# SPDX-License-Identifier: Apache-2.0
"""The stream of images to one other shard: full copies, one after the other, beside the stream of operations.

    wanted      its turn has not come: nothing of the block is kept
    under way   its image is in this stream, and what is done to the block meanwhile is held
    there       what was held follows in the stream of operations, as does all that is done from then on

Invariant: an operation on a block is sent only after the block's image was answered for, so the two streams need no order between
them, and no operation waits for another block's image. An image is taken when the one before has come, so of all that are
wanted one is in memory. ``Leading``'s lock covers it.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oarlock.client.router import ShardAddress
from oarlock.ps.operations import Operation, nbytes
from oarlock.ps.stream import Stream

# Of operations that are held for one copy: beyond it the copy is given up.
HELD_BYTES = 256 << 20


@dataclass
class Travelling:
    """A block under way: the image is there once the stream is answered up to ``at``. ``known``: of its record."""

    numbers: NDArray[np.int32]
    known: tuple[NDArray[np.int32], NDArray[np.int64]]
    at: int
    held: list[Operation] = field(default_factory=list)
    nbytes: int = 0


class ImageStream(Stream):
    """``wanted``: blocks that wait for their turn, in this order, and whether each one's copy may take long."""

    def __init__(self, to: ShardAddress, number: int) -> None:
        super().__init__(to, number)
        self.wanted: dict[int, bool] = {}
        self._travelling: Travelling | None = None

    def has(self, number: int) -> bool:
        """Whether a block is wanted, or under way."""
        return number in self.wanted or (self._travelling is not None and number in self._travelling.numbers)

    @property
    def busy(self) -> bool:
        """Whether there is something to do: to send, or to take an image."""
        return self.first < self.next or bool(self.wanted)

    @property
    def leisurely(self) -> bool:
        """Whether nothing is wanted that somebody waits for."""
        return all(self.wanted.values())

    @property
    def travels(self) -> bool:
        """Whether a block is under way."""
        return self._travelling is not None

    def turn(self) -> int | None:
        """Return the block whose turn it is, which is wanted no more; None if none is, or one is under way."""
        if self.first < self.next or not self.wanted:
            return None
        number = next(iter(self.wanted))
        del self.wanted[number]
        return number

    def begin(self, image: Operation, known: tuple[NDArray[np.int32], NDArray[np.int64]]) -> None:
        """Send a block as it is; ``known``: which record it is of."""
        self.append(image)
        self._travelling = Travelling(image.numbers, known, self.next)

    def hold(self, operation: Operation) -> None:
        """Keep of an operation what is of the block under way, until that is there."""
        travelling = self._travelling
        if travelling is None:
            return
        mine = operation.only(np.isin(operation.numbers, travelling.numbers))
        if mine is not None:
            travelling.held.append(mine)
            travelling.nbytes += nbytes(mine)
            if travelling.nbytes > HELD_BYTES:
                self._travelling = None

    def arrived(self) -> Travelling | None:
        """Return the block that has come, once."""
        travelling = self._travelling
        if travelling is None or self.first < travelling.at:
            return None
        self._travelling = None
        return travelling

    def give_up(self, numbers: NDArray[np.int32]) -> None:
        """Want blocks no more; of one under way nothing follows, wherever it gets."""
        for number in numbers.tolist():
            self.wanted.pop(number, None)
        if self._travelling is not None and np.isin(self._travelling.numbers, numbers).any():
            self._travelling = None
