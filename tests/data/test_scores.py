# SPDX-License-Identifier: Apache-2.0
"""Scores against plain counting of pairs, in any cut and order; and bytes from a stranger."""

import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.data import scores as module
from oarlock.data.scores import CLIP, MAX_BYTES, MAX_SAMPLES, METRICS, Scores, merit
from oarlock.proto.errors import InvalidArgument, Malformed, PSError

Sample = Callable[[np.random.Generator, int], tuple[Any, Any]]


def smooth(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    score = rng.random(n, dtype=np.float32)
    return score, (rng.random(n) < score).astype(np.float32)


def tied(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    score, label = smooth(rng, n)
    return np.round(score * 7) / np.float32(7), label


def fractions(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    return tied(rng, n)[0], rng.random(n, dtype=np.float32)


def extremes(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    tiny = np.nextafter(np.float32(0), np.float32(1))
    values = np.array([0, -0.0, tiny, 1e-30, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1], np.float32)
    return rng.choice(values, n), rng.integers(0, 2, n).astype(np.float32)


SAMPLES = (smooth, tied, fractions, extremes)


def of(score: Any, label: Any) -> Scores:
    found = Scores()
    found.add(np.asarray(score, np.float32), np.asarray(label, np.float32))
    return found


def pairs_auc(score: Any, label: Any) -> float:
    """O(n^2): every positive against every negative, a tie counting half."""
    score, y = score.astype(np.float64), label.astype(np.float64)
    won = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
    return float((y[:, None] * (1 - y)[None, :] * won).sum() / (y.sum() * (1 - y).sum()))


def ranks_auc(score: Any, label: Any) -> float:
    """O(n log n): the rank sum of the positives, ties at their mean rank; labels 0 and 1."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    assert len(values)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]
    p = int(label.sum())
    return float((rank[label == 1].sum() - p * (p + 1) / 2) / (p * (len(label) - p)))


def plain(score: Any, label: Any) -> dict[str, float]:
    s, y = score.astype(np.float64), label.astype(np.float64)
    p = np.clip(s, CLIP, 1 - CLIP)
    said = (s > 0.5).astype(np.float64)
    return {
        "auc": pairs_auc(score, label),
        "logloss": float(np.mean(-(y * np.log(p) + (1 - y) * np.log(1 - p)))),
        "accuracy": float(np.mean(said * y + (1 - said) * (1 - y))),
        "calibration": float(s.mean() / y.mean()),
    }


@pytest.mark.parametrize("make", SAMPLES)
@pytest.mark.parametrize("n", [2, 37, 1500])
def test_metrics_are_those_of_plain_counting(rng: np.random.Generator, make: Sample, n: int) -> None:
    score, label = make(rng, n)
    label[:2] = 0, 1
    found, wanted = of(score, label).metrics(), plain(score, label)
    assert tuple(found) == METRICS
    for name in METRICS:
        # Fractions are kept in units of 2^-24.
        assert found[name] == pytest.approx(wanted[name], rel=1e-6 if make is fractions else 1e-12), name
    if make is not fractions:
        assert found["auc"] == pytest.approx(ranks_auc(score, label), rel=1e-12)


def test_auc_of_many_samples_is_exact(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    score, label = smooth(rng, 200_000)
    expected = ranks_auc(score.astype(np.float64), label)
    assert of(score, label).metrics()["auc"] == pytest.approx(expected, rel=1e-13)
    monkeypatch.setattr(module, "_RUN", 1000)
    assert of(score, label).metrics()["auc"] == pytest.approx(expected, rel=1e-13)


@given(st.lists(st.tuples(st.integers(0, (1 << 60) - 1), st.integers(0, (1 << 60) - 1)), max_size=20))
def test_products_are_added_exactly(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(column, np.uint64) for column in (zip(*pairs, strict=True) if pairs else ((), ())))
    assert module._dot(a, b) == sum(x * y for x, y in pairs)


def test_weights_beyond_what_a_float_tells() -> None:
    """2^33 samples on both sides, and one that decides: float sums would give exactly one half."""
    many = Scores()
    many._bits = np.array([0.25, 0.5, 0.75], np.float32).view(np.uint32)
    big = ((1 << 33) - 1) << 24
    many._zeros, many._ones = np.array([0, big, 0], np.uint64), np.array([0, big, 1 << 24], np.uint64)
    many.samples = 2 * ((1 << 33) - 1) + 1
    n = (1 << 33) - 1
    assert many.metrics()["auc"] == (n * n + 2 * n) / (2 * n * (n + 1))
    assert many.metrics()["auc"] != 0.5


def test_a_perfect_a_reversed_and_a_constant_scorer() -> None:
    label = [0, 0, 1, 1, 1]
    assert of([0.1, 0.2, 0.6, 0.7, 0.7], label).metrics()["auc"] == 1.0
    assert of([0.9, 0.8, 0.3, 0.2, 0.2], label).metrics()["auc"] == 0.0
    assert of([0.5] * 5, label).metrics()["auc"] == 0.5
    assert of([0.5] * 5, label).metrics()["accuracy"] == 0.4, "0.5 does not say 1"


def test_the_logarithm_is_clipped() -> None:
    assert of([0.0, 1.0], [1, 0]).metrics()["logloss"] == pytest.approx(-math.log(1e-7), rel=1e-9)
    assert of([1.0, 0.0], [1, 0]).metrics()["logloss"] == pytest.approx(1e-7, rel=1e-6)


def test_what_has_no_meaning_is_none() -> None:
    assert Scores().metrics() == dict.fromkeys(METRICS)
    ones, zeros = of([0.5, 0.75], [1, 1]).metrics(), of([0.5, 0.75], [0, 0]).metrics()
    assert ones == {"auc": None, "logloss": ones["logloss"], "accuracy": 0.5, "calibration": 0.625}
    assert (zeros["auc"], zeros["calibration"], zeros["accuracy"]) == (None, None, 0.5)


@pytest.mark.parametrize("make", SAMPLES)
def test_neither_cut_nor_order_changes_a_bit(rng: np.random.Generator, make: Sample, monkeypatch: Any) -> None:
    score, label = make(rng, 600)
    whole = of(score, label)
    seen = set()
    for order in itertools.permutations(range(4)):
        cuts = np.sort(rng.integers(0, 601, 3))
        parts = [of(s, y) for s, y in zip(np.split(score, cuts), np.split(label, cuts), strict=True)]
        sent = [Scores.from_bytes(parts[i].to_bytes()) for i in order]
        merged = Scores.merge(sent)
        assert merged.samples == 600
        assert merged.to_bytes() == whole.to_bytes()
        seen.add(tuple(merged.metrics().values()))
    monkeypatch.setattr(module, "_PENDING", 10)
    batches = Scores()
    mixed = rng.permutation(600)
    for first in range(0, 600, 7):
        batches.add(score[mixed[first : first + 7]], label[mixed[first : first + 7]])
    assert batches.to_bytes() == whole.to_bytes()
    assert seen == {tuple(whole.metrics().values())}


def test_what_was_added_may_change_afterwards() -> None:
    score, label = np.array([0.2, 0.8], np.float32), np.array([0, 1], np.float32)
    found = of(score, label)
    score[:], label[:] = 0.5, 0.0
    assert found.metrics()["auc"] == 1.0


def test_merging_nothing_and_oneself() -> None:
    assert Scores.merge([]).to_bytes() == Scores().to_bytes()
    one = of([0.25], [1])
    assert Scores.merge([one, one]).samples == 2
    assert one.samples == 1


@pytest.mark.parametrize(
    ("score", "label", "words"),
    [
        ([0.5, np.nan], [0, 1], "score 1 to evaluate is nan.*diverged"),
        ([np.inf], [0], "score 0 .* inf.*sigmoid"),
        ([-1e-30], [0], "score 0"),
        ([1.5], [0], "probabilities"),
        ([0.5], [np.nan], "label 0 to evaluate is nan"),
        ([0.5], [2.0], "label 0"),
        ([0.5], [-1.0], "label 0"),
        ([0.5], [1, 0], "1 scores came with 2 labels"),
        ([[0.5]], [1], r"scores to evaluate: found float32\[1, 1\]"),
    ],
)
def test_bad_samples_are_named(score: Any, label: Any, words: str) -> None:
    found = of([0.25], [1])
    with pytest.raises(InvalidArgument, match=words):
        found.add(np.array(score, np.float32), np.array(label, np.float32))
    assert found.to_bytes() == of([0.25], [1]).to_bytes(), "nothing of it was taken"


def test_bad_dtypes_are_named() -> None:
    good = np.zeros(1, np.float32)
    for score, label in ((np.zeros(1), good), (good, np.zeros(1, np.int64)), ([0.5], good)):
        with pytest.raises(InvalidArgument, match=r"expected float32\[n\]"):
            Scores().add(score, label)  # type: ignore[arg-type]


# Bytes


def header(
    bits: int = 0, width0: int = 1, width1: int = 1, count: int = 1, magic: bytes = b"SCOR", version: int = 1
) -> bytes:
    return struct.pack("<4sHBBB3xI", magic, version, bits, width0, width1, count)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


GOOD = header(count=2) + floats(0.25, 0.5) + bytes([3, 0]) + bytes([1, 7])


def test_the_bytes_are_those_that_the_page_says() -> None:
    found = of([0.25] * 4 + [0.5] * 7, [0, 1, 0, 0] + [1] * 7)
    assert found.to_bytes() == GOOD
    half = of([0.25], [0.5])
    assert half.to_bytes() == header(24, 4, 4) + floats(0.25) + struct.pack("<II", 1 << 23, 1 << 23)
    wide = of([0.5] * 256, [0] * 256)
    assert wide.to_bytes() == header(0, 2, 1) + floats(0.5) + struct.pack("<HB", 256, 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "less than a header"),
        (GOOD[:10], "less than a header"),
        (GOOD[:-1], "do not make"),
        (GOOD + b"\0", "do not make"),
        (header(count=0xFFFFFFFF), "do not make"),
        (header(magic=b"SCOT", count=0), "begin with"),
        (header(version=2, count=0), "version 1"),
        (header(bits=23, count=0), "23 bits"),
        (header(width0=3, count=0), "3 and 1 bytes"),
        (header(width1=0, count=0), "1 and 0 bytes"),
        (header(count=0)[:9] + b"\1" + header(count=0)[10:], "a header"),
        (header(count=2) + floats(0.5, 0.25) + bytes([1] * 4), "ascending"),
        (header(count=2) + floats(0.5, 0.5) + bytes([1] * 4), "distinct"),
        (header() + floats(1.5) + bytes([1, 1]), r"in \[0, 1\]"),
        (header() + floats(-0.0) + bytes([1, 1]), r"in \[0, 1\]"),
        (header() + floats(math.nan) + bytes([1, 1]), r"in \[0, 1\]"),
        (header() + floats(math.inf) + bytes([1, 1]), r"in \[0, 1\]"),
        (header() + floats(0.5) + bytes([0, 0]), "no number of samples"),
        (header(24, 4, 4) + floats(0.5) + struct.pack("<II", 1 << 23, 1), "no number of samples"),
        (header(24, 4, 1) + floats(0.5) + struct.pack("<IB", 1 << 24, 0), "wider than"),
        (header(24, count=0), "wider than"),
        (header(width0=2) + floats(0.5) + struct.pack("<HB", 3, 1), "wider than"),
        (header(0, 8, 1) + floats(0.5) + struct.pack("<QB", (1 << 64) - 1, 1), "more than"),
        (header(0, 8, 8) + floats(0.5) + struct.pack("<QQ", 1 << 63, 1 << 63), "more than"),
        (header(0, 8, 1) + floats(0.5) + struct.pack("<QB", MAX_SAMPLES, 1), "more than"),
        (header(24, 8, 8) + floats(0.5) + struct.pack("<QQ", (1 << 63) + 1, (1 << 63) - 1), "more than"),
    ],
)
def test_hostile_bytes_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        Scores.from_bytes(data)


@given(st.data())
def test_what_is_taken_is_what_would_be_written(data: st.DataObject) -> None:
    """Whatever is changed in good bytes: they are refused, or stand for something else that has metrics."""
    made = data.draw(st.sampled_from([GOOD, of([0.25, 0.5, 0.5], [0.5, 1, 0.125]).to_bytes(), Scores().to_bytes()]))
    changed = bytearray(made)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Scores.from_bytes(bytes(changed))
    except PSError:
        return
    assert found.to_bytes() == bytes(changed)
    assert all(value is None or math.isfinite(value) for value in found.metrics().values())


def test_what_is_too_large_says_what_to_do(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="make evaluation splits smaller"):
        Scores.from_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(Malformed):
        Scores.from_bytes(bytes(MAX_BYTES))
    score, label = smooth(rng, 1000)
    found = of(score, label)
    size = len(found.to_bytes())
    monkeypatch.setattr(module, "MAX_BYTES", size - 1)
    with pytest.raises(InvalidArgument, match=f"{size} bytes, more than {size - 1}: make evaluation splits smaller"):
        found.to_bytes()


def test_too_many_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLES", 3)
    found = of([0.5, 0.5], [0, 1])
    with pytest.raises(InvalidArgument, match="more than 3 samples"):
        found.add(np.full(2, 0.5, np.float32), np.zeros(2, np.float32))
    with pytest.raises(InvalidArgument, match="more than 3 samples"):
        Scores.merge([found, found])


# Which value is better


def test_merit() -> None:
    assert merit("auc", 0.8) > merit("auc", 0.7) > merit("auc", None) == -math.inf
    assert merit("hr@10", 0.8) > merit("hr@10", 0.7) > merit("hr@10", math.nan)
    assert merit("logloss", 0.3) > merit("logloss", 0.4) > merit("logloss", None)
    calibrations = (1.0, 1.1, 0.5, 4.0, 0.0, None)
    values = [merit("calibration", c) for c in calibrations]
    assert values == sorted(values, reverse=True)
    assert merit("calibration", 2.0) == merit("calibration", 0.5)
