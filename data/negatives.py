# SPDX-License-Identifier: Apache-2.0
"""Negatives: items that a user has no positive with, drawn uniformly from the items of the data.

Invariant: what is drawn for a row is a pure function of (seed, epoch, split, batch, row in the batch) and of the data:
no other row, worker or earlier draw enters. Callable from any thread; the arrays are only read.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oarlock.data.draws import NEGATIVES, absorb, below, stream_of, word
from oarlock.embedding.jit import jit
from oarlock.proto.errors import InvalidArgument

# After this many positives in a row (1 in 10^19 for a user with half of the items) the next free item is taken.
ATTEMPTS = np.uint64(64)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@dataclass(frozen=True)
class Positives:
    """Who has what: user ``users[u]`` has ``items[offsets[u]:offsets[u + 1]]``.

    ``users: uint64[U]`` and each user's part of ``items: uint64[n]`` are strictly ascending; ``offsets: int64[U + 1]``.
    """

    users: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.uint64]


def group_positives(users: npt.NDArray[np.uint64], items: npt.NDArray[np.uint64]) -> Positives:
    """Return the Positives of pairs ``users: uint64[n]``, ``items: uint64[n]``; a pair that repeats counts once."""
    order = np.lexsort((items, users))
    users, items = users[order], items[order]
    fresh = np.ones(users.size, np.bool_)
    fresh[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    users, items = users[fresh], items[fresh]
    distinct, counts = np.unique(users, return_counts=True)
    offsets = np.zeros(distinct.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return Positives(distinct, offsets, items)


@jit
def find(values: npt.NDArray[np.uint64], low: int, high: int, value: np.uint64) -> int:
    """Return the first position in the ascending ``values[low:high]`` that is not below ``value``."""
    while low < high:
        middle = (low + high) >> 1
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def draw_negatives(
    rows: npt.NDArray[np.uint64],
    users: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.int64],
    positives: npt.NDArray[np.uint64],
    catalogue: npt.NDArray[np.uint64],
    stream: np.uint64,
    out: npt.NDArray[np.uint64],
) -> int:
    """Write negatives of ``rows: uint64[b]`` (user ids) to ``out: uint64[b, per_positive]``.

    Return -1, or the first row whose user has every item of the ascending ``catalogue: uint64[I]``.
    """
    size = np.uint64(catalogue.shape[0])
    per_positive = out.shape[1]
    for row in range(rows.shape[0]):
        user = find(users, 0, users.shape[0], rows[row])
        first = last = 0
        if user < users.shape[0] and users[user] == rows[row]:
            first, last = offsets[user], offsets[user + 1]
        for column in range(per_positive):
            place = absorb(stream, np.uint64(row * per_positive + column))
            attempt = _ZERO
            tried = _ZERO
            index = below(absorb(place, attempt), size)
            while True:
                if tried == size:
                    return row
                item = catalogue[index]
                at = find(positives, first, last, item)
                if at == last or positives[at] != item:
                    break
                attempt += _ONE
                if attempt < ATTEMPTS:
                    index = below(absorb(place, attempt), size)
                else:
                    tried += _ONE
                    index = (index + _ONE) % size
            out[row, column] = item
    return -1


class NegativeSampler:
    """Draws ``per_positive`` negatives for every row of a batch, from the ascending ``catalogue: uint64[I]``."""

    def __init__(
        self, positives: Positives, catalogue: npt.NDArray[np.uint64], *, per_positive: int, seed: int
    ) -> None:
        if catalogue.dtype != np.uint64 or catalogue.ndim != 1 or not catalogue.size:
            raise InvalidArgument("negatives: the catalogue must be a non-empty uint64 array of distinct items")
        if per_positive < 0:
            raise InvalidArgument(f"negatives per positive = {per_positive}: give an integer >= 0")
        self._positives = positives
        self._catalogue = catalogue
        self._per_positive = per_positive
        self._seed = seed

    def draw(
        self,
        users: npt.NDArray[np.uint64],
        *,
        epoch: int,
        split: int,
        batch: int,
        out: npt.NDArray[np.uint64] | None = None,
    ) -> npt.NDArray[np.uint64]:
        """Return uint64[b, per_positive] for ``users: uint64[b]``, written to ``out`` if it is given."""
        shape = (users.shape[0], self._per_positive)
        if out is None:
            out = np.empty(shape, np.uint64)
        if users.dtype != np.uint64 or out.dtype != np.uint64 or out.shape != shape:
            raise InvalidArgument(
                f"negatives: users are {users.dtype}{list(users.shape)} and out {out.dtype}{list(out.shape)}; "
                f"expected uint64[b] and uint64[b, {self._per_positive}]"
            )
        stream = stream_of(word(self._seed), word(epoch), word(split), word(batch), word(NEGATIVES))
        known = self._positives
        full = draw_negatives(users, known.users, known.offsets, known.items, self._catalogue, np.uint64(stream), out)
        if full >= 0:
            raise InvalidArgument(
                f"user {users[full]} has all {self._catalogue.size} items, so no negative can be drawn; "
                "leave this user out of the training data"
            )
        return out
