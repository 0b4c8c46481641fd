# SPDX-License-Identifier: Apache-2.0
import itertools

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.pooling import POOLINGS, pool, pool_gradients
from oarlock.proto.errors import InvalidArgument, Malformed

MANY = 300 if reference.JIT else 40


def divisor(kind, count):
    return {"sum": np.float32(1), "mean": np.float32(count), "sqrtn": np.sqrt(np.float32(count))}[kind]


def pooled(rows, inverse, offsets, kind):
    """The twin of pool()."""
    out = np.zeros((len(offsets) - 1, rows.shape[1]), rows.dtype)
    for s, (first, end) in enumerate(itertools.pairwise(offsets)):
        for i in range(first, end):
            out[s] += rows[inverse[i]]
        if end > first:
            out[s] /= divisor(kind, end - first)
    return out


def spread(gradients, inverse, offsets, kind, unique):
    """The twin of pool_gradients()."""
    out = np.zeros((unique, gradients.shape[1]), np.float32)
    for s, (first, end) in enumerate(itertools.pairwise(offsets)):
        for i in range(first, end):
            out[inverse[i]] += gradients[s] / divisor(kind, end - first)
    return out


def fields(rng, n, segments):
    """Offsets of segments of any length, many of them empty, the first and the last too."""
    inner = np.sort(rng.integers(0, n + 1, max(segments - 1, 0)))
    inner[: len(inner) // 4] = 0
    inner[len(inner) - len(inner) // 4 :] = n
    return np.concatenate([[0], inner, [n]])[: segments + 1].astype(np.int64)


CASES = {
    "no segment": (np.zeros(0, np.int32), np.zeros(1, np.int64), 0),
    "no segment, some keys": (np.zeros(0, np.int32), np.zeros(1, np.int64), 3),
    "empty segments only": (np.zeros(0, np.int32), np.zeros(4, np.int64), 2),
    "one position": (np.zeros(1, np.int32), np.array([0, 1]), 1),
    "one segment": (np.array([1, 0, 1, 1], np.int32), np.array([0, 4]), 2),
    "all the same key": (np.zeros(9, np.int32), np.array([0, 2, 2, 7, 9]), 1),
    "every length to 9": (np.arange(45, dtype=np.int32) % 11, np.cumsum(np.arange(10)), 11),
    "ends are empty": (np.array([2, 0], np.int32), np.array([0, 0, 1, 1, 2, 2]), 3),
}
for _seed in range(3):
    _rng = np.random.default_rng(_seed)
    CASES[f"many {_seed}"] = (_rng.integers(0, 37, MANY).astype(np.int32), fields(_rng, MANY, 50), 37)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [1, 5, 16])
def test_both_ways_equal_the_twins_to_the_bit(case, kind, dim):
    inverse, offsets, unique = CASES[case]
    rng = np.random.default_rng(dim)
    wide = 10.0 ** rng.integers(-4, 4, (unique, 1))
    rows = (rng.normal(size=(unique, dim)) * wide).astype(np.float32)
    for form in (np.int64, np.int32):
        out = np.full((len(offsets) - 1, dim), np.nan, np.float32)
        pool(rows, inverse, offsets.astype(form), kind, out)
        assert out.tobytes() == pooled(rows, inverse, offsets, kind).tobytes()
        gradients = rng.normal(size=out.shape).astype(np.float32)
        back = np.full((unique, dim), np.nan, np.float32)
        pool_gradients(gradients, inverse, offsets.astype(form), kind, back)
        assert back.tobytes() == spread(gradients, inverse, offsets, kind, unique).tobytes()


def test_pooling_of_raw_keys_is_what_one_would_write_in_numpy():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 20, MANY, dtype=np.uint64)
    offsets = fields(rng, MANY, 31)
    found = KeySorter().build(raw, table_salt("t"), 2, np.arange(4, dtype=np.int32))
    values = {key: rng.normal(size=3).astype(np.float32) for key in raw.tolist()}
    rows = np.array([values[key] for key in found.keys.tolist()])
    each = np.array([values[key] for key in raw.tolist()])
    parts = [each[first:end].astype(np.float64) for first, end in itertools.pairwise(offsets)]
    expected = {
        "sum": [p.sum(axis=0) for p in parts],
        "mean": [p.mean(axis=0) if len(p) else np.zeros(3) for p in parts],
        "sqrtn": [p.sum(axis=0) / max(len(p), 1) ** 0.5 for p in parts],
    }
    assert any(len(p) == 0 for p in parts)
    for kind in POOLINGS:
        out = np.empty((31, 3), np.float32)
        pool(rows, found.inverse, offsets, kind, out)
        np.testing.assert_allclose(out, expected[kind], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
def test_gradients_agree_with_finite_differences(kind):
    inverse = np.array([0, 2, 2, 1, 0, 3, 3, 3], np.int32)
    offsets = np.array([0, 3, 3, 4, 8])
    rng = np.random.default_rng(1)
    # Pooling is linear in rows: a step as large as the values has no error but rounding.
    rows, weights = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)

    def loss(values):
        out = np.empty((4, 2), np.float32)
        pool(values, inverse, offsets, kind, out)
        return float((out.astype(np.float64) * weights).sum())

    back = np.empty((5, 2), np.float32)
    pool_gradients(weights, inverse, offsets, kind, back)
    for k in range(5):
        for c in range(2):
            step = np.zeros_like(rows)
            step[k, c] = 0.5
            assert back[k, c] == pytest.approx(loss(rows + step) - loss(rows - step), abs=1e-5)
    assert back[4].tolist() == [0, 0]


BAD_OFFSETS = {
    "does not begin with 0": [1, 2, 3],
    "ends early": [0, 1, 2],
    "ends late": [0, 1, 4],
    "falls": [0, 5, 3],
    "is below 0": [0, -1, 3],
    "falls by more than an int64 holds": [0, (1 << 63) - 1, -(1 << 63), -1, 3],
}


@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_offsets_that_are_no_segments_are_refused(case):
    offsets = np.array(BAD_OFFSETS[case], np.int64)
    inverse, rows = np.zeros(3, np.int32), np.ones((1, 2), np.float32)
    values = np.ones((len(offsets) - 1, 2), np.float32)
    for call, out in ((pool, values), (pool_gradients, rows)):
        with pytest.raises(Malformed, match="begin with 0, never fall and end with the number of positions, 3"):
            call(values if call is pool_gradients else rows, inverse, offsets, "mean", out)


def test_what_would_leave_the_arrays_is_refused():
    inverse, offsets = np.array([0, 1, 1], np.int32), np.array([0, 2, 3])
    rows, values = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    for call in (
        lambda i, o, kind, r, v: pool(r, i, o, kind, v),
        lambda i, o, kind, r, v: pool_gradients(v, i, o, kind, r),
    ):
        call(inverse, offsets, "sum", rows, values)
        for bad in (inverse + np.int32(1), inverse - np.int32(1)):
            with pytest.raises(Malformed, match="inverse points outside the 2"):
                call(bad, offsets, "sum", rows, values)
        with pytest.raises(Malformed, match="inverse: expected an array of int32"):
            call(inverse.astype(np.int64), offsets, "sum", rows, values)
        for strange in (
            offsets.astype(np.float64),
            offsets.astype(np.uint64),
            offsets.reshape(1, -1),
            offsets.tolist(),
        ):
            with pytest.raises(Malformed, match="offsets: expected an array of int64"):
                call(inverse, strange, "sum", rows, values)
        for wrong in (offsets[:2], np.array([0, 1, 2, 3]), offsets[:0]):
            with pytest.raises(Malformed, match="offsets do not fit"):
                call(inverse, wrong, "sum", rows, values)
        with pytest.raises(Malformed, match="one dim"):
            call(inverse, offsets, "sum", rows[:, :2].copy(), values)
        with pytest.raises(Malformed, match="expected an array of float32"):
            call(inverse, offsets, "sum", rows.astype(np.float64), values)
        with pytest.raises(Malformed, match="expected an array of float32"):
            call(inverse, offsets, "sum", rows, values.astype(np.float64))
        with pytest.raises(InvalidArgument, match="give one of sum, mean, sqrtn"):
            call(inverse, offsets, "max", rows, values)
    frozen = values.copy()
    frozen.flags.writeable = False
    pool_gradients(frozen, inverse, offsets, "sum", rows)
    for call in (pool, pool_gradients):
        with pytest.raises(InvalidArgument, match="writable"):
            call(rows, inverse, offsets, "sum", frozen)


def test_arrays_that_may_not_be_written_are_read_all_the_same():
    def wire(array):
        return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

    inverse, offsets = np.array([0, 1, 1], np.int32), np.array([0, 2, 3])
    rows, out = np.arange(4, dtype=np.float32).reshape(2, 2), np.empty((2, 2), np.float32)
    pool(wire(rows), wire(inverse), wire(offsets), "mean", out)
    assert out.tolist() == [[1, 2], [2, 3]]
