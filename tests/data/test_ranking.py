# SPDX-License-Identifier: Apache-2.0
"""Ranking: cases done by hand, the kernel's plain twin, and what a tie is worth."""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from oarlock.data.ranking import RankingSums, count_lists, expected_hit_rate, rank_lists, sum_ranks
from oarlock.proto.errors import InvalidArgument

NAN = float("nan")


def count_slowly(
    scores: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64], items: npt.NDArray[np.uint64]
) -> tuple[list[int], list[int]]:
    above, tied = [], []
    for first, last in pairwise(offsets):
        listed, worth, target = items[first:last], scores[first:last], scores[first]
        others = listed != listed[0]
        equal = set(listed[others & (worth == target)].tolist())
        ahead = set(listed[others & ~(worth <= target)].tolist())
        above.append(len(ahead))
        tied.append(len(equal))
    return above, tied


def lists_of(*lists: list[tuple[int, float]]) -> tuple[npt.NDArray[np.float32], ...]:
    flat = [pair for one in lists for pair in one]
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return (
        np.array([score for _, score in flat], np.float32),
        offsets,
        np.array([item for item, _ in flat], np.uint64),
    )


@pytest.mark.parametrize(
    ("listed", "rank"),
    [
        ([(5, 0.9), (1, 0.1), (2, 0.8)], 0),
        ([(5, 0.5), (1, 0.6), (2, 0.4), (3, 0.7)], 2),
        ([(5, 0.5), (1, 0.5), (2, 0.5)], 2),
        ([(5, 0.5), (5, 0.5), (1, 0.4)], 0),
        ([(5, 0.5), (1, 0.6), (1, 0.6), (2, 0.7)], 2),
        ([(5, 0.5), (1, 0.5), (1, 0.5)], 1),
        ([(5, 0.5), (1, NAN), (2, 0.1)], 1),
        ([(5, NAN), (1, 0.1), (2, NAN), (5, 0.9)], 2),
        ([(5, math.inf), (1, math.inf), (2, -math.inf)], 1),
        ([(5, 0.0), (1, -0.0)], 1),
        ([(2**64 - 1, 0.5), (0, 0.6), (2**63, 0.7)], 2),
        ([(5, 0.5)], 0),
    ],
)
def test_ranks_by_hand(listed: list[tuple[int, float]], rank: int) -> None:
    assert rank_lists(*lists_of(listed)).tolist() == [rank]
    # What other lists hold must not matter: the scratch set is shared.
    around = [(7, 0.5), (1, 0.6), (2, 0.6), (0, 0.6)]
    assert rank_lists(*lists_of(around, listed, around, listed)).tolist() == [3, rank, 3, rank]


def test_kernel_equals_its_twin(rng: np.random.Generator) -> None:
    lengths = rng.integers(1, 120, 300)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = rng.integers(0, 60, offsets[-1]).astype(np.uint64) * np.uint64(2**57 + 64)
    worth = rng.integers(0, 20, 60)
    # An item has one score in a list, as it has from a model.
    scores = (worth[(items // np.uint64(2**57 + 64)).astype(np.int64)] / 4).astype(np.float32)
    scores[scores == 3] = np.nan
    above, tied = count_lists(scores, offsets, items)
    slow_above, slow_tied = count_slowly(scores, offsets, items)
    assert above.tolist() == slow_above
    assert tied.tolist() == slow_tied


def test_a_constant_scorer_reaches_nothing(rng: np.random.Generator) -> None:
    items = np.stack([rng.permutation(3000)[:100] for _ in range(200)]).reshape(-1).astype(np.uint64)
    offsets = np.arange(201, dtype=np.int64) * 100
    for score in (0.0, 1.0, NAN):
        ranks = rank_lists(np.full(items.size, score, np.float32), offsets, items)
        assert ranks.tolist() == [99] * 200
        sums = sum_ranks(ranks, 10)
        assert (sums.hit_rate, sums.mean_ndcg) == (0.0, 0.0)


def test_sums() -> None:
    ranks = np.array([0, 1, 9, 10, 3], np.int64)
    sums = sum_ranks(ranks, 10)
    assert (sums.lists, sums.hits) == (5, 4)
    assert sums.ndcg == pytest.approx(1 + 1 / math.log2(3) + 1 / math.log2(11) + 1 / math.log2(5), rel=1e-15)
    assert sum_ranks(ranks, 1) == RankingSums(5, 1, 1.0)
    assert sum_ranks(ranks[:2], 10) + sum_ranks(ranks[2:], 10) == pytest.approx(sums)
    assert RankingSums(0, 0, 0.0).hit_rate == RankingSums(0, 0, 0.0).mean_ndcg == 0.0
    with pytest.raises(InvalidArgument, match="k = 0"):
        sum_ranks(ranks, 0)


def test_no_list_at_all() -> None:
    ranks = rank_lists(np.empty(0, np.float32), np.zeros(1, np.int64), np.empty(0, np.uint64))
    assert sum_ranks(ranks, 10) == RankingSums(0, 0, 0.0)


def test_expected_hits_break_ties_evenly() -> None:
    above, tied = np.array([0, 9, 9, 10, 0, 5]), np.array([0, 0, 3, 0, 99, 4])
    chances = [1, 1, 1 / 4, 0, 10 / 100, 1]
    assert expected_hit_rate(above, tied, 10) == pytest.approx(sum(chances) / 6)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 2], "from 0 to the number"), ([1, 3], "from 0 to"), ([0, 0, 3], "with a positive"), ([], "one more")],
)
def test_offsets_that_do_not_fit_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        rank_lists(np.zeros(3, np.float32), np.array(offsets, np.int64), np.zeros(3, np.uint64))


def test_wrong_types_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="found scores float64"):
        rank_lists(np.zeros(3), np.array([0, 3]), np.zeros(3, np.uint64))  # type: ignore[arg-type]
