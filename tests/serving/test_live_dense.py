# SPDX-License-Identifier: Apache-2.0
"""The dense parameters of a job that trains: those of its shards to the bit, of one instant each, and never of two runs."""

import follow_rig
import numpy as np
import pytest
import rig
import serving_rig

from oarlock.proto.arrays import pack
from oarlock.proto.errors import Malformed, Unavailable
from oarlock.proto.shard_pb2 import ChangesReply, ChangesRequest
from oarlock.ps import dense_changes

SIZE = 14


def gradients(rng):
    return rng.normal(0, 1, SIZE).astype(np.float32)


def blocks_of(job, shard):
    """Return where in the vector of all parameters a shard's values are: bool[P]."""
    found = np.zeros(SIZE, np.bool_)
    layout = job.inner.layout
    for number, block in enumerate(layout.dense_blocks, layout.dense_base):
        if job.inner.owners[number] == shard:
            found[block.offset : block.offset + block.length] = True
    return found


@pytest.fixture
def followed(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path, dense=True)
    job.train(range(20), dense=gradients(np.random.default_rng(9)))
    job.catch_up(following)
    yield job, following
    following.close()


def test_values_are_those_of_the_shards(followed):
    job, following = followed
    rng = np.random.default_rng(0)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    assert np.ptp(following.current.dense) > 0.1
    before = following.current.dense
    job.catch_up(following)
    # Nothing changed, and nobody has to take them over again.
    assert following.current.dense is before
    kept = before.copy()
    job.train(range(20), dense=gradients(rng))
    job.catch_up(following)
    assert following.current.dense is not before
    assert (before == kept).all()
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    with pytest.raises(ValueError, match="read-only"):
        following.current.dense[0] = 1


def test_it_is_not_ready_without_them(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path, dense=True)
    job.train(range(20))
    for shard in job.inner.shards.values():
        shard.changes.dense._next = np.inf
    job.catch_up(following)
    assert following.live.complete
    assert not following.ready
    with pytest.raises(Unavailable, match="dense parameters"):
        _ = following.live.dense
    for shard in job.inner.shards.values():
        shard.changes.dense._next = 0.0
    job.catch_up(following)
    assert following.ready
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    rows_alone = job.follower(tmp_path)
    job.catch_up(rows_alone)
    assert rows_alone.ready
    with pytest.raises(Unavailable, match="dense parameters"):
        _ = rows_alone.current.dense
    following.close()
    rows_alone.close()


@pytest.mark.parametrize("answer_bytes", [1 << 20, 8])
@pytest.mark.parametrize("seed", range(3))
def test_any_history_is_followed_to_the_bit_and_of_one_instant_each(tmp_path, seed, answer_bytes):
    job = follow_rig.Job()
    for shard in job.inner.shards.values():
        shard.changes.dense._answer_bytes = answer_bytes
    following = job.follower(tmp_path, dense=True)
    rng = np.random.default_rng(seed)
    states = [job.inner.dense()]
    moved = False
    for _ in range(100):
        deed = rng.integers(0, 6)
        if deed < 2:
            job.train(np.unique(rng.integers(0, 60, 5)), dense=gradients(rng))
        elif deed == 2 and rng.random() < 0.3:
            moved = True
            block = int(rng.integers(job.inner.layout.dense_base, job.inner.layout.blocks))
            job.inner.move(block, int(rng.integers(0, 2)))
        else:
            job.clock.now += 1.0
            for shard in following._routes.shards.values():
                following.poll(shard)
        states.append(job.inner.dense())
        if following._wake.is_set():
            following._wake.clear()
            following.look()
        if following.ready:
            dense = following.current.dense
            for block in job.inner.layout.dense_blocks:
                run = slice(block.offset, block.offset + block.length)
                assert any((state[run] == dense[run]).all() for state in states)
            for shard in job.inner.shards if not moved and answer_bytes > 8 else ():
                mine = blocks_of(job, shard)
                assert any((state[mine] == dense[mine]).all() for state in states)
    following.look()
    job.catch_up(following, 100)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    assert following.current.version.age() < 2.5
    following.close()


def test_values_that_come_in_several_answers_come_all_though_they_change(tmp_path):
    job = follow_rig.Job()
    for shard in job.inner.shards.values():
        shard.changes.dense._answer_bytes = 8
    following = job.follower(tmp_path, dense=True)
    rng = np.random.default_rng(0)
    seen = [set() for _ in job.inner.layout.dense_blocks]
    for _ in range(60):
        job.train(range(5), dense=gradients(rng))
        job.clock.now += 1.0
        for shard in following._routes.shards.values():
            following.poll(shard)
        for found, block in zip(seen, job.inner.layout.dense_blocks, strict=True):
            if following.ready:
                found.add(following.current.dense[block.offset : block.offset + block.length].tobytes())
    assert all(len(found) > 10 for found in seen)
    following.close()


def test_a_block_that_moved_is_not_said_to_be_fresh(followed):
    job, following = followed
    base = job.inner.layout.dense_base
    number = next(n for n in range(base, job.inner.layout.blocks) if job.inner.owners[n] == 0)
    job.inner.move(number, 1)
    job.clock.now += 100
    for shard in following._routes.shards.values():
        following.poll(shard)
    assert following.current.version.age() >= 100
    following.look()
    job.catch_up(following)
    assert following.current.version.age() < 2.5
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()


def test_no_push_comes_in_between(followed, monkeypatch):
    job, following = followed
    held = []
    for shard in job.inner.shards.values():
        pull = shard.dense_group.pull

        def noted(blocks, out, shard=shard, pull=pull):
            held.append(shard.push_lock.locked())
            pull(blocks, out)

        monkeypatch.setattr(shard.dense_group, "pull", noted)
    job.train(range(5), dense=np.ones(SIZE, np.float32))
    job.catch_up(following)
    assert held == [True, True]


def test_the_steps_of_a_sync_job_are_followed(tmp_path):
    job = follow_rig.Job(shards=1, mode="sync", ranks=1)
    following = job.follower(tmp_path, dense=True)
    states = set()
    for number in range(1, 6):
        job.take_step(number, range(60), float(number))
        job.catch_up(following)
        assert following.current.dense.tobytes() == job.inner.dense().tobytes()
        states.add(following.current.dense.tobytes())
        # Parts that are staged are not seen.
        request = rig.request_of(job.inner, 0, 0, raw=range(5))
        request.rank, request.step = 1, number
        job.inner.services[0].push(request)
        job.catch_up(following)
        assert following.current.dense.tobytes() in states
    assert len(states) == 5
    following.close()


def test_they_leave_at_a_bounded_rate_and_are_as_old_as_is_said(followed, monkeypatch):
    job, following = followed
    monkeypatch.setattr(dense_changes, "DENSE_BYTES_PER_SECOND", 1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        job.train(range(20), dense=gradients(rng))
        job.catch_up(following)
    assert following.current.dense.tobytes() != job.inner.dense().tobytes()
    seconds = following.current.version.age()
    assert seconds >= 2.0
    job.clock.now += 100
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    assert following.current.version.age() < 2.5


def test_a_new_run_has_values_of_its_own(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path, dense=True)
    job.train(range(20), dense=np.ones(SIZE, np.float32))
    job.catch_up(following)
    old = following.current
    job.inner = follow_rig.Job().inner
    job.inner.run = job.inner.coordinator.run = 2
    for s, service in job.inner.services.items():
        job.inner.shards[s] = service.configure(job.spec, rig.Identity(job.spec.job_bytes, 2, s, 100 + s))
        job.tune(service)
    job.inner.place()
    assert following.look()
    assert not following.ready
    job.train(range(20), dense=np.full(SIZE, -3, np.float32))
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    assert (following.current.dense > 0).all()
    # Who began to answer by the old run ends so.
    assert (old.dense < 0).all()
    following.close()


def test_a_cut_has_them_first_and_last(tmp_path):
    job = follow_rig.Job()
    cuts = serving_rig.Model(tmp_path, specs=job.spec.tables, dense=job.spec.dense, job=job.spec.job)
    cuts.cut(1)
    following = job.follower(tmp_path, dense=True)
    assert following.ready
    assert following.current.dense.tolist() == [1.0] * SIZE
    for _ in range(2):
        job.train(range(20), dense=np.ones(SIZE, np.float32))
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()
    # What nobody told is taken from the last cut: of operations beyond those that were told.
    job.clock.now += 10
    cuts.cut(3, run=1)
    assert following.take_last_cut()
    assert following.current.dense.tolist() == [3.0] * SIZE
    # An older one changes nothing.
    job.clock.now += 10
    following.live.cut = 0
    cuts.cut(2, run=1)
    following.store.load_manifest, newest = lambda cut: newest(2), following.store.load_manifest
    assert following.take_last_cut()
    assert following.current.dense.tolist() == [3.0] * SIZE
    following.close()


def dense_reply(job, numbers, values=None, stamps=None):
    base = job.inner.layout.dense_base
    numbers = np.array(numbers, np.int32)
    if values is None:
        values = np.ones(sum(job.inner.layout.dense_blocks[n - base].length for n in numbers if n >= base), np.float32)
    stamps = np.full(len(numbers), 1 << 39, np.uint64) if stamps is None else np.array(stamps, np.uint64)
    return ChangesReply(dense=pack(numbers), dense_stamps=pack(stamps), dense_values=pack(values))


def test_lies_about_them_are_refused_and_change_nothing(followed):
    job, following = followed
    shard = following._routes.shards[0]
    base, end = job.inner.layout.dense_base, job.inner.layout.blocks
    mine = [n for n in range(base, end) if job.inner.owners[n] == 0]
    (other, *_) = [n for n in range(base, end) if job.inner.owners[n] == 1]
    numbers = np.flatnonzero(job.inner.owners == 0).astype(np.int32)
    before = following.current.dense
    one = job.inner.layout.dense_blocks[mine[0] - base].length
    lies = [
        (dense_reply(job, [mine[0]], np.ones(one + 1, np.float32)), "values of dense blocks"),
        (dense_reply(job, [mine[0]], np.ones(one - 1, np.float32)), "values of dense blocks"),
        (dense_reply(job, [mine[0]], np.ones(1 << 20, np.float32)), "values of dense blocks"),
        (dense_reply(job, [mine[0]], np.ones(one, np.float64).view(np.int32)[:one]), "dtype"),
        (dense_reply(job, [mine[0]], np.ones((one, 1), np.float32)), "dimensions"),
        (dense_reply(job, [mine[0]], np.array([np.nan] * one, np.float32)), "finite"),
        (dense_reply(job, [mine[0]], np.array([np.inf] * one, np.float32)), "finite"),
        (dense_reply(job, [other]), "not asked for"),
        (dense_reply(job, [end], np.ones(4, np.float32)), "ascending"),
        (dense_reply(job, [base - 1], np.ones(4, np.float32)), "ascending"),
        (dense_reply(job, [-1], np.ones(4, np.float32)), "ascending"),
        (dense_reply(job, [mine[0], mine[0]]), "ascending"),
        (dense_reply(job, mine[::-1]), "ascending"),
        (dense_reply(job, [mine[0]], stamps=[0]), "one of 0"),
        (dense_reply(job, [mine[0]], stamps=[1, 2]), "2 stamps"),
        (ChangesReply(moved=pack(np.array([end], np.int32))), "moved blocks"),
    ]
    for reply, words in lies:
        with following.live.lock:
            following.live.question(shard, numbers, job.inner.header(0))
            with pytest.raises(Malformed, match=words):
                following.live.apply(shard, numbers, reply, job.clock.now)
        assert following.current.dense is before
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()


def test_values_that_were_lied_about_go_when_the_truth_is_another(followed):
    job, following = followed
    shard = following._routes.shards[0]
    numbers = np.flatnonzero(job.inner.owners == 0).astype(np.int32)
    mine = [int(n) for n in numbers if n >= job.inner.layout.dense_base]
    with following.live.lock:
        following.live.question(shard, numbers, job.inner.header(0))
        following.live.apply(shard, numbers, dense_reply(job, mine), job.clock.now)
    assert following.current.dense.tobytes() != job.inner.dense().tobytes()
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()


def test_content_that_was_exchanged_is_told_though_operations_are_as_many(followed):
    job, following = followed
    for shard in job.inner.shards.values():
        for parameter in shard.dense:
            for block in parameter.owned.tolist():
                content = parameter.export_block(block)
                parameter.import_block(block, content._replace(weights=content.weights + 1))
    job.catch_up(following)
    assert following.current.dense.tobytes() == job.inner.dense().tobytes()


def test_a_question_that_is_wrong_is_refused(followed):
    job, _ = followed
    base, end = job.inner.layout.dense_base, job.inner.layout.blocks
    none = np.empty(0, np.uint64)
    for numbers, stamps, words in (
        ([base - 1], [0], "dense blocks are not ascending"),
        ([end], [0], "dense blocks are not ascending"),
        ([base + 1, base], [0, 0], "dense blocks are not ascending"),
        ([base], [], "1 dense blocks with 0 stamps"),
    ):
        request = ChangesRequest(
            header=job.inner.header(0),
            blocks=pack(np.empty(0, np.int32)),
            sequences=pack(none),
            dense=pack(np.array(numbers, np.int32)),
            dense_stamps=pack(np.array(stamps, np.uint64)),
        )
        with pytest.raises(Malformed, match=words):
            job.inner.services[0].changes(request)
