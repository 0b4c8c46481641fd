# SPDX-License-Identifier: Apache-2.0
"""Copying: the coordinator's orders to an owner about copies of its blocks.

Invariant: an order that names another record than the one known here is left undone, and so is one that was carried out: what
came of it is reported, not answered. A block is locked for no longer than a copy of it takes. Called from many threads.
"""

from oarlock.proto.errors import Unavailable
from oarlock.ps.holdings import Numbers, Order
from oarlock.ps.images import image_of
from oarlock.ps.operations import Operation, nbytes, sequences_of
from oarlock.ps.reports import Generations
from oarlock.ps.shard import Shard


class Copying:
    """Carries orders out on ``shard``."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def give(self, numbers: Numbers, generations: Generations, to: int) -> None:
        """Begin to give another shard copies of blocks."""
        shard, holdings, leading = self._shard, self._shard.holdings, self._shard.leading
        for at in range(len(numbers)):
            one = numbers[at : at + 1]
            with shard.push_lock:
                if to not in holdings.shards:
                    raise Unavailable(f"shard {to} is not known here yet", shard=to)
                owned = holdings.owned[one[0]] and holdings.generations[one[0]] == generations[at]
                if owned and not leading.tells(to, int(one[0])):
                    image = Operation(one, sequences_of(shard, one), image_of(shard, int(one[0])))
                    shard.counters["copied_bytes"] += nbytes(image)
                    shard.tell()
                    leading.add(holdings.shards[to], image)

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
