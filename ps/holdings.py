# SPDX-License-Identifier: Apache-2.0
"""Holdings: what this shard is to each block, and what it knows of their records.

    nothing    no content here
    copy       a member of the copy set, or about to be: it does what the owner tells it
    owner      ``owned``: it answers clients; or closed by a hand-over, and answers nobody until that has ended

Invariant: a block is owned only after its content is whole, and never again under a record older than the one known here. The
shard's push lock covers it; ``owned`` is read without it, by pulls.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.client.router import ShardAddress
from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import Member, Placement

Numbers = NDArray[np.int32]


@dataclass(frozen=True, order=True)
class Order:
    """A coordinator's order to hand blocks over: the ``number``-th of its ``term``; the newest counts."""

    term: int
    number: int


NO_ORDER = Order(0, 0)


class Holdings:
    """``generations`` int64[blocks]: of the newest record or copy known here, 0: none; ``owners`` int32[blocks] by the records.

    ``me``: this shard, -1 as long as it is none. ``here`` bool[blocks]: there is content; ``owned``: the open owner's;
    ``closed``: under which order, where it is not open.
    """

    def __init__(self, blocks: int) -> None:
        self.me = -1
        self.owned: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self.here: NDArray[np.bool_] = np.zeros(blocks, np.bool_)
        self.generations: NDArray[np.int64] = np.zeros(blocks, np.int64)
        self.owners: Numbers = np.full(blocks, -1, np.int32)
        self.closed: dict[int, Order] = {}
        self.shards: dict[int, ShardAddress] = {}
        # The newest order to hand each block over.
        self._last: dict[int, Order] = {}

    def id_of(self, incarnation: int) -> int:
        """Return which shard a process is, -1 if that is not known here."""
        return next((s.id for s in self.shards.values() if s.incarnation == incarnation), -1)

    def tell_where(self, numbers: Numbers, where: Placement) -> None:
        """Say in a message where other shards' blocks are, as far as that is known here."""
        owners = self.owners[numbers]
        known = np.isin(owners, list(self.shards)) & ~np.isin(numbers, list(self.closed)) & ~self.here[numbers]
        if known.any():
            found = numbers[known]
            order = np.argsort(found)
            shards = [self.shards[s] for s in np.unique(owners[known]).tolist()]
            where.CopyFrom(
                Placement(
                    generation=int(self.generations[found].max()),
                    owners=pack(owners[known][order]),
                    shards=[Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in shards],
                    blocks=pack(found[order]),
                    generations=pack(self.generations[found][order].astype(np.uint64)),
                )
            )

    @property
    def leads(self) -> NDArray[np.bool_]:
        """Return bool[blocks]: the content that this shard owns, open or closed."""
        out: NDArray[np.bool_] = self.owned.copy()
        out[list(self.closed)] = True
        return out

    @property
    def lacks(self) -> bool:
        """Whether a record says that this shard owns a block of which nothing is here."""
        return bool(((self.owners == self.me) & ~self.here).any()) and self.me >= 0

    @property
    def copies(self) -> NDArray[np.bool_]:
        """Return bool[blocks]: content that is a copy of what another shard owns."""
        out: NDArray[np.bool_] = self.here & ~self.owned
        out[list(self.closed)] = False
        return out

    def is_copy(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Return bool[m]: which of these blocks are copies here."""
        out: NDArray[np.bool_] = self.here[numbers] & ~self.owned[numbers]
        if self.closed:
            out &= ~np.isin(numbers, list(self.closed))
        return out

    def close(self, numbers: Numbers, order: Order) -> Numbers:
        """Close owned blocks under an order, unless a newer one is known of them; return those that it closed.

        One that is closed already waits for this order from now on.
        """
        new = [n for n in numbers.tolist() if self._last.get(n, NO_ORDER) < order]
        found = np.array([n for n in new if self.owned[n] or n in self.closed], np.int32)
        self._last.update(dict.fromkeys(new, order))
        self.owned[found] = False
        self.closed.update(dict.fromkeys(found.tolist(), order))
        return found

    def reopen(self, numbers: Iterable[int], order: Order) -> Numbers:
        """Open again what is closed under just this order; return those blocks."""
        found = [n for n in numbers if self.closed.get(n) == order]
        for number in found:
            del self.closed[number]
        self.owned[found] = True
        return np.array(found, np.int32)
