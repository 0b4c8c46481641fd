# SPDX-License-Identifier: Apache-2.0
"""A frozen table reads as the table that was trained, to the bit, and as a dict of what it was made of."""

import threading

import embedding_reference as reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.embedding.frozen import FrozenBlock, FrozenTable
from oarlock.embedding.frozen_kernels import SCRATCH_WORDS, fill_index, find_from, home_of, look_up, tag_of
from oarlock.embedding.hashing import blocks_of, key_mix, table_salt
from oarlock.embedding.make import make_table
from oarlock.embedding.policy import Admission
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed

KEY = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 40))
NO_STATE = np.empty((0, 0), np.float32)


def frozen(spec, rows, seed=7):
    """Return a frozen table of rows: {key: weights}."""
    keys = np.array(sorted(rows), np.uint64)
    number = np.empty(len(keys), np.int32)
    blocks_of(keys, table_salt(spec.name), spec.blocks.bit_length() - 1, number)
    blocks = []
    for block in range(spec.blocks):
        mine = keys[number == block]
        weights = np.array([rows[int(key)] for key in mine], np.float32).reshape(len(mine), spec.dim)
        blocks.append(FrozenBlock(spec, mine, weights, np.empty((len(mine), 0), np.float32)))
    return FrozenTable(spec, blocks, seed=seed)


def lookup(table, keys):
    out = np.full((len(keys), table.spec.dim), np.nan, np.float32)
    missing = table.lookup(np.array(keys, np.uint64), out)
    return out, missing


@pytest.mark.parametrize(("dim", "blocks"), [(1, 1), (3, 4), (16, 64), (32, 2), (100, 1)])
@given(st.sets(KEY, max_size=60), st.lists(KEY, max_size=120))
def test_it_answers_as_a_dict_does(dim, blocks, present, wanted):
    spec = TableSpec("t", dim, initializer=Initializer("uniform", 0.5, 0.25), blocks=blocks)
    rng = np.random.default_rng(len(present))
    rows = {key: rng.random(dim, np.float32) for key in present}
    table = frozen(spec, rows)
    wanted = [*wanted, *present]
    found, missing = lookup(table, wanted)
    assert table.rows == len(present)
    assert missing == sum(key not in rows for key in wanted)
    for key, row in zip(wanted, found, strict=True):
        first = [reference.first_value(7, "t", key, c, "uniform", 0.5, 0.25) for c in range(dim)]
        assert row.tobytes() == np.array(rows.get(key, first), np.float32).tobytes()


PARTS = (
    Part(1, OptimizerSpec("ftrl"), Initializer("normal", 0.0, 0.1)),
    Part(2, OptimizerSpec("adagrad"), Initializer("uniform", 0.0, 0.5)),
)
SPECS = {
    "normal": TableSpec("t", 3, blocks=8),
    "zeros of absent": TableSpec("t", 3, blocks=8, absent="zeros"),
    "constant": TableSpec("t", 3, initializer=Initializer("constant", mean=0.25), blocks=8),
    "parts": TableSpec("t", 3, parts=PARTS, blocks=8),
    "expanding": TableSpec("t", 3, parts=PARTS, blocks=8, expand_score=0.5),
    "expanding int8": TableSpec("t", 3, parts=PARTS, blocks=8, expand_score=0.5, dtype="int8"),
    "expanding bfloat16": TableSpec("t", 3, parts=PARTS, blocks=8, expand_score=0.5, dtype="bfloat16"),
    "bfloat16": TableSpec("t", 3, blocks=8, dtype="bfloat16"),
    "float16": TableSpec("t", 5, blocks=8, dtype="float16"),
    "int8": TableSpec("t", 5, OptimizerSpec("adam"), blocks=8, dtype="int8"),
    "admission": TableSpec("t", 3, blocks=8, admission=Admission("count", occurrences=2)),
}


@pytest.mark.parametrize("name", SPECS)
def test_it_reads_as_the_trained_table_to_the_bit(name):
    spec = SPECS[name]
    table = make_table(spec, seed=7)
    for block in range(spec.blocks):
        table.adopt(block)
    rng = np.random.default_rng(1)
    for step in range(3):
        keys = rng.integers(0, 300, 200).astype(np.uint64)
        keys, _, blocks, counts = reference.group("t", table.bits, np.unique(keys))
        clicks = rng.integers(0, 2, len(keys)).astype(np.float32)
        gradients = rng.normal(size=(len(keys), spec.dim)).astype(np.float32)
        more = {"clicks": clicks} if spec.expand_score else {}
        table.push(keys, blocks, counts, gradients, rate=0.1, step=step + 1, **more)
    contents = [table.export_block(block) for block in range(spec.blocks)]
    made = FrozenTable(spec, [FrozenBlock(spec, c.keys, c.weights, c.state) for c in contents], seed=7)
    asked = np.concatenate([np.arange(400, dtype=np.uint64), rng.integers(0, 1 << 63, 50).astype(np.uint64)])
    found, inverse, blocks, counts = reference.group("t", table.bits, asked)
    trained = np.empty((len(found), spec.dim), np.float32)
    present = table.pull(found, blocks, counts, trained)
    rows, missing = lookup(made, asked)
    assert 0 < present < len(asked), "a case must have both kinds of keys"
    assert missing == len(asked) - present
    assert rows.tobytes() == trained[inverse].tobytes()
    if spec.dtype != "float32" and not (spec.dtype == "int8" and spec.expand_score):
        assert (
            made.nbytes
            < frozen(TableSpec("t", spec.dim, blocks=8), dict.fromkeys(range(made.rows), [0] * spec.dim)).nbytes
        )


def test_a_tag_decides_nothing_and_the_search_goes_round():
    # An index of three places: two keys whose home is the last one, so the second lies in the first place, round the end.
    salt = table_salt("t")

    def mix(key):
        return np.uint64(key_mix(salt, np.uint64(key)))

    at_end = [k for k in range(10_000) if home_of(mix(k), 3) == 2][:2]
    keys = np.array(at_end, np.uint64)
    entries = np.zeros(3, np.uint32)
    fill_index(keys.ctypes.data, 2, salt, entries.ctypes.data, 3, 32)
    assert (entries != 0).tolist() == [True, False, True]
    # With 32 bits for the row there are none for a tag: the first key found is the wrong one.
    assert tag_of(mix(keys[1]), 32) == 0
    spec = TableSpec("t", 1, blocks=1)
    block = FrozenBlock(spec, keys, np.array([[1], [2]], np.float32), np.empty((2, 0), np.float32))
    block.descriptor[[0, 1, 4]] = entries.ctypes.data, 3, 32
    assert find_from(block.descriptor.ctypes.data, mix(keys[1]), 2)[0] == 0
    rows, missing = lookup(FrozenTable(spec, [block], seed=1), [at_end[1], at_end[0], 123456789])
    assert (rows[:2, 0].tolist(), missing) == ([2.0, 1.0], 1)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 65, 127, 128, 129, 300])
def test_every_length_of_a_request_is_whole(n):
    table = frozen(TableSpec("t", 2, blocks=2), {key: [key, -key] for key in range(0, 400, 2)})
    keys = np.random.default_rng(n).integers(0, 400, n).astype(np.uint64)
    rows, missing = lookup(table, keys)
    even = keys % 2 == 0
    assert (rows[even, 0] == keys[even]).all()
    assert missing == (~even).sum()


def test_threads_look_up_at_once():
    table = frozen(TableSpec("t", 4, blocks=4), {key: [key] * 4 for key in range(reference.MANY)})
    wrong = []

    def ask(seed):
        keys = np.random.default_rng(seed).integers(0, reference.MANY, 500).astype(np.uint64)
        for _ in range(20):
            rows, missing = lookup(table, keys)
            if missing or not (rows[:, 0] == keys).all():
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_does_not_fit_is_refused():
    spec = TableSpec("t", 2, blocks=2)
    with pytest.raises(Malformed, match=r"3 keys, weights of \[2, 2\]"):
        FrozenBlock(spec, np.arange(3, dtype=np.uint64), np.zeros((2, 2), np.float32), np.zeros((3, 0), np.float32))
    int8 = TableSpec("t", 2, blocks=2, dtype="int8")
    with pytest.raises(Malformed, match="without a scale"):
        FrozenBlock(int8, np.arange(1, dtype=np.uint64), np.zeros((1, 2), np.float32), np.zeros((1, 0), np.float32))
    with pytest.raises(InvalidArgument, match="has 2 blocks, 0 were given"):
        FrozenTable(spec, [], seed=1)
    table = frozen(spec, {1: [1, 2]})
    for out in (np.zeros((1, 3), np.float32), np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float64)):
        with pytest.raises(Malformed, match="out is"):
            table.lookup(np.array([1], np.uint64), out)
    with pytest.raises(Malformed, match="keys"):
        table.lookup(np.array([1], np.int64), np.zeros((1, 2), np.float32))  # type: ignore[arg-type]


def test_keys_that_cannot_be_written_to_need_no_other_kernel():
    table = frozen(TableSpec("t", 2, blocks=2), {1: [1, 2]})
    keys = np.frombuffer(np.array([1, 2], np.uint64).tobytes(), np.uint64)
    assert table.lookup(keys, np.empty((2, 2), np.float32)) == 1
    if reference.JIT:
        assert len(look_up.signatures) == 1  # type: ignore[attr-defined]
    assert SCRATCH_WORDS
