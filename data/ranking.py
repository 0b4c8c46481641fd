# SPDX-License-Identifier: Apache-2.0
"""Ranking of one positive among listed items: ranks, HR@K and NDCG@K.

Invariant: nothing helps the positive. An item with the same score, a score that is not a number, and every item of a
list whose positive has no number are ranked before it; so a constant scorer reaches 0 at every K up to the length of
the list. A listed item equal to the positive is left out, and one that is listed twice counts once. Callable from any
thread.

    HR@K = share of lists with rank < K,   NDCG@K = mean of 1 / log2(rank + 2) over those, 0 for the others
    (rank counts from 0; He et al., Neural Collaborative Filtering, WWW 2017, section 4.1)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit
from oarlock.proto.errors import InvalidArgument


@jit
def count_ahead(
    scores: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    items: npt.NDArray[np.uint64],
    slots: npt.NDArray[np.int64],
    above: npt.NDArray[np.int64],
    tied: npt.NDArray[np.int64],
) -> None:
    """Count, per list, the distinct items scored above the positive (or not a number) and those scored equal to it.

    List r is ``offsets[r]:offsets[r + 1]`` with the positive first. ``slots: int64[s]`` is scratch filled with -1, s a
    power of two larger than the longest list: a hash set whose entries of earlier lists are recognised by their
    position.
    """
    mask = np.uint64(slots.shape[0] - 1)
    one = np.uint64(1)
    for row in range(offsets.shape[0] - 1):
        first, last = offsets[row], offsets[row + 1]
        above[row] = 0
        tied[row] = 0
        positive, target = items[first], scores[first]
        for i in range(first + 1, last):
            item, score = items[i], scores[i]
            if item == positive or score < target:
                continue
            slot = mix64(item) & mask
            repeated = False
            while slots[slot] >= first:
                if items[slots[slot]] == item:
                    repeated = True
                    break
                slot = (slot + one) & mask
            if repeated:
                continue
            slots[slot] = i
            if score == target:
                tied[row] += 1
            else:
                above[row] += 1


@dataclass(frozen=True)
class RankingSums:
    """Sums over ``lists`` lists, to be added up before they are divided."""

    lists: int
    hits: int
    ndcg: float

    def __add__(self, other: "RankingSums") -> "RankingSums":
        return RankingSums(self.lists + other.lists, self.hits + other.hits, self.ndcg + other.ndcg)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lists if self.lists else 0.0

    @property
    def mean_ndcg(self) -> float:
        return self.ndcg / self.lists if self.lists else 0.0


def count_lists(
    scores: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64], items: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (above, tied), both int64[m]: how many listed items are scored above each positive, and equal to it.

    ``scores: float32[n]`` and ``items: uint64[n]`` are cut by ``offsets: int64[m + 1]`` into lists, each with its
    positive first.
    """
    if scores.dtype != np.float32 or items.dtype != np.uint64 or offsets.dtype != np.int64:
        raise InvalidArgument(
            f"ranking: found scores {scores.dtype}, offsets {offsets.dtype}, items {items.dtype}; "
            "expected float32, int64, uint64"
        )
    if scores.ndim != 1 or scores.shape != items.shape or offsets.ndim != 1 or not offsets.size:
        raise InvalidArgument("ranking: scores and items must have one length and offsets one more than the lists")
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != scores.size or (lengths < 1).any():
        raise InvalidArgument("ranking: offsets must run from 0 to the number of scores, each list with a positive")
    longest = int(lengths.max()) if lengths.size else 1
    slots = np.full(2 << longest.bit_length(), -1, np.int64)
    above = np.empty(lengths.size, np.int64)
    tied = np.empty(lengths.size, np.int64)
    count_ahead(scores, offsets, items, slots, above, tied)
    return above, tied


def rank_lists(
    scores: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64], items: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Return int64[m]: the rank, from 0, of each list's positive, with ties against it (arguments: count_lists)."""
    above, tied = count_lists(scores, offsets, items)
    return above + tied


def sum_ranks(ranks: npt.NDArray[np.int64], k: int) -> RankingSums:
    """Return the sums of HR@k and NDCG@k over ``ranks: int64[m]``."""
    if k < 1:
        raise InvalidArgument(f"ranking at k = {k}: give an integer >= 1")
    hits = ranks[ranks < k]
    return RankingSums(ranks.size, hits.size, float(np.sum(1.0 / np.log2(hits + 2.0))))


def expected_hit_rate(above: npt.NDArray[np.int64], tied: npt.NDArray[np.int64], k: int) -> float:
    """Return the mean chance of rank < k when every tie is broken evenly: what a scorer is worth before luck.

    ``above`` and ``tied`` come from count_lists. With t ties the rank is uniform on above .. above + t.
    """
    chance = np.clip(k - above, 0, tied + 1) / (tied + 1)
    return float(chance.mean()) if chance.size else 0.0
