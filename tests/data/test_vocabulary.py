# SPDX-License-Identifier: Apache-2.0
"""Vocabularies and quantile samples: the same as counting and sorting everything, in bounded memory."""

from collections import Counter as Counts

import numpy as np
import pytest

from oarlock.data import vocabulary
from oarlock.data.quantiles import QuantileSample
from oarlock.data.vocabulary import Counter, Membership
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize(("min_count", "max_size"), [(1, 10**6), (2, 10**6), (1, 100), (3, 7), (10**9, 5)])
def test_counts_against_a_dict(rng: np.random.Generator, min_count: int, max_size: int) -> None:
    # Few low bits differ, so that many values want the same slot.
    codes = (rng.zipf(1.2, 200_000) % 5000).astype(np.uint64) << np.uint64(40)
    codes[::17] = 0
    counter = Counter("c")
    begin = 0
    for size in (0, 1, 100_000, 50_000, 49_999):
        counter.add(codes[begin : begin + size])
        begin += size
    counts = Counts(codes[codes != 0].tolist())
    often = [code for code in sorted(counts, key=lambda code: (-counts[code], code)) if counts[code] >= min_count]
    assert counter.kept(min_count, max_size).tolist() == sorted(often[:max_size])


def test_growth_keeps_all_counts(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(vocabulary, "_RUN", 64)
    codes = np.repeat(rng.permutation(10_000).astype(np.uint64) + np.uint64(16), 2)
    counter = Counter("c")
    counter.add(rng.permutation(codes))
    assert counter.kept(2, 10**6).tolist() == list(range(16, 10_016))
    assert counter.kept(3, 10**6).size == 0


def test_too_many_distinct_values() -> None:
    counter = Counter("town", limit=1000)
    counter.add(np.arange(16, 1016, dtype=np.uint64))
    with pytest.raises(InvalidArgument, match=r"fields town: more than 1,000 distinct values .* use hash = BUCKETS"):
        counter.add(np.array([5, 10**6], np.uint64))


def test_membership(rng: np.random.Generator) -> None:
    for known in ([20], list(range(16, 5000, 3)), [2**64 - 1, 2**64 - 2, 2**63]):
        codes = np.concatenate([rng.integers(0, 6000, 5000).astype(np.uint64), np.array(known, np.uint64)])
        out = np.empty_like(codes)
        Membership(np.array(sorted(known), np.uint64)).keep(codes, out)
        inside = set(known)
        assert out.tolist() == [code if code in inside or not code else 1 for code in codes.tolist()]


def test_quantiles_of_all_or_of_a_sample(rng: np.random.Generator) -> None:
    values = rng.standard_normal(20_000).astype(np.float32)
    values[::9] = np.nan
    present = np.sort(values[~np.isnan(values)])
    exact = QuantileSample("n", 0)
    exact.add(0, values)
    assert exact.bounds(10).tolist() == [present[i * present.size // 10] for i in range(1, 10)]
    # A sample is no function of the batches, and close to the whole.
    drawn = []
    for size in (20_000, 7, 1999):
        sample = QuantileSample("n", 0, size=2000)
        for begin in range(0, values.size, size):
            sample.add(begin, values[begin : begin + size])
        drawn.append(sample.bounds(10).tolist())
    assert drawn[0] == drawn[1] == drawn[2]
    ranks = np.searchsorted(present, drawn[0]) / present.size
    assert np.abs(ranks - np.arange(1, 10) / 10).max() < 0.04


def test_quantiles_of_few_values() -> None:
    sample = QuantileSample("n", 0)
    sample.add(0, np.array([3, 3, 3, 3, 5], np.float32))
    assert sample.bounds(4).tolist() == []
    assert sample.bounds(5).tolist() == [5]
    with pytest.raises(InvalidArgument, match="fields n: the column holds no number"):
        QuantileSample("n", 0).bounds(4)
