# SPDX-License-Identifier: Apache-2.0
"""Which rows of an expanding table get their other parts, when, and with which values."""

from dataclasses import replace

import embedding_reference as reference
import numpy as np
import pytest
from expanding_rig import MANY, PARTS, SPEC, content, make, pull, push, random_batch

from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import make_table
from oarlock.embedding.spec import Admission, Eviction, Guard
from oarlock.embedding.table import PushCounts, Table
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement


def test_make_table_chooses_by_the_threshold():
    assert type(make_table(SPEC, seed=7)) is ExpandingTable
    assert type(make_table(replace(SPEC, expand_score=0.0), seed=7)) is Table
    with pytest.raises(InvalidArgument, match="needs an ExpandingTable"):
        Table(SPEC, seed=7)
    with pytest.raises(InvalidArgument, match="needs expand_score"):
        ExpandingTable(replace(SPEC, expand_score=0.0), seed=7)


@pytest.mark.parametrize("change", [{"eviction": Eviction(norm=1.0)}, {"guard": Guard(undo=1)}, {"memory_bytes": 1}])
def test_what_does_not_go_with_expansion_is_refused_by_the_spec(change):
    with pytest.raises(InvalidArgument, match=r"expand_score and .* do not go together"):
        replace(SPEC, **change)


def test_rows_that_expand_at_once_are_those_of_an_ordinary_table():
    """The same bits, first values of all columns included."""
    spec = replace(SPEC, expand_score=1e-9, absent="zeros")
    table, ordinary = make(spec), make(replace(spec, expand_score=0.0, parts=PARTS))
    rng = np.random.default_rng(1)
    for step in range(1, 5):
        keys, gradients = random_batch(rng)
        gradients[1, 3] = np.nan
        assert push(table, keys, gradients, step=step) == push(ordinary, keys, gradients, step=step)
        rows, present = pull(table, np.arange(MANY, dtype=np.uint64))
        expected, there = pull(ordinary, np.arange(MANY, dtype=np.uint64))
        assert present == there
        assert rows.tobytes() == expected.tobytes()
    assert table.expanded == table.rows == ordinary.rows > 0
    assert {k: v[:2] for k, v in content(table).items()} == {k: v[:2] for k, v in content(ordinary).items()}


def test_a_row_gets_its_vector_with_the_push_that_brings_its_score_to_the_threshold():
    table = make(replace(SPEC, expand_score=0.25))  # three shows, or one click
    key = np.array([5], np.uint64)
    ordinary = make(replace(SPEC, expand_score=0.0))
    first, _ = pull(ordinary, key)
    assert pull(table, key)[0].tolist() == [[first[0, 0], 0, 0, 0]]
    for shows in (1, 2):
        push(table, key)
        rows, present = pull(table, key)
        assert (present, table.rows, table.expanded) == (1, 1, 0)
        assert rows[0, 0] != first[0, 0]
        assert rows[0, 1:].tolist() == [0, 0, 0]
        assert table.explain(5)["expansion"] == {"expanded": False, "score": pytest.approx(0.1 * shows), "needed": 0.25}
    push(table, key)
    push(ordinary, key)
    assert table.expanded == 1
    assert pull(table, key)[0][0, 1:].tobytes() == pull(ordinary, key)[0][0, 1:].tobytes()
    facts = table.explain(5)
    assert facts["expansion"]["expanded"]
    assert facts["weights"] == pull(table, key)[0][0].tolist()
    assert len(facts["state"]) == 2 + 2 + 3
    push(table, np.array([6], np.uint64), clicks=[1.0])
    push(table, np.array([7], np.uint64), occurrences=[3])
    push(table, np.array([8], np.uint64), occurrences=[2])
    assert [table.explain(k)["expansion"]["expanded"] for k in (6, 7, 8)] == [True, True, False]
    exactly = make(replace(SPEC, expand_score=0.5, admission=Admission(nonclick=0.25)))
    push(exactly, np.array([1, 2], np.uint64), occurrences=[2, 1])
    assert [exactly.explain(k)["expansion"]["expanded"] for k in (1, 2)] == [True, False]


@pytest.mark.parametrize("column", [0, 1, 3])
def test_a_refused_gradient_refuses_both_parts(column):
    table = make(replace(SPEC, expand_score=0.15))
    push(table, np.array([1, 2], np.uint64), occurrences=[2, 1])
    before = content(table)
    bad = np.ones((4, 4), np.float32)
    bad[:3, column] = np.nan, np.inf, 1e30
    assert push(table, np.array([1, 2, 3, 4], np.uint64), bad, occurrences=[9] * 4) == PushCounts(1, 1, 3)
    after = content(table)
    assert set(after) == {1, 2, 4}
    assert {key: after[key] for key in (1, 2)} == before
    assert table.expanded == 2
    assert table.refused == 3
    assert sorted(table.refused_keys().tolist()) == [1, 2, 3]


def test_the_split_into_requests_does_not_matter():
    spec = replace(SPEC, admission=Admission("count", occurrences=2), expand_score=3.0)
    rng = np.random.default_rng(4)
    whole, parts = make(spec), make(spec)
    for step in range(1, 6):
        keys, gradients = random_batch(rng)
        occurrences = rng.integers(1, 4, len(keys))
        clicks = rng.integers(0, 2, len(keys)) * occurrences
        push(whole, keys, gradients, occurrences=occurrences, clicks=clicks, step=step)
        for part in np.array_split(rng.permutation(len(keys)), 5):
            push(parts, keys[part], gradients[part], occurrences=occurrences[part], clicks=clicks[part], step=step)
        assert content(parts) == content(whole)
    assert 0 < whole.expanded < whole.rows


@pytest.mark.parametrize(
    "admission",
    [
        Admission("count", occurrences=3),
        Admission("sketch", occurrences=3, capacity=100_000),
        Admission("probability", probability=0.3),
        Admission("score"),
    ],
)
def test_admission_is_that_of_an_ordinary_table_and_only_admitted_keys_expand(admission):
    spec = replace(SPEC, admission=admission, expand_score=1.25)
    table = make(spec)
    # An ordinary table of the first part under the same name, where shows and clicks are kept but nothing is evicted.
    first = make(replace(spec, dim=1, parts=PARTS[:1], expand_score=0.0, eviction=Eviction(score=1e-9)))
    rng = np.random.default_rng(5)
    waiting = 0
    for step in range(1, 6):
        keys, gradients = random_batch(rng, MANY)
        more = {"occurrences": rng.integers(1, 5, len(keys)), "clicks": rng.integers(0, 2, len(keys)), "step": step}
        done = push(table, keys, gradients, **more)
        assert done == push(first, keys, gradients[:, :1].copy(), **more)
        waiting += done.waiting
    assert waiting > 0
    expanded = 0
    for block in range(8):
        rows, alone = table.export_block(block), first.export_block(block)
        assert rows.keys.tolist() == alone.keys.tolist()
        assert rows.weights[:, 0].tobytes() == alone.weights.tobytes()
        assert rows.counters[:, :-1].tobytes() == alone.counters.tobytes()
        assert (sorted(rows.waiting), sorted(rows.waited)) == (sorted(alone.waiting), sorted(alone.waited))
        assert rows.sketch == alone.sketch
        shows, clicks = rows.counters[:, -3:-1].copy().view(np.float32).T
        # Scores only grow here, so who has a vector is told by the last one.
        score = (shows - clicks).astype(np.float64) * 0.1 + clicks.astype(np.float64)
        assert (rows.counters[:, -1] == (score >= 1.25)).all()
        expanded += int(rows.counters[:, -1].sum())
    assert 0 < expanded == table.expanded < table.rows


def test_a_row_stays_expanded_while_its_score_decays_and_leaves_with_all_its_parts():
    table = make(replace(SPEC, expand_score=0.35, eviction=Eviction(score=0.15, decay=0.5)))
    push(table, np.array([1, 2], np.uint64), occurrences=[5, 3])
    assert (table.rows, table.expanded) == (2, 1)
    for block in range(8):
        table.sweep(block, tick=1)  # scores 0.25 and 0.15
    before = pull(table, np.array([1], np.uint64))[0]
    push(table, np.array([1], np.uint64), occurrences=[0])
    assert table.explain(1)["expansion"] == {"expanded": True, "score": pytest.approx(0.25), "needed": 0.35}
    assert (pull(table, np.array([1], np.uint64))[0] != before).all()
    assert sum(table.sweep(block, tick=1)[0] for block in range(8)) == 2
    assert (table.rows, table.expanded, table.evicted) == (0, 0, 2)
    assert sorted(key for block in range(8) for key in table.tombstones(block)[0].tolist()) == [1, 2]
    # Back again it is a new row, and its slots are used again.
    push(table, np.array([1], np.uint64))
    assert (table.rows, table.expanded) == (1, 0)
    assert pull(table, np.array([1], np.uint64))[0][0, 1:].tolist() == [0, 0, 0]
    block = int(table.explain(1)["block"])
    table.forget_tombstones(block, until=table.version(block))
    assert table.tombstones(block, since=0) is None


def test_requests_that_do_not_fit_are_refused_as_by_an_ordinary_table():
    table = make(adopt=False)
    table.adopt(2)
    keys, _, blocks, counts = reference.group("t", 3, range(100))
    values = np.ones((100, 4), np.float32)
    with pytest.raises(StalePlacement, match="block 0 is not stored here"):
        table.pull(keys, blocks, counts, values)
    with pytest.raises(StalePlacement, match="block 0 is not stored here"):
        table.push(keys, blocks, counts, values, rate=0.1)
    with pytest.raises(InvalidArgument, match="stored here already"):
        table.adopt(2)
    for block in set(range(8)) - {2}:
        table.adopt(block)
    table.check(keys, blocks, counts, unique=True)
    with pytest.raises(Malformed, match="counts add up to"):
        table.push(keys, blocks, counts + 1, values, rate=0.1)
    for wrong in (values[:, :3].copy(), values[1:], values.astype(np.float64)):
        with pytest.raises(Malformed, match=r"out is .*expected float32\[100, 4\]"):
            table.pull(keys, blocks, counts, wrong)
        with pytest.raises(Malformed, match=r"gradients is .*expected float32\[100, 4\]"):
            table.push(keys, blocks, counts, wrong, rate=0.1)
    with pytest.raises(InvalidArgument, match="writable array in C order"):
        table.pull(keys, blocks, counts, np.ones((4, 100), np.float32).T)
    for more in ({"rate": float("nan")}, {"rate": 0.1, "clicks": np.full(100, np.nan, np.float32)}):
        with pytest.raises(InvalidArgument, match=r"rate|clicks"):
            table.push(keys, blocks, counts, values, **more)
    with pytest.raises(InvalidArgument, match="keeps no old values"):
        table.undo(keys)
    assert (table.rows, table.expanded) == (0, 0)
    empty = np.zeros(0, np.int32)
    assert table.push(keys[:0], empty, empty, values[:0], rate=0.1) == PushCounts(0, 0, 0)
    assert table.pull(keys[:0], empty, empty, values[:0]) == 0
    table.close()
