# SPDX-License-Identifier: Apache-2.0
import dataclasses
import threading

import embedding_reference as reference
import numpy as np
import pytest
import table_reference

from oarlock.embedding import check
from oarlock.embedding.content import BlockRows
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.spec import Admission, Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.table import PushCounts, Table
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

MANY = reference.MANY


def make(optimizer="adagrad", *, dim=3, bits=3, adopt=True, kind="normal", name="t"):
    table = Table(TableSpec(name, dim, OptimizerSpec(optimizer), Initializer(kind), 1 << bits), seed=7)
    if adopt:
        for block in range(1 << bits):
            table.adopt(block)
    return table


def group(table, keys, order=None):
    return reference.group(table.spec.name, table.bits, keys, order)


def push(table, keys, gradients=None, rate=0.1, order=None):
    """Push distinct ``keys`` with a gradient each."""
    gradients = np.ones((len(keys), table.spec.dim), np.float32) if gradients is None else gradients
    out, inverse, blocks, counts = group(table, keys, order)
    grouped = np.empty_like(gradients)
    grouped[inverse] = gradients
    return table.push(out, blocks, counts, grouped, rate=rate)


def pull(table, keys):
    out, inverse, blocks, counts = group(table, keys)
    rows = np.full((len(out), table.spec.dim), np.nan, np.float32)
    present = table.pull(out, blocks, counts, rows)
    return rows[inverse], present


def content(table):
    """Return {key: (weights, state) as bytes}."""
    found = {}
    for block in table.owned:
        rows = table.export_block(int(block))
        for key, weights, state in zip(rows.keys.tolist(), rows.weights, rows.state, strict=True):
            assert key not in found
            found[key] = (weights.tobytes(), state.tobytes())
    return found


@pytest.mark.parametrize("case", reference.EDGES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("bits", [0, 4])
def test_pull_push_pull_equals_the_twin(case, optimizer, bits):
    table = make(optimizer, bits=bits)
    keys = np.unique(reference.EDGES[case])
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(len(keys), 3)).astype(np.float32)
    fresh, present = pull(table, keys)
    first = [reference.first_row(table.spec, 7, key) for key in keys.tolist()]
    assert present == 0
    assert fresh.tobytes() == b"".join(row.tobytes() for row in first)
    assert push(table, keys, gradients) == PushCounts(len(keys), len(keys), 0)
    assert push(table, keys[::2], gradients[::2]) == PushCounts(len(keys[::2]), 0, 0)
    states = [reference.first_state(table.spec.optimizer, 3) for _ in first]
    for i, (weights, state) in enumerate(zip(first, states, strict=True)):
        for _ in range(2 if i % 2 == 0 else 1):
            reference.update(table.spec.optimizer, weights, state, gradients[i], 0.1)
    rows, present = pull(table, keys)
    assert present == len(keys) == table.rows
    assert rows.tobytes() == b"".join(row.tobytes() for row in first)
    expected = {k: (w.tobytes(), s.tobytes()) for k, w, s in zip(keys.tolist(), first, states, strict=True)}
    assert content(table) == expected


def test_a_pull_creates_nothing_and_allocates_nothing():
    table = make()
    push(table, np.arange(5, dtype=np.uint64))
    before, size = content(table), table.nbytes
    for case in reference.EDGES.values():
        pull(table, np.unique(case))
    assert content(table) == before
    assert table.nbytes == size


def test_refused_rows_are_counted_skipped_and_not_created():
    table = make("adam")
    push(table, np.array([1], np.uint64))
    before = content(table)
    bad = np.array([[np.nan, 1, 1], [1, np.inf, 1], [1, 1, -np.inf], [1, 1, 1]], np.float32)
    assert push(table, np.array([1, 2, 3, 4], np.uint64), bad) == PushCounts(1, 1, 3)
    after = content(table)
    assert set(after) == {1, 4}
    assert after[1] == before[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_the_split_into_requests_and_the_order_across_keys_do_not_matter(optimizer):
    rng = np.random.default_rng(4)
    whole, parts = make(optimizer), make(optimizer)
    for _ in range(3):
        keys = np.unique(rng.integers(0, MANY, MANY // 3, dtype=np.uint64))
        gradients = rng.normal(size=(len(keys), 3)).astype(np.float32)
        push(whole, keys, gradients)
        order = rng.permutation(len(keys))
        for part in np.array_split(order, 5):
            push(parts, keys[part], gradients[part], order=rng.permutation(8).tolist())
    assert content(whole) == content(parts)


def test_read_only_arrays_from_the_wire_are_taken():
    table = make(bits=0)
    keys, counts = np.frombuffer(np.arange(4, dtype=np.uint64).tobytes(), np.uint64), np.array([4], np.int32)
    blocks = np.frombuffer(bytes(4), np.int32)
    gradients = np.frombuffer(np.ones((4, 3), np.float32).tobytes(), np.float32).reshape(4, 3)
    table.check(keys, blocks, counts, unique=True)
    assert table.push(keys, blocks, counts, gradients, rate=0.1).created == 4
    assert table.pull(keys, blocks, counts, np.empty((4, 3), np.float32)) == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k, b, c: (k, b, c - 1), Malformed, "counts add up to|expected 1 or more"),
        (lambda k, b, c: (k[:-1], b, c), Malformed, "but there are"),
        (lambda k, b, c: (k, b, np.zeros_like(c)), Malformed, "expected 1 or more"),
        (lambda k, b, c: (k, b, -c), Malformed, "expected 1 or more"),
        (lambda k, b, c: (k, b[:-1], c), Malformed, "7 blocks but 8 counts"),
        (lambda k, b, c: (k, b + 1, c), Malformed, r"block 8 is not in \[0, 8\)"),
        (lambda k, b, c: (k, b - 1, c), Malformed, r"block -1 is not in \[0, 8\)"),
        (lambda k, b, c: (k, np.zeros_like(b), c), Malformed, "block 0 comes twice"),
        (lambda k, b, c: (k.astype(np.int64), b, c), Malformed, "keys: expected an array of uint64"),
        (lambda k, b, c: (k, b.astype(np.int64), c), Malformed, "blocks: expected an array of int32"),
    ],
)
def test_a_badly_grouped_request_is_refused_by_check_pull_and_push(change, error, message):
    table = make()
    keys, _, blocks, counts = group(table, np.arange(100, dtype=np.uint64))
    keys, blocks, counts = change(keys, blocks, counts)
    values = np.ones((len(keys), 3), np.float32)
    for call in (
        lambda: table.check(keys, blocks, counts),
        lambda: table.pull(keys, blocks, counts, values),
        lambda: table.push(keys, blocks, counts, values, rate=0.1),
    ):
        with pytest.raises(error, match=message):
            call()
    assert table.rows == 0
    keys, _, blocks, counts = group(table, np.arange(100, dtype=np.uint64))
    table.check(keys, blocks, counts, unique=True)


def test_check_finds_wrong_blocks_and_repeated_keys():
    table = make()
    keys, _, blocks, counts = group(table, np.array([0, reference.WORD, *range(5, 60)], np.uint64))
    table.check(keys, blocks, counts, unique=True)
    with pytest.raises(Malformed, match="does not hash to the block"):
        table.check(keys[::-1].copy(), blocks, counts)
    twice = keys.copy()
    twice[counts[0] - 1] = twice[0]
    table.check(twice, blocks, counts)
    with pytest.raises(Malformed, match=f"key {twice[0]} at position {counts[0] - 1} comes twice"):
        table.check(twice, blocks, counts, unique=True)


@pytest.mark.parametrize("case", reference.EDGES)
def test_check_keys_equals_the_twin(case):
    salt, keys = np.uint64(reference.salt("t")), reference.EDGES[case]
    distinct, _, blocks, counts = reference.group("t", 3, keys)
    fault = np.zeros(1, np.int64)
    places = np.zeros(2 << len(keys).bit_length(), np.int32)
    assert check.check_keys(salt, 3, distinct, blocks, counts, places, fault) == check.FINE
    raw = np.sort(keys)
    raw = raw[np.argsort([reference.block("t", 3, key) for key in raw.tolist()], kind="stable")]
    seen = set()
    again = next((i for i, key in enumerate(raw.tolist()) if key in seen or seen.add(key)), None)
    sizes = np.bincount([reference.block("t", 3, key) for key in raw.tolist()], minlength=8).astype(np.int32)
    code = check.check_keys(
        salt, 3, raw, np.flatnonzero(sizes).astype(np.int32), sizes[sizes > 0], np.zeros_like(places), fault
    )
    assert (
        (code, fault[0]) == (check.FINE, len(raw) - 1 if len(raw) else 0)
        if again is None
        else (
            check.REPEATED_KEY,
            again,
        )
    )


def test_values_of_the_wrong_shape_type_or_kind_are_refused():
    table = make(bits=0)
    keys, blocks, counts = np.arange(4, dtype=np.uint64), np.zeros(1, np.int32), np.array([4], np.int32)
    for wrong in (np.ones((4, 2), np.float32), np.ones((3, 3), np.float32), np.ones((4, 3))):
        with pytest.raises(Malformed, match=r"out is .*expected float32\[4, 3\]"):
            table.pull(keys, blocks, counts, wrong)
        with pytest.raises(Malformed, match=r"gradients is .*expected float32\[4, 3\]"):
            table.push(keys, blocks, counts, wrong, rate=0.1)
    with pytest.raises(InvalidArgument, match="writable array in C order"):
        table.pull(keys, blocks, counts, np.ones((3, 4), np.float32).T)
    for rate in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="rate"):
            table.push(keys, blocks, counts, np.ones((4, 3), np.float32), rate=rate)


def test_a_block_that_is_not_here_is_stale_and_named():
    table = make(adopt=False)
    table.adopt(2)
    keys, _, blocks, counts = group(table, np.arange(100, dtype=np.uint64))
    with pytest.raises(StalePlacement, match="table t: block 0 is not stored here") as caught:
        table.check(keys, blocks, counts)
    assert caught.value.details == {"table": "t", "block": 0}
    with pytest.raises(StalePlacement):
        table.pull(keys, blocks, counts, np.empty((100, 3), np.float32))
    with pytest.raises(StalePlacement):
        table.push(keys, blocks, counts, np.ones((100, 3), np.float32), rate=0.1)
    for call in (table.drop, table.export_block):
        with pytest.raises(StalePlacement):
            call(1)
        with pytest.raises(InvalidArgument, match=r"block 8 is not in \[0, 8\)"):
            call(8)
    with pytest.raises(InvalidArgument, match="stored here already"):
        table.adopt(2)
    assert table.owned.tolist() == [2]
    table.drop(2)
    assert table.owned.tolist() == []
    with pytest.raises(StalePlacement):
        table.export_block(2)


def test_a_block_moves_to_another_table_and_trains_on_as_if_it_had_stayed():
    rng = np.random.default_rng(5)
    quiet, source, target = make("adam"), make("adam"), make("adam", adopt=False)
    keys = np.arange(MANY // 2, dtype=np.uint64)
    for step in range(4):
        gradients = rng.normal(size=(len(keys), 3)).astype(np.float32)
        push(quiet, keys, gradients)
        push(source if step < 2 else target, keys, gradients)
        if step == 1:
            for block in range(8):
                target.import_block(block, source.export_block(block))
                source.drop(block)
            assert source.rows == 0
            assert source.nbytes < make("adam", adopt=False).nbytes + 1
    assert content(target) == content(quiet)


def test_import_refuses_what_is_not_a_block_and_changes_nothing():
    table = make("adagrad")
    push(table, np.arange(200, dtype=np.uint64))
    good = table.export_block(3)
    before = content(table)
    other = table.export_block(4)
    nan = good.weights.copy()
    nan[1, 1] = np.nan
    infinite = good.state.copy()
    infinite[0, 0] = np.inf
    twice = good.keys.copy()
    twice[-1] = twice[0]
    for wrong, message in (
        (BlockRows(good.keys, good.weights[:, :2].copy(), good.state), "weights has shape"),
        (BlockRows(good.keys, good.weights, good.state[1:]), "state has shape"),
        (BlockRows(good.keys, nan, good.state), "weights holds an infinity or NaN"),
        (BlockRows(good.keys, good.weights, infinite), "state holds an infinity or NaN"),
        (BlockRows(twice, good.weights, good.state), "comes twice"),
        (other, "belongs to another block"),
    ):
        with pytest.raises(Malformed, match=message):
            table.import_block(3, wrong)
        assert content(table) == before
    table.import_block(3, good)
    assert content(table) == before
    table.import_block(3, BlockRows(good.keys[:0], good.weights[:0], good.state[:0]))
    assert table.export_block(3).keys.size == 0


def test_two_threads_on_one_table_lose_and_double_nothing():
    table = make("sgd", kind="zeros", bits=2)
    rounds = 400 if reference.JIT else 5
    sent = np.zeros((MANY, 3), np.int64)
    batches, sorter = [], KeySorter()
    for thread in range(2):
        rng = np.random.default_rng(thread)
        batches.append([])
        for r in range(rounds):
            keys = np.unique(rng.integers(0, 20 + r * (MANY - 20) // rounds, MANY // 2, dtype=np.uint64))
            gradients = rng.integers(-5, 6, (len(keys), 3)).astype(np.float32)
            sent[keys.astype(np.int64)] -= gradients.astype(np.int64)
            found = sorter.build(keys, table.salt, table.bits, np.arange(4, dtype=np.int32))
            grouped = np.empty_like(gradients)
            grouped[found.inverse] = gradients
            batches[-1].append((found.keys, found.blocks, found.counts, grouped))
    errors = []
    barrier = threading.Barrier(2)

    def work(mine):
        try:
            barrier.wait()
            with np.errstate(over="ignore"):  # for interpreted kernels; conftest's setting is its own thread's
                for keys, blocks, counts, gradients in mine:
                    table.push(keys, blocks, counts, gradients, rate=1.0)
                    table.pull(keys, blocks, counts, np.empty_like(gradients))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    rows, _ = pull(table, np.arange(MANY, dtype=np.uint64))
    assert (rows == sent).all()


SKETCHED = TableSpec("t", 2, admission=Admission("sketch", 2, capacity=50), blocks=2)
COUNTED = TableSpec("t", 2, admission=Admission("count", 2), usage=True, blocks=2)
SCORED = TableSpec("t", 2, admission=Admission("score"), blocks=2)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (SKETCHED, lambda g: g._replace(sketch=g.sketch[:-8]), "a sketch's state of"),
        (SKETCHED, lambda g: g._replace(sketch=b"\xff" * len(g.sketch)), "a sketch's state begins with"),
        (SKETCHED, lambda g: g._replace(waiting=g.keys, waited=np.ones(len(g.keys), np.uint32)), "does not count them"),
        (COUNTED, lambda g: g._replace(sketch=bytes(64)), "the table's admission has none"),
        (COUNTED, lambda g: g._replace(counters=g.counters[:, :1].copy()), "counters has shape"),
        (COUNTED, lambda g: g._replace(counters=g.counters[:1].copy()), "counters has shape"),
        (COUNTED, lambda g: g._replace(waited=g.waited[:-1]), "waiting keys, but"),
        (COUNTED, lambda g: g._replace(waiting=g.keys, waited=np.ones(len(g.keys), np.uint32)), "comes twice"),
        (COUNTED, lambda g: g._replace(waiting=g.waiting ^ np.uint64(1 << 63)), "belongs to another block"),
        (SCORED, lambda g: g._replace(counters=g.counters | np.uint32(0x7FC00000)), "shows or clicks hold"),
        (dataclasses.replace(SCORED, dtype="int8"), lambda g: g._replace(state=-g.state), "a scale, the last column"),
        (
            dataclasses.replace(SCORED, dtype="int8"),
            lambda g: g._replace(state=g.state[:, :-1].copy()),
            "state has shape",
        ),
    ],
)
def test_an_import_whose_counts_do_not_fit_the_policies_changes_nothing_and_keeps_no_memory(spec, change, message):
    table = table_reference.stored(spec)
    ones = np.ones(60, np.float32)
    for keys in (range(60), range(30)):
        table_reference.push(table, keys, clicks=ones[: len(keys)])
    before, used, version = table_reference.content(table), table.arena.used, table.version(1)
    assert len(before[0]) >= 30
    with pytest.raises(Malformed, match=message):
        table.import_block(1, change(table.export_block(1)))
    assert table_reference.content(table) == before
    assert (table.arena.used, table.version(1)) == (used, version)
    table.import_block(1, table.export_block(1))
    assert table_reference.content(table) == before
