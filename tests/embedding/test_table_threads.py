# SPDX-License-Identifier: Apache-2.0
"""Threads at one table: no update is lost or doubled, no row is seen half changed, whatever else goes on meanwhile."""

import functools
import sys
import threading
from contextlib import contextmanager

import embedding_reference as reference
import numpy as np
import pytest
import table_reference

from oarlock.embedding import cold
from oarlock.embedding.spec import Eviction, Initializer, OptimizerSpec, TableSpec
from oarlock.embedding.spill_file import SpillFile
from oarlock.proto.errors import StalePlacement

DIM = 5
PUSHERS = 3


def spec(**more):
    return TableSpec("t", DIM, OptimizerSpec("sgd"), Initializer("zeros"), **{"blocks": 8} | more)


@contextmanager
def in_the_background(*calls):
    """Repeat calls in threads of their own until the block ends; raise what went wrong in them."""
    stop, errors = threading.Event(), []

    def run(call):
        turn = 0
        try:
            with np.errstate(over="ignore"):  # for interpreted kernels; conftest's setting is its own thread's
                while not stop.is_set():
                    call(turn)
                    turn += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert errors == []


def hammer(table, many, rounds, *, blocks=None):
    """Push small integers from PUSHERS threads; return the sums of what was sent: int64[many].

    All columns of a gradient are equal, so that a torn row shows.
    """
    stored = set(range(table.spec.blocks)) if blocks is None else blocks
    sent, errors = np.zeros(many, np.int64), []
    batches = []
    for thread in range(PUSHERS):
        rng = np.random.default_rng(thread)
        batches.append([])
        for turn in range(rounds):
            drawn = np.unique(rng.integers(0, 20 + turn * (many - 20) // rounds, many // 4))
            keys, used, counts, _ = table_reference.group("t", table.bits, drawn.tolist(), stored)
            values = rng.integers(-9, 10, len(keys))
            sent[keys.astype(np.int64)] -= values
            gradients = np.repeat(values[:, None], DIM, axis=1).astype(np.float32)
            batches[-1].append((keys, used, counts, gradients))
    barrier = threading.Barrier(PUSHERS)

    def work(mine):
        try:
            barrier.wait()
            with np.errstate(over="ignore"):
                for keys, used, counts, gradients in mine:
                    table.push(keys, used, counts, gradients, rate=1.0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return sent


def look(table, many):
    """Return a call that pulls everything and finds torn rows."""

    keys, blocks, counts, _ = table_reference.group("t", table.bits, range(many), set(range(table.spec.blocks)))

    def call(turn):
        rows = np.full((len(keys), DIM), np.nan, np.float32)
        try:
            table.pull(keys, blocks, counts, rows)
        except StalePlacement:
            return
        assert (rows == rows[:, :1]).all()

    return call


def shake(table, blocks):
    """Return a call that exports, drops, adopts, fills and sweeps blocks that nobody pushes to."""
    content = None

    def call(turn):
        nonlocal content
        block = blocks[turn % len(blocks)]
        if content is None:
            keys, *_ = table_reference.group("t", table.bits, range(300), {block})
            content = (keys, np.ones((len(keys), DIM), np.float32), np.zeros((len(keys), 0), np.float32))
            content = table.export_block(block)._replace(keys=keys, weights=content[1], state=content[2])
        if block == blocks[0]:
            table.import_block(block, content)
        else:
            table.drop(block)
            table.adopt(block)
        table.sweep(block, tick=0, buckets=7)
        assert len(table.export_block(blocks[0]).keys) in (0, len(content.keys))

    return call


ROUNDS = 60 if reference.JIT else 2
MANY = reference.MANY


def exact(table, sent, stored=None):
    keys, blocks, counts, _ = table_reference.group("t", table.bits, range(len(sent)), stored or set(range(8)))
    rows = np.empty((len(keys), DIM), np.float32)
    table.pull(keys, blocks, counts, rows)
    assert (rows == sent[keys.astype(np.int64)][:, None]).all()


def test_pushes_beside_pulls_and_exports_lose_and_double_nothing():
    table = table_reference.stored(spec(usage=True))

    def export(turn):
        found = table.export_block(turn % 8)
        assert (found.weights == found.weights[:, :1]).all()
        assert len(set(found.keys.tolist())) == len(found.keys)

    with in_the_background(look(table, MANY), export):
        sent = hammer(table, MANY, ROUNDS)
    exact(table, sent)
    assert not table.descriptors[:, :2].any()  # all locks are free


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_blocks_come_and_go_and_are_swept_meanwhile(dtype):
    table = table_reference.stored(spec(eviction=Eviction(norm=0.5), dtype=dtype))
    pushed = {0, 2, 3, 5, 6}
    few = 60  # few updates of a key, so that its sums are small integers, which bfloat16 holds exactly
    if dtype == "float32":
        few = MANY
    with in_the_background(look(table, MANY), shake(table, [1, 4, 7])):
        sent = hammer(table, few, ROUNDS if dtype == "float32" else 3, blocks=pushed)
    exact(table, sent, pushed)


def test_sweeps_of_the_pushed_blocks_take_away_only_what_their_rule_says():
    # A row of zeros reads the same whether it is there or not, so sums stay exact when such rows are evicted.
    table = table_reference.stored(spec(eviction=Eviction(norm=0.5)))
    with in_the_background(look(table, MANY), lambda turn: table.sweep(turn % 8, tick=turn, buckets=16)):
        sent = hammer(table, MANY, ROUNDS)
    exact(table, sent)
    assert table.evicted > 0 or not reference.JIT


@pytest.fixture
def small_files(monkeypatch):
    """Let dead records pile up to so few, and segments of the file be so small, that it is compacted all the time."""
    monkeypatch.setattr(cold, "TIDY_RECORDS", 50)
    monkeypatch.setattr(cold, "SLACK", 0)
    compacted, real = [], SpillFile.compact

    def compact(self, move, **more):
        found = real(self, move, **more)
        compacted.append(found)
        return found

    monkeypatch.setattr(SpillFile, "compact", compact)
    small = functools.partial(SpillFile, limit_bytes=1 << 24, segment_bytes=2048)
    monkeypatch.setattr(cold, "SpillFile", small)
    return compacted


def test_rows_go_to_the_file_and_come_back_while_threads_push_and_pull(tmp_path, small_files):
    table = table_reference.stored(spec(memory_bytes=1, blocks=2), folder=tmp_path)
    with in_the_background(look(table, MANY // 2)):
        sent = hammer(table, MANY // 2, ROUNDS // 2)
    if not sum(small_files):
        # Whoever reads keeps segments from being given up, on a busy machine all the time.
        sent += hammer(table, MANY // 2, ROUNDS // 2)
    counts = table._cold.file.counts
    assert min(counts.records_written, counts.records_read) > 0 or not reference.JIT
    assert sum(small_files) > 0 or not reference.JIT
    exact(table, sent, {0, 1})
    table.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [0, 1])
def test_a_long_run_of_everything_at_once(tmp_path, small_files, memory_bytes):
    table = table_reference.stored(spec(eviction=Eviction(norm=0.5), memory_bytes=memory_bytes), folder=tmp_path)
    pushed = {0, 2, 3, 5, 6}
    with in_the_background(
        look(table, 4 * MANY), shake(table, [1, 4, 7]), lambda turn: table.sweep(turn % 3 * 3 % 8, tick=0, buckets=50)
    ):
        sent = hammer(table, 4 * MANY, 10 * ROUNDS, blocks=pushed)
    exact(table, sent, pushed)
    table.close()
