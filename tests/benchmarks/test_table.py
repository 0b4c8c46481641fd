# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the memory engine: its keys, its requests, and a C twin that gives what a table gives. No times."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from oarlock.benchmarks import table_speed as speed
from oarlock.benchmarks.table import SIZES, measure, standing
from oarlock.benchmarks.table_keys import LAWS, Universe
from oarlock.benchmarks.table_store import fill, make, payload, universe_of
from oarlock.benchmarks.table_twin import COMPILERS, FORMS, OPTIMIZERS, ROOMY, Form, Twin, TwinCompiler, columns_of
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.keys import KeySorter

SALT = table_salt("x")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C compiler")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> TwinCompiler:
    return TwinCompiler(tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("half", [None, 0, 1])
def test_requests_are_distinct_keys_grouped_as_a_batch_is(law: str, half: int | None) -> None:
    universe = Universe(SALT, 3, 1000, seed=5)
    every = set(universe.keys(np.arange(1000)).tolist())
    assert len(every) == 1000
    request = universe.draw(law, half, 100)
    assert request.keys.shape == (100,)
    assert set(request.keys.tolist()) <= every
    sorted_anew = KeySorter().build(request.keys, SALT, 3, np.arange(8, dtype=np.int32))
    for mine, theirs in zip(request, (sorted_anew.keys, sorted_anew.blocks, sorted_anew.counts), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    if half is not None:
        assert set((request.blocks // 4).tolist()) == {half}


def test_zipf_keys_follow_the_law() -> None:
    universe = Universe(SALT, 3, 1000, seed=5)
    seen = np.concatenate([universe.draw(LAWS[1], size=20).keys for _ in range(100)])
    counts = np.unique(seen, return_counts=True)[1]
    assert counts.max() > 90, "the first key is in nearly each of them"
    assert np.median(counts) < 5


def test_filled_table_holds_the_universe() -> None:
    filled = fill("x", 5000, 4, "adagrad")
    assert filled.table.rows == filled.universe.rows == 5000
    keys, blocks, counts = filled.universe.span(0, 5000)
    expected = np.empty(5000, np.int32)
    blocks_of(keys, filled.table.salt, 6, expected)
    np.testing.assert_array_equal(np.repeat(blocks, counts), expected)
    out = np.ones((5000, 4), np.float32)
    assert filled.table.pull(keys, blocks, counts, out) == 5000
    assert not out.any(), "made by gradients of zero"
    assert filled.nbytes >= filled.table.nbytes
    assert payload(4, "adagrad", "float32", filled.table) == 32


@needs_compiler
@pytest.mark.parametrize("form", [*FORMS, ROOMY, Form("full", False, 1.0)])
@pytest.mark.parametrize("dim", [1, 16, 20])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twin_gives_what_a_table_gives(compiler: TwinCompiler, optimizer: str, form: Form, dim: int) -> None:
    table = make("x", dim, optimizer)
    universe = universe_of(table, 3000)
    library = compiler.library(dim, columns_of(optimizer, dim))
    assert compiler.why is None
    twin = Twin(library, form, salt=table.salt, rows=3000)
    try:
        assert twin.build(universe.span(0, 2000).keys) == 2000
        slots = twin.slots(universe.span(0, 3000).keys)
        assert sorted(slots.tolist())[:2000] == list(range(2000))
        assert (np.sort(slots)[2000:] == 2**32 - 1).all()
        rng = np.random.default_rng(3)
        for size in (1, 63, 64, 65, 1400, 200):
            keys, blocks, counts = universe.draw(LAWS[0], size=size)
            gradients = rng.standard_normal((size, dim)).astype(np.float32)
            table.push(keys, blocks, counts, gradients, rate=0.1)
            assert twin.push(keys, gradients, 0.1) <= 3000
        keys, blocks, counts = universe.span(0, 3000)
        ours, theirs = np.empty((3000, dim), np.float32), np.empty((3000, dim), np.float32)
        table.pull(keys, blocks, counts, ours)
        twin.pull(keys, theirs)
        assert ours.any()
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
        found, rows = np.arange(7, dtype=np.uint32), np.empty((7, dim), np.float32)
        twin.gather(found, rows)
        np.testing.assert_array_equal(rows, theirs[[np.flatnonzero(twin.slots(keys) == s)[0] for s in found]])
    finally:
        twin.close()


@needs_compiler
def test_rowwise_twin_follows_the_formula(compiler: TwinCompiler) -> None:
    dim = 17
    twin = Twin(compiler.library(dim, 1), FORMS[0], salt=SALT, rows=50)
    weights, accumulated = np.zeros((50, dim)), np.zeros(50)
    keys = Universe(SALT, 0, 50).span(0, 50).keys
    rng = np.random.default_rng(1)
    out = np.empty((50, dim), np.float32)
    try:
        for _ in range(5):
            gradients = rng.standard_normal((50, dim)).astype(np.float32)
            assert twin.push(keys, gradients, 0.1) == 50
            accumulated += (gradients.astype(np.float64) ** 2).mean(1)
            weights -= 0.1 * gradients / (np.sqrt(accumulated) + 1e-8)[:, None]
        twin.pull(keys, out)
        np.testing.assert_allclose(out, weights, rtol=1e-5, atol=1e-6)
        assert twin.push(np.array([7], np.uint64), gradients[:1], 0.1) == -1, "there is no room"
    finally:
        twin.close()


def test_without_a_compiler_the_twin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = TwinCompiler(tmp_path)
    assert compiler.library(16, 1) is None
    assert "no C compiler" in str(compiler.why)


@pytest.mark.parametrize("name", ["cc", None])
def test_every_key_is_there_with_and_without_a_compiler(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    elif not any(map(shutil.which, COMPILERS)):
        pytest.skip("needs a C compiler")
    before = threading.active_count()
    result = measure(SIZES["tiny"], tmp_path, lambda text: None)
    assert threading.active_count() == before
    from_twin = {"pull_vs_c", "pull_vs_gather", "push_vs_c", "thread_scaling_c"}
    rest = {
        "thread_scaling",
        "bytes_over_payload",
        "growth_p999_over_p50",
        "still_p999_over_p50",
        "rows",
        "spill_vs_memory",
    }
    assert from_twin | rest | {"spill", "why", "cases", "cases_left_out", "large"} <= set(result)
    assert all((result[key] is None) == (name is None) for key in from_twin)
    assert all(result[key] > 0 for key in rest)
    assert (result["why"]["twin"] is None) == (name is not None)
    assert result["cases_left_out"] == []
    for case in result["cases"]:
        for verb in ("pull", "push"):
            assert case[f"{verb}_mrows_per_s"][speed.OURS] > 0
    assert {case["dim"] for case in result["cases"]} == {8, 16, 32, 64, 128, 256}
    assert result["growth"]["rows_after"] > result["growth"]["rows_before"] == result["rows"] == SIZES["tiny"].rows


def test_worse_case_of_two_threads_is_reported() -> None:
    # Enough by itself, enough beside the twin, and too little: the less, the worse.
    assert standing(1.8, 2.0) >= 1
    assert standing(1.5, 1.5) > 1
    assert standing(1.5, None) == standing(1.5, 1.9) < 1
    assert standing(1.4, 1.9) < standing(1.5, 1.9)


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_twin_takes_every_key_for_an_ordinary_one(compiler: TwinCompiler, form: Form) -> None:
    twin = Twin(compiler.library(16, 1), form, salt=SALT, rows=50)
    keys = np.array([0, 2**64 - 1, int(SALT)], np.uint64)
    try:
        assert (twin.slots(keys) == 2**32 - 1).all(), "an empty place is no key"
        assert twin.push(keys, np.ones((3, 16), np.float32), 0.1) == 3
        assert twin.slots(keys).tolist() == [0, 1, 2]
    finally:
        twin.close()
