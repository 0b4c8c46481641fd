# SPDX-License-Identifier: Apache-2.0
"""What a push carries for a table's policies, and a push that fails in the middle: no group twice, none lost."""

import numpy as np
import pytest
import rig

from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.content import BlockRows
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import Admission, DenseSpec, Eviction, OptimizerSpec, TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import inlined
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, StalePlacement

RAW = tuple(range(40))
HALVING = OptimizerSpec("sgd", schedule=Schedule("step", gamma=0.5, every=10))


def job_of(table, dense=()):
    return rig.Job(rig.spec_of(tables=(table,), dense=dense), shards=1).place()


def message(job, group, *, split=3, raw=RAW, step=0, value=1.0, occurrences=None, clicks=None, dense=None):
    keyset = rig.group_keys(job.layout, job.routes(), "user", raw)
    n, dim = len(keyset.keys), job.layout.tables[0].dim
    beside = [
        None if v is None else np.full(n, v, kind) for v, kind in ((occurrences, np.uint32), (clicks, np.float32))
    ]
    part = RowGradients(keyset, np.full((n, dim), value, np.float32), 1.0, *beside)
    flat = None if dense is None else np.full(job.layout.dense_size, dense, np.float32)
    (made,) = cut_push(job.layout, job.routes(), PushIdentity(split, group, step), {"user": part}, flat, 1.0)
    made.request.header.CopyFrom(job.header(0))
    return inlined(made.bulk)


def push(job, *arguments, **named):
    return job.services[0].push(message(job, *arguments, **named))


def content(job, block=0):
    return job.shards[0].tables[0].export_block(block)


def test_the_step_of_an_update_is_one_more_than_the_groups_before_it():
    """A schedule that halves every ten steps: step 10 is the last whole one, for rows and dense values alike."""
    job = job_of(TableSpec("user", 2, HALVING, rig.ZEROS, 8), (DenseSpec("w", (3,), HALVING),))
    for group, (told, sum_so_far) in enumerate([(0, 1.0), (9, 2.0), (10, 2.5), (29, 2.75)]):
        push(job, group, step=told, dense=1.0)
        assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -sum_so_far))
        assert np.array_equal(job.dense(), np.full(3, -sum_so_far))
        assert job.shards[0].step == told + 1
    # An older one comes late: the shard's own step is the highest.
    push(job, 4, step=5, dense=0.0)
    assert job.shards[0].step == 30


@pytest.mark.parametrize("step", [1 << 62, (1 << 64) - 1])
def test_a_step_beyond_all_limits_is_refused_before_anything_is_changed(step):
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8))
    before = rig.state(job)
    with pytest.raises(InvalidArgument, match=f"step {step}: a push comes after fewer than"):
        push(job, 0, step=step)
    assert rig.state(job) == before
    assert job.shards[0].step == 0


def test_occurrences_and_clicks_reach_the_counters():
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 1, usage=True, eviction=Eviction(score=0.1, decay=1.0)))
    push(job, 0, raw=RAW[:20], step=6, occurrences=3, clicks=2.0)
    push(job, 1, raw=RAW[:10], step=8)
    found = content(job)
    # In the order of embedding/slab.py: occurrences, tick of the last update, shows, clicks.
    floats = found.counters[:, 2:].copy().view(np.float32)
    for key, counters, scores in zip(found.keys.tolist(), found.counters.tolist(), floats.tolist(), strict=True):
        twice = key < 10
        assert counters[:2] == [4 if twice else 3, 9 if twice else 7]
        assert scores == [4.0 if twice else 3.0, 2.0]


def test_an_admission_by_count_reads_occurrences():
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, admission=Admission("count", occurrences=5)))
    push(job, 0, occurrences=3)
    assert job.shards[0].stats()["rows"] == 0
    assert job.shards[0].stats()["waiting"] == {"user": 40}
    push(job, 1)
    assert job.shards[0].stats()["rows"] == 0
    push(job, 2, value=2.0)
    assert job.shards[0].stats()["rows"] == 40
    assert "waiting" not in job.shards[0].stats()
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -2.0))
    assert job.shards[0].stats()["rows_not_admitted"] == 80


def test_blocks_that_have_it_keep_their_counts_when_the_others_take_it():
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, usage=True))
    request = message(job, 0, occurrences=1, clicks=1.0)
    part = request.tables[0]
    part.occurrences.CopyFrom(pack(np.arange(1, 41, dtype=np.uint32)))
    keys = np.frombuffer(part.keys.keys.data, np.uint64)
    some = message(job, 0, raw=keys[:1], occurrences=100)
    job.services[0].push(some)
    assert job.services[0].push(request).skipped == 1
    counts = {}
    for block in range(8):
        found = content(job, block)
        counts |= dict(zip(found.keys.tolist(), found.counters[:, 0].tolist(), strict=True))
    first = np.frombuffer(part.keys.counts.data, np.int32)[0]
    wanted = dict(zip(keys[first:].tolist(), range(first + 1, 41), strict=True))
    assert counts == {int(keys[0]): 100} | wanted


@pytest.mark.parametrize(
    ("field", "values", "text"),
    [
        ("occurrences", np.ones(39, np.uint32), "39 occurrences for 40 keys"),
        ("occurrences", np.ones(41, np.uint32), "41 occurrences for 40 keys"),
        ("occurrences", np.ones(40, np.int32), "occurrences of user: dtype int32, wanted uint32"),
        ("occurrences", np.ones((40, 1), np.uint32), "occurrences of user: 2 dimensions"),
        ("clicks", np.ones(1, np.float32), "1 clicks for 40 keys"),
        ("clicks", np.full(40, np.nan, np.float32), "clicks must be finite and >= 0"),
        ("clicks", np.full(40, np.inf, np.float32), "clicks must be finite and >= 0"),
        ("clicks", np.full(40, -0.5, np.float32), "clicks must be finite and >= 0"),
        ("clicks", np.ones(40, np.uint32), "clicks of user: dtype uint32, wanted float32"),
    ],
)
def test_malformed_occurrences_change_and_mark_nothing(field, values, text):
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, usage=True))
    request = message(job, 0, occurrences=2, clicks=1.0)
    before = rig.state(job)
    getattr(request.tables[0], field).CopyFrom(pack(values))
    with pytest.raises(Malformed, match=text):
        job.services[0].push(request)
    assert rig.state(job) == before
    assert job.shards[0].next_groups([3]) == [0]


def no_room(block, *rest):
    raise OutOfMemory("no room")


def no_memory(block, *rest):
    raise MemoryError


def disk_full(block, *rest):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", [no_room, no_memory, disk_full])
@pytest.mark.parametrize("done", [0, 1, 5, 7])
def test_a_push_without_room_in_the_middle_is_not_repeated_where_it_is_done(monkeypatch, fault, done):
    """A new block has no room for rows, so a push of new keys asks for it block by block."""
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8), (DenseSpec("w", (3,), rig.SGD),))
    request, shard = message(job, 0, dense=1.0), job.shards[0]
    table = shard.tables[0]
    real, asked = table._make_room, []

    def make_room(block, *rest):
        asked.append(block)
        return fault(block) if len(asked) > done else real(block, *rest)

    for attempt in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(table, "_make_room", make_room)
            with pytest.raises(OutOfMemory) as raised:
                job.services[0].push(request)
        # The second attempt skips what is done and fails at its first block.
        assert raised.value.details["groups"] == (0 if attempt else done)
        assert shard.sequence.tolist() == [1] * done + [0] * (8 - done) + [0]
        assert [shard.marks.of_block(n) for n in range(9)] == [{3: 0}] * done + [{}] * (9 - done)
        assert shard.stats()["rows"] == np.frombuffer(request.tables[0].keys.counts.data, np.int32)[:done].sum()
    reply = job.services[0].push(request)
    assert (reply.applied, reply.skipped) == (9 - done, done)
    assert shard.sequence.tolist() == [1] * 9
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))
    assert np.array_equal(job.dense(), np.full(3, -1))
    assert job.services[0].push(request).skipped == 9


def test_a_block_that_vanishes_in_the_middle_of_a_push_ends_it_there():
    """Nothing drops a block during a push; if it happened, what was done would still be marked."""
    job = job_of(TableSpec("user", 2, rig.SGD, rig.ZEROS, 8))
    request, shard = message(job, 0), job.shards[0]
    table = shard.tables[0]
    real = table._make_room

    def make_room(block, *rest):
        real(block, *rest)
        if block == 2:
            table.drop(5)

    table._make_room = make_room
    with pytest.raises(StalePlacement) as raised:
        job.services[0].push(request)
    assert (raised.value.details["groups"], raised.value.details["block"]) == (5, 5)
    assert shard.sequence.tolist() == [1] * 5 + [0] * 3
    assert [shard.marks.of_block(n) for n in range(8)] == [{3: 0}] * 5 + [{}] * 3
    table._make_room = real
    table.adopt(5)
    assert job.services[0].push(request).applied == 3
    assert np.array_equal(job.rows("user", RAW), np.full((40, 2), -1))


def test_the_sequence_of_a_block_is_its_version(rng):
    """Pushes, evictions and undo count alike, and a block that is moved takes its number along."""
    spec = TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, eviction=Eviction(max_bytes=8 * 16 * 24))
    job = job_of(spec, (DenseSpec("w", (3,), rig.SGD),))
    shard = job.shards[0]
    for group in range(20):
        push(job, group, raw=rng.choice(10_000, 200, replace=False), step=group, dense=1.0)
    table = shard.tables[0]
    assert table.evicted > 0
    assert shard.stats()["evicted"] == {"user": table.evicted}
    versions = [table.version(block) for block in range(8)]
    assert max(versions) > 20
    assert shard.sequence.tolist() == [*versions, 20]
    assert [shard.operations(n) for n in range(9)] == [*versions, 20]
    rows = table.export_block(3)
    table.import_block(3, BlockRows(rows.keys, rows.weights, rows.state, rows.counters), version=77)
    assert shard.operations(3) == 77
