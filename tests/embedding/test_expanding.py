# SPDX-License-Identifier: Apache-2.0
import threading
from dataclasses import replace

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.content import BlockRows
from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import make_table
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import Admission, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec
from oarlock.embedding.table import PushCounts, Table
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, StalePlacement

MANY = reference.MANY
PARTS = (
    Part(1, OptimizerSpec("ftrl", l1=0.01), Initializer("normal", 0.0, 0.1)),
    Part(2, OptimizerSpec("adagrad", schedule=Schedule("exponential", gamma=0.5)), Initializer("uniform", 0.0, 0.5)),
    Part(1, OptimizerSpec("adam", bias="step"), Initializer("normal", 1.0, 0.1)),
)
SPEC = TableSpec("t", 4, parts=PARTS, blocks=8, expand_score=0.25)


def make(spec=SPEC, *, adopt=True):
    table = make_table(spec, seed=7)
    if adopt:
        for block in range(spec.blocks):
            table.adopt(block)
    return table


def push(table, keys, gradients=None, *, occurrences=None, clicks=None, rate=0.1, step=1):
    """Push distinct ``keys``, with a gradient of ones each unless given."""
    gradients = np.ones((len(keys), table.spec.dim), np.float32) if gradients is None else gradients
    found, inverse, blocks, counts = reference.group(table.spec.name, table.bits, keys)
    grouped = np.empty_like(gradients)
    grouped[inverse] = gradients
    more = {}
    for name, values, kind in (("occurrences", occurrences, np.uint32), ("clicks", clicks, np.float32)):
        if values is not None:
            more[name] = np.empty(len(keys), kind)
            more[name][inverse] = values
    return table.push(found, blocks, counts, grouped, rate=rate, step=step, **more)


def pull(table, keys):
    found, inverse, blocks, counts = reference.group(table.spec.name, table.bits, keys)
    rows = np.full((len(found), table.spec.dim), np.nan, np.float32)
    present = table.pull(found, blocks, counts, rows)
    return rows[inverse], present


def content(table):
    """Return {key: (weights, state, counters) as bytes}; every expanded row must be one of those that there are."""
    found = {}
    for block in table.owned.tolist():
        rows = table.export_block(block)
        for i, key in enumerate(rows.keys.tolist()):
            assert key not in found
            found[key] = (rows.weights[i].tobytes(), rows.state[i].tobytes(), rows.counters[i].tobytes())
    if isinstance(table, ExpandingTable):
        others = np.concatenate([table.wide.export_block(block).keys for block in table.owned.tolist()])
        assert set(others.tolist()) <= set(found)
        assert len(others) == table.expanded
    return found


def random_batch(rng, highest=None):
    keys = np.unique(rng.integers(0, highest or MANY // 3, MANY // 3, dtype=np.uint64))
    return keys, rng.normal(size=(len(keys), 4)).astype(np.float32)


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_block_moves_to_another_table_and_trains_on_as_if_it_had_stayed(dtype):
    spec = replace(SPEC, dtype=dtype, admission=Admission("count", occurrences=2), eviction=Eviction(age=2))
    quiet, source, target = make(spec), make(spec), make(spec, adopt=False)
    rng = np.random.default_rng(6)
    for step in range(1, 9):
        keys, gradients = random_batch(rng)
        occurrences = rng.integers(1, 3, len(keys))
        now = source if step < 5 else target
        for table in (quiet, now):
            push(table, keys, gradients, occurrences=occurrences, step=step)
            for block in range(8):
                table.sweep(block, tick=step)
        if step == 4:
            assert 0 < source.expanded < source.rows
            for block in range(8):
                rows = source.export_block(block)
                target.import_block(block, rows, version=source.version(block))
                again = target.export_block(block)
                assert [np.sort(a, axis=0).tobytes() for a in rows[:6]] == [
                    np.sort(a, axis=0).tobytes() for a in again[:6]
                ]
                source.drop(block)
            assert (source.rows, source.expanded, source.owned.tolist()) == (0, 0, [])
    assert content(target) == content(quiet)
    rows, present = pull(target, keys)
    assert rows.tobytes() == pull(quiet, keys)[0].tobytes()
    assert present == len(set(keys.tolist()) & set(content(quiet)))
    if dtype != "float32":
        exact = make(replace(spec, dtype="float32"))
        push(exact, keys, gradients, occurrences=[9] * len(keys))
        coded = make(spec)
        push(coded, keys, gradients, occurrences=[9] * len(keys))
        assert coded.expanded == exact.expanded == len(keys)
        difference = np.abs(pull(coded, keys)[0] - pull(exact, keys)[0])
        assert difference.max() < {"float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2}[dtype]
        assert difference.max() > 0


def test_import_refuses_what_is_not_a_block_and_changes_nothing():
    table = make()
    push(table, np.arange(60, dtype=np.uint64), occurrences=np.arange(60) % 5 + 1)
    good = table.export_block(3)
    before = content(table)
    not_expanded = int(np.flatnonzero(good.counters[:, -1] == 0)[0])
    expanded = int(np.flatnonzero(good.counters[:, -1])[0])

    def spoilt(name, at, value):
        array = getattr(good, name).copy()
        array[at] = value
        return good._replace(**{name: array})

    for wrong, message in (
        (good._replace(weights=good.weights[:, :3].copy()), "weights has shape"),
        (good._replace(state=good.state[1:]), "state has shape"),
        (good._replace(counters=good.counters[:, 1:].copy()), "counters has shape"),
        (spoilt("counters", (expanded, -1), 2), "last counter of a row is 2"),
        (spoilt("weights", (not_expanded, 2), 1), "not expanded has weights"),
        (spoilt("weights", (expanded, 2), np.nan), "weights holds an infinity or NaN"),
        (spoilt("weights", (expanded, 0), np.nan), "weights holds an infinity or NaN"),
        (spoilt("state", (not_expanded, 4), np.inf), "state holds an infinity or NaN"),
        (spoilt("keys", expanded, good.keys[not_expanded]), "comes twice"),
        (table.export_block(4), "belongs to another block"),
    ):
        with pytest.raises(Malformed, match=message):
            table.import_block(3, wrong)
        assert content(table) == before
    table.import_block(3, good)
    assert content(table) == before
    # Whole rows of an ordinary table.
    table.import_block(3, BlockRows(good.keys, good.weights, good.state))
    assert table.export_block(3).counters[:, -1].all()
    assert table.export_block(3).weights.tobytes() == good.weights.tobytes()


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


@pytest.mark.parametrize("part", ["narrow", "wide"])
def test_out_of_memory_names_how_many_blocks_are_done_in_both_parts(part, monkeypatch):
    spec = replace(SPEC, expand_score=0.35)
    table, quiet = make(spec), make(spec)
    keys, _, blocks, counts = reference.group("t", 3, range(MANY))
    gradients = np.random.default_rng(8).normal(size=(MANY, 4)).astype(np.float32)
    occurrences = np.arange(MANY, dtype=np.uint32) % 8
    arenas, taken = [getattr(each, part).arena for each in (quiet, table)], []
    take = arenas[0].take
    monkeypatch.setattr(arenas[0], "take", lambda size: taken.append(size) or take(size))
    quiet.push(keys, blocks, counts, gradients, rate=0.1, occurrences=occurrences)
    allowed = len(taken) // 2
    take_2 = arenas[1].take

    def fail_later(size):
        taken.append(size)
        if len(taken) > 3 * allowed:
            raise MemoryError
        return take_2(size)

    monkeypatch.setattr(arenas[1], "take", fail_later)
    with pytest.raises(OutOfMemory, match="no memory for") as caught:
        table.push(keys, blocks, counts, gradients, rate=0.1, occurrences=occurrences)
    groups = caught.value.details["groups"]
    assert 0 < groups < 8
    done = int(counts[:groups].sum())
    whole = content(quiet)
    assert content(table) == {key: whole[key] for key in keys[:done].tolist()}
    assert [table.version(int(block)) for block in blocks] == [1] * groups + [0] * (8 - groups)
    monkeypatch.undo()
    table.push(
        keys[done:], blocks[groups:], counts[groups:], gradients[done:], rate=0.1, occurrences=occurrences[done:]
    )
    assert content(table) == whole


def test_rows_that_are_not_expanded_take_a_fraction_of_the_memory():
    parts = (Part(1, OptimizerSpec("adagrad")), Part(16, OptimizerSpec("adagrad")))
    spec = TableSpec("t", 17, parts=parts, blocks=2, expand_score=10.0)
    table, ordinary = make(spec), make(replace(spec, expand_score=0.0))
    for each in (table, ordinary):
        push(each, np.arange(MANY, dtype=np.uint64))
    assert table.rows == ordinary.rows == MANY
    assert table.expanded == 0
    if reference.JIT:
        assert table.nbytes < ordinary.nbytes / 3
    push(table, np.arange(MANY // 2, dtype=np.uint64), clicks=np.full(MANY // 2, 11))
    assert table.expanded == MANY // 2
    assert table.row_bytes > ordinary.row_bytes


def test_pushes_pulls_sweeps_and_exports_side_by_side_never_see_parts_that_do_not_fit():
    """Each key is pushed with -1 at rate 1: a row's weight is its shows, its vector what came from the threshold on."""
    parts = (Part(1, OptimizerSpec("sgd"), Initializer("zeros")), Part(3, OptimizerSpec("sgd"), Initializer("zeros")))
    spec = TableSpec("t", 4, parts=parts, blocks=4, expand_score=0.45, eviction=Eviction(age=1))  # 5 shows
    table = make(spec)
    rounds = 150 if reference.JIT else 4
    keys, _, blocks, counts = reference.group("t", 2, range(MANY // 2))
    gradients = np.full((len(keys), 4), -1, np.float32)
    errors, stop, barrier = [], threading.Event(), threading.Barrier(5)

    def fits(rows):
        shows = rows.counters[:, 1].copy().view(np.float32)  # behind the tick of the last update
        assert (rows.weights[:, 0] == shows).all()
        assert (rows.counters[:, -1] == (shows >= 5)).all()
        assert (rows.weights[:, 1:] == np.maximum(shows - 4, 0)[:, None]).all()

    def run(work):
        try:
            barrier.wait()
            with np.errstate(over="ignore"):  # for interpreted kernels; conftest's setting is its own thread's
                work()
        except Exception as error:
            errors.append(error)
            stop.set()

    def pushing():
        for _ in range(rounds):
            table.push(keys, blocks, counts, gradients, rate=1.0)

    def sweeping():
        block = 0
        while not stop.is_set():
            table.sweep(block, tick=100, buckets=20)
            block = (block + 1) % 4

    def looking():
        out = np.empty_like(gradients)
        while not stop.is_set():
            for block in range(4):
                fits(table.export_block(block))
            table.pull(keys, blocks, counts, out)
            assert (out == np.floor(out)).all()
            assert (out[:, 1:] == out[:, 1:2]).all()

    pushers = [threading.Thread(target=run, args=(pushing,)) for _ in range(2)]
    others = [threading.Thread(target=run, args=(work,)) for work in (sweeping, looking)]
    for thread in pushers + others:
        thread.start()
    barrier.wait()
    for thread in pushers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert errors == []
    push(table, keys, gradients, rate=1.0, occurrences=[1] * len(keys))
    for block in range(4):
        fits(table.export_block(block))
    assert set(content(table)) == set(keys.tolist())
    assert table.evicted > 0
