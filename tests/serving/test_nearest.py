# SPDX-License-Identifier: Apache-2.0
"""Nearest rows: the exact search against numpy, the index against the exact search, both kept in step with rows that change."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.proto.errors import InvalidArgument
from oarlock.serving import vectors
from oarlock.serving.nearest import NearestIndex
from oarlock.serving.vectors import COSINE, INNER, Vectors

Rows = dict[int, np.ndarray[Any, Any]]


def mixture(n: int, dim: int, seed: int = 0) -> Any:
    """Points of 50 Gaussians, and a function that draws more."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (50, dim))

    def draw(count: int) -> Any:
        return (centres[rng.integers(0, 50, count)] + 0.5 * rng.normal(0, 1, (count, dim))).astype(np.float32)

    return draw(n), draw


def by_numpy(rows: Rows, query: Any, k: int, metric: str) -> list[tuple[int, float]]:
    """The slow, obvious way."""
    found = []
    for key, row in rows.items():
        score = float(np.dot(row.astype(np.float64), query.astype(np.float64)))
        if metric == COSINE:
            length = float(np.linalg.norm(row.astype(np.float64)) * np.linalg.norm(query.astype(np.float64)))
            score = score / length if length else 0.0
        found.append((key, score))
    return sorted(found, key=lambda one: -one[1])[:k]


def check(index: Vectors | NearestIndex, rows: Rows, query: Any, k: int, metric: str, **options: Any) -> None:
    found = index.exact(query[None], k) if isinstance(index, Vectors) else index.search(query[None], k, **options)[0]
    want = by_numpy(rows, query, k, metric)
    assert found.counts[0] == len(want)
    assert not found.keys[0, len(want) :].any()
    assert np.isneginf(found.scores[0, len(want) :]).all()
    assert np.allclose(found.scores[0, : len(want)], [score for _, score in want], atol=1e-5)
    assert (np.diff(found.scores[0, : len(want)]) <= 0).all()
    scores = dict(by_numpy(rows, query, len(rows), metric))
    assert np.allclose([scores[int(key)] for key in found.keys[0, : len(want)]], [s for _, s in want], atol=1e-5)
    assert len(set(found.keys[0, : len(want)].tolist())) == len(want)


@pytest.mark.parametrize("metric", [INNER, COSINE])
@settings(max_examples=40)
@given(data=st.data())
def test_vectors_are_what_a_dict_of_them_is(metric: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    model: Rows = {}
    made = Vectors(3, metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "BLOCK_ROWS", 7)
        for _ in range(data.draw(st.integers(1, 8))):
            keys = np.array(list(data.draw(st.sets(st.one_of(st.integers(0, 40), st.just(2**64 - 1))))), np.uint64)
            if data.draw(st.booleans()):
                rows = rng.normal(0, 1, (len(keys), 3)).astype(np.float32)
                rows[: len(keys) // 5] = 0
                slots, known = made.put(keys, rows)
                assert known.tolist() == [int(key) in model for key in keys]
                assert (made.find(keys) == slots).all()
                model |= dict(zip(keys.tolist(), rows, strict=True))
            else:
                gone = made.drop(keys)
                assert len(gone) == sum(model.pop(key, None) is not None for key in keys.tolist())
            assert made.keys.tolist() == sorted(model)
            assert len(set(made.find(made.keys).tolist())) == made.rows == len(model) == int(made.used.sum())
            check(made, model, rng.normal(0, 1, 3).astype(np.float32), data.draw(st.integers(1, 50)), metric)


def test_filters_are_of_keys() -> None:
    rows, draw = mixture(500, 8)
    keys = np.arange(500, dtype=np.uint64) * np.uint64(3)
    model = dict(zip(keys.tolist(), rows, strict=True))
    index = NearestIndex(8, ann=False)
    index.build(keys, rows)
    query = draw(1)[0]
    among, without = keys[::7], keys[::2]
    asked = np.concatenate([among, [1, 2], among[:3]]).astype(np.uint64)  # not there, and twice
    for options, left in (
        ({"among": asked}, among),
        ({"without": without}, np.setdiff1d(keys, without)),
        ({"among": asked, "without": without}, np.setdiff1d(among, without)),
        ({"among": keys[:0]}, keys[:0]),
        ({"without": keys}, keys[:0]),
    ):
        check(index, {int(key): model[int(key)] for key in left}, query, 100, INNER, **options)


@pytest.mark.parametrize("metric", [INNER, COSINE])
def test_the_index_finds_what_exact_search_does_also_after_changes(metric: str) -> None:
    pytest.importorskip("faiss")
    n, dim = 12_000, 16
    rows, draw = mixture(n, dim)
    keys = np.random.default_rng(1).permutation(1 << 20)[:n].astype(np.uint64) << np.uint64(43)
    index = NearestIndex(dim, metric)
    index.build(keys, rows, stamp="first")
    assert index.probes > 0
    assert index.recall is not None
    assert index.recall >= 0.98
    assert index.nbytes > rows.nbytes
    model = dict(zip(keys.tolist(), rows, strict=True))

    def recall() -> float:
        queries, shares = draw(50), []
        truth, _ = index.search(queries, 100, exact=True)
        found, stamp = index.search(queries, 100)
        assert stamp == index.stamp
        for query, want, have, scores in zip(queries, truth.keys, found.keys, found.scores, strict=True):
            assert set(have.tolist()) <= model.keys()
            # Rows are compared as they are now, and not as they were.
            vectors = np.array([model[key] for key in have.tolist()], np.float64)
            length = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query) if metric == COSINE else 1
            assert np.allclose(scores, vectors @ query / length, atol=1e-4)
            shares.append(len(np.intersect1d(want, have)) / 100)
        return float(np.mean(shares))

    assert recall() >= 0.95
    changed, moved = keys[:1200], draw(1200)
    index.update(changed, moved, stamp="second")
    model |= dict(zip(changed.tolist(), moved, strict=True))
    gone = keys[1200:2000]
    assert index.remove(np.concatenate([gone, gone[:5], np.array([3], np.uint64)])) == 800
    for key in gone.tolist():
        del model[key]
    came = np.arange(500, dtype=np.uint64)
    new = draw(500)
    index.update(came, new)
    model |= dict(zip(came.tolist(), new, strict=True))
    assert index.rows == len(model) == n - 300
    assert index.stamp == "second"
    assert recall() >= 0.95
    nearest, _ = index.search(moved[:1], 50)
    left, _ = index.search(moved[:1], 50, without=nearest.keys[0, :10])
    assert left.keys[0, :40].tolist() == nearest.keys[0, 10:].tolist()


def test_the_last_of_a_key_counts() -> None:
    index = NearestIndex(2, ann=False)
    index.build(np.array([5], np.uint64), np.ones((1, 2), np.float32))
    twice = np.array([[1, 0], [0, 1], [0, 3]], np.float32)
    index.update(np.array([5, 7, 5], np.uint64), twice)
    found, _ = index.search(np.array([[0.0, 1.0]], np.float32), 3)
    assert found.keys[0].tolist() == [5, 7, 0]
    assert found.scores[0, :2].tolist() == [3.0, 1.0]
    index.update(np.empty(0, np.uint64), np.empty((0, 2), np.float32))
    with pytest.raises(InvalidArgument, match="rows of"):
        index.update(np.array([5], np.uint64), np.ones((1, 3), np.float32))
    with pytest.raises(InvalidArgument, match="choose one of inner, cosine"):
        NearestIndex(2, "manhattan", ann=False)


def test_a_search_sees_all_of_an_update_or_nothing() -> None:
    n = 2000
    keys = np.arange(n, dtype=np.uint64)
    index = NearestIndex(4, ann=False)
    index.build(keys, np.full((n, 4), 1, np.float32), stamp=1)
    over, wrong, seen = threading.Event(), [], set()

    def ask() -> None:
        while not over.is_set():
            found, stamp = index.search(np.ones((1, 4), np.float32), n)
            seen.add(stamp)
            if set(found.scores[0].tolist()) != {4.0 * stamp}:
                wrong.append(stamp)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for stamp in range(2, 60):
        index.update(keys, np.full((n, 4), stamp, np.float32), stamp=stamp)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InvalidArgument, match="pip install"):
        NearestIndex(4)
    NearestIndex(4, ann=False)
