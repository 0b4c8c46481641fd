# SPDX-License-Identifier: Apache-2.0
"""Whole blocks of an expanding table: moved, refused, short of memory, changed from several threads."""

import threading
from dataclasses import replace

import embedding_reference as reference
import numpy as np
import pytest
from expanding_rig import MANY, SPEC, content, make, pull, push, random_batch

from oarlock.embedding.content import BlockRows
from oarlock.embedding.spec import Admission, Eviction, Initializer, OptimizerSpec, Part, TableSpec
from oarlock.proto.errors import Malformed, OutOfMemory


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
