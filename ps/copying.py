# SPDX-License-Identifier: Apache-2.0
"""Copying: the coordinator's orders to an owner about copies of its blocks.

Invariant: an order that names another record than the one known here is left undone, and so is one that was carried out: what
came of it is reported, not answered. A block is locked for no longer than a copy of it takes. Called from many threads.
"""

import numpy as np

from oarlock.proto.errors import Unavailable
from oarlock.ps.closing import give
from oarlock.ps.holdings import Numbers, Order
from oarlock.ps.images import image_of
from oarlock.ps.operations import Operation, sequences_of
from oarlock.ps.reports import Generations
from oarlock.ps.shard import Shard


class Copying:
    """Carries orders out on ``shard``."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def give(self, numbers: Numbers, generations: Generations, to: int, leisurely: bool = False) -> None:
        """Have another shard be given copies of blocks, one after the other; ``leisurely``: with rests."""
        holdings = self._shard.holdings
        with self._shard.push_lock:
            if to not in holdings.shards:
                raise Unavailable(f"shard {to} is not known here yet", shard=to)
            fits = holdings.owned[numbers] & (holdings.generations[numbers] == generations)
            for number in numbers[fits].tolist():
                self._shard.leading.want(holdings.shards[to], number, leisurely)

    def hand_over(self, numbers: Numbers, generations: Generations, to: int, order: Order) -> None:
        """Close blocks, and report once all members have all of them."""
        shard = self._shard
        with shard.push_lock:
            named = numbers[shard.holdings.generations[numbers] == generations]
            closed = shard.holdings.close(named, order)
            if len(closed):
                shard.leading.hand_over(closed, to, order)

    def reopen(self, numbers: Numbers, generations: Generations, order: Order) -> None:
        """Open blocks whose hand-over came to nothing."""
        shard = self._shard
        with shard.push_lock:
            named = numbers[shard.holdings.generations[numbers] == generations]
            shard.leading.reopened(shard.holdings.reopen(named.tolist(), order))
            kept = shard.closing.ended()
        give(kept)


def take_turn(shard: Shard, to: int) -> None:
    """Take the image of the block whose turn it is to be copied to another shard, unless one is under way."""
    with shard.push_lock:
        while (number := shard.leading.turn(to)) is not None:
            # What is closed by now is copied once it is wanted again.
            if shard.holdings.owned[number]:
                one = np.array([number], np.int32)
                shard.tell()
                shard.leading.add(to, Operation(one, sequences_of(shard, one), image_of(shard, number)))
