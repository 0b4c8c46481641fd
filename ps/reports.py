# SPDX-License-Identifier: Apache-2.0
"""Reports: what the coordinator has to hear of copies, until it has answered.

Invariant: of a block there is at most one report of a kind; a newer one takes its place. Of what was answered nothing is left to
do but for a block that was handed over: it stays closed until its record is another one, or it is opened again. The coordinator
that was to see to that may die: the next one is told of it anew. Thread-safe.
"""

from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.coordinator_pb2 import HANDED
from oarlock.ps.holdings import NO_ORDER, Numbers, Order

Generations = NDArray[np.int64]


class Matter(NamedTuple):
    """What is told of blocks: a number of ``Told``, about which shard, and under which order."""

    told: int
    shard: int
    order: Order


class Reports:
    """Blocks by what is to be told of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        # By kind and block; and of which record.
        self._open: dict[tuple[int, int], tuple[Matter, int]] = {}
        # The same of hand-overs that were heard, and that nothing has come of here.
        self._heard: dict[tuple[int, int], tuple[Matter, int]] = {}
        # Of the coordinator that is in charge, as far as is known here.
        self.term = 0

    def add(
        self, told: int, numbers: Numbers, generations: Generations, *, shard: int = 0, order: Order = NO_ORDER
    ) -> None:
        """Tell this of blocks, whose records were of ``generations`` int64[m] when it came to be so."""
        matter = Matter(told, shard, order)
        with self._lock:
            for number, generation in zip(numbers.tolist(), generations.tolist(), strict=True):
                self._open[told, number] = matter, generation
                self._heard.pop((told, number), None)

    def forget(self, numbers: Numbers, told: int | None = None) -> None:
        """Tell nothing more of these blocks, or nothing of this kind."""
        with self._lock:
            if not self._open and not self._heard:
                return
            gone = set(numbers.tolist())
            for known in (self._open, self._heard):
                for key in [k for k in known if k[1] in gone and told in (None, k[0])]:
                    del known[key]

    def answered(self, matter: Matter, numbers: Numbers, generations: Generations, term: int) -> None:
        """The coordinator of ``term``, in which it was told, has heard it."""
        with self._lock:
            for number, generation in zip(numbers.tolist(), generations.tolist(), strict=True):
                key = (matter.told, number)
                if self._open.get(key) == (matter, generation) and term == self.term:
                    del self._open[key]
                    if matter.told == HANDED:
                        self._heard[key] = matter, generation

    def in_charge(self, term: int) -> None:
        """A coordinator of this term is in charge: another one than before has to hear of what nothing has come of."""
        with self._lock:
            if term > self.term:
                self.term = term
                self._open.update(self._heard)
                self._heard.clear()

    def waiting(self) -> list[tuple[Matter, Numbers, Generations]]:
        """Return all that is to be told: blocks, ascending, with the generations of their records."""
        with self._lock:
            found: dict[Matter, list[tuple[int, int]]] = {}
            for (_, number), (matter, generation) in self._open.items():
                found.setdefault(matter, []).append((number, generation))
        out = []
        for matter, each in found.items():
            numbers, generations = zip(*sorted(each), strict=True)
            out.append((matter, np.array(numbers, np.int32), np.array(generations, np.int64)))
        return out
