# SPDX-License-Identifier: Apache-2.0
"""What follows a job serves what its shards would answer, to the bit, and never a state that a row did not have."""

import follow_rig
import numpy as np
import pytest
import rig

from oarlock.proto.errors import Unavailable, WrongJob

KEYS = np.arange(200, dtype=np.uint64)


@pytest.fixture
def followed(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path)
    yield job, following
    following.close()


def same(job, following, name="user", keys=KEYS):
    found, missing = follow_rig.served(following, name, keys)
    assert found.tobytes() == job.inner.rows(name, keys).tobytes()
    rows = sum(shard.tables[shard.layout.table_index[name]].rows for shard in job.inner.shards.values())
    assert following.current.table(name).rows == rows
    assert missing == len(keys) - rows


def test_rows_come_whole_first_and_then_by_what_changed(followed):
    job, following = followed
    job.train(range(100))
    assert not following.ready
    with pytest.raises(Unavailable, match="still getting its model"):
        _ = following.current
    job.catch_up(following)
    assert following.ready
    same(job, following)
    whole = following.counts.whole_blocks
    assert whole == 12
    job.train(range(50, 150))
    job.catch_up(following)
    same(job, following)
    assert following.counts.whole_blocks == whole
    assert following.counts.rows == 100


def test_a_key_that_left_is_gone_with_its_tombstone(followed):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    for _ in range(40):
        job.train(range(50))
        job.sweep()
    job.catch_up(following)
    same(job, following)
    assert following.counts.tombstones == 50
    assert follow_rig.served(following, "user", KEYS)[1] == 150
    assert following.counts.whole_blocks == 12


def test_an_undo_is_followed(followed):
    job, following = followed
    job.train(range(60))
    job.train(range(60), 3.0)
    job.catch_up(following)
    before = follow_rig.served(following, "user", KEYS)[0]
    job.undo(range(60), 1)
    job.catch_up(following)
    same(job, following)
    assert (follow_rig.served(following, "user", KEYS)[0] != before).any()
    assert following.counts.whole_blocks == 12


def test_the_steps_of_a_sync_job_are_followed(tmp_path):
    job = follow_rig.Job(shards=1, mode="sync", ranks=1)
    following = job.follower(tmp_path)
    for number in range(1, 8):
        job.take_step(number, range(10 * number, 60 + 5 * number), float(number))
        job.catch_up(following)
        same(job, following)
    assert following.counts.whole_blocks == 12
    assert following.counts.tombstones > 0


@pytest.mark.parametrize("spec", follow_rig.SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_any_history_is_followed_to_the_bit(tmp_path, spec, seed):
    job = follow_rig.Job(spec)
    following = job.follower(tmp_path)
    rng = np.random.default_rng([seed, len(spec)])
    states = {int(key): {job.inner.rows("user", [key]).tobytes()} for key in KEYS[:60]}
    number = 0

    def note():
        rows = job.inner.rows("user", KEYS[:60])
        for key, row in zip(states, rows, strict=True):
            states[key].add(row.tobytes())

    for _ in range(60):
        deed = rng.integers(0, 10)
        if deed < 5:
            job.train(np.unique(rng.integers(0, 60, 20)), float(rng.normal()))
            job.train(np.unique(rng.integers(0, 60, 20)), name="item")
        elif deed == 5:
            job.sweep()
        elif deed == 6 and job.spec.tables[0].guard.undo:
            number += 1
            job.undo(np.unique(rng.integers(0, 60, 10)).tolist(), number)
        elif deed == 7:
            block = int(rng.integers(0, job.inner.layout.dense_base))
            job.inner.move(block, int(rng.integers(0, 2)))
        elif deed == 8:
            job.clock.now += 100 * float(rng.integers(0, 2))
        else:
            job.clock.now += 1
            for shard in following._routes.shards.values():
                following.poll(shard)
        note()
        if following.ready:
            found, _ = follow_rig.served(following, "user", KEYS[:60])
            for key, row in zip(states, found, strict=True):
                assert row.tobytes() in states[key]
    following.look()
    job.catch_up(following)
    same(job, following)
    same(job, following, "item")


def test_who_is_far_behind_gets_whole_blocks(followed):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    for shard in job.inner.shards.values():
        shard.feed._ring_bytes = 1
    whole = following.counts.whole_blocks
    job.train(range(100))
    job.catch_up(following)
    same(job, following)
    assert following.counts.whole_blocks > whole


def test_too_many_keys_between_two_questions_are_whole_blocks(followed, monkeypatch):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    monkeypatch.setattr("oarlock.ps.feed.NOTED_KEYS", 10)
    for _ in range(3):
        job.train(range(100))
    job.catch_up(following)
    same(job, following)
    assert following.counts.whole_blocks > 12


def test_the_push_that_is_one_too_many_is_not_lost(followed, monkeypatch):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    monkeypatch.setattr("oarlock.ps.feed.NOTED_KEYS", 10)
    job.train(range(100))
    job.catch_up(following)
    same(job, following)


def test_what_keys_were_forgotten_of_is_forgotten_here_too(followed):
    """Blocks that got another content while nobody asked, and stand at the number of operations that they had."""
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    job.clock.now += 1000
    job.train(range(1), name="item")
    job.train(range(100), name="item")
    for shard in job.inner.shards.values():
        assert not shard.feed.listening
        table = shard.tables[0]
        for block in table.owned.tolist():
            content = table.export_block(block)
            table.import_block(block, content._replace(weights=content.weights + 1), version=table.version(block))
    job.catch_up(following)
    same(job, following)


def test_keys_whose_tombstones_are_forgotten_leave_with_the_block(followed):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    for _ in range(40):
        job.train(range(50))
        job.sweep()
    for shard in job.inner.shards.values():
        table = shard.tables[0]
        for block in table.owned.tolist():
            table.forget_tombstones(block, until=table.version(block))
    job.catch_up(following)
    same(job, following)
    assert follow_rig.served(following, "user", KEYS)[1] == 150


def test_a_cut_that_cannot_be_read_makes_nothing_ready(followed):
    job, following = followed
    job.train(range(100))
    job.status["checkpoints"] = [{"cut": 1}]
    following.look()
    assert not following.ready
    job.catch_up(following)
    assert following.ready
    assert following.current.version.cut == 1
    same(job, following)


def test_blocks_come_in_pages_while_they_change(followed):
    job, following = followed
    for shard in job.inner.shards.values():
        shard.changes._page_bytes = shard.changes._answer_bytes = 100
    job.train(range(200))
    for turn in range(400):
        job.clock.now += 1.0
        for shard in following._routes.shards.values():
            following.poll(shard)
        job.train(range(turn % 200, 200), float(turn))
        job.sweep()
        if following.ready:
            break
    job.catch_up(following, 400)
    same(job, following)


def test_no_row_goes_back_while_its_block_comes_in_pages(followed, monkeypatch):
    job, following = followed
    job.train(range(60))
    job.catch_up(following)
    # A page in a while.
    monkeypatch.setattr("oarlock.ps.changes.WHOLE_BYTES_PER_SECOND", 100)
    history = [job.inner.rows("user", KEYS[:60])]
    seen = np.zeros(60, np.int64)
    for shard in job.inner.shards.values():
        shard.changes._page_bytes = 100
        shard.feed._ring_bytes = 1
    job.train(range(60))
    history.append(job.inner.rows("user", KEYS[:60]))
    rng = np.random.default_rng(1)
    for turn in range(100):
        job.clock.now += 1.0
        for shard in following._routes.shards.values():
            following.poll(shard)
            shard = job.inner.shards[shard.id]
            shard.feed._ring_bytes = 1 << 20 if turn else 1
            # Somebody else asks, so that there is a take in between.
            job.train(np.unique(rng.integers(0, 60, 30)), float(rng.normal()))
            history.append(job.inner.rows("user", KEYS[:60]))
            job.clock.now += 1.0
            shard.feed.take()
            found, _ = follow_rig.served(following, "user", KEYS[:60])
            for key, row in enumerate(found):
                at = [n for n, rows in enumerate(history) if rows[key].tobytes() == row.tobytes()]
                assert at, key
                assert at[-1] >= seen[key], (key, turn)
                seen[key] = max(seen[key], at[0])
    assert following.counts.whole_blocks > 12


def test_a_block_that_got_another_content_comes_whole(followed):
    """As when a table goes back to a checkpoint; also with the same number of operations, as after a death elsewhere."""
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    for more in (1, 0):
        whole = following.counts.whole_blocks
        for shard in job.inner.shards.values():
            table = shard.tables[0]
            for block in table.owned.tolist():
                content = table.export_block(block)
                other = content._replace(weights=content.weights + 1)
                table.import_block(block, other, version=table.version(block) + more)
        job.catch_up(following)
        same(job, following)
        assert following.counts.whole_blocks == whole + 8


def test_nobody_follows_and_nothing_is_noted(followed):
    job, following = followed
    job.train(range(100))
    feeds = [shard.feed for shard in job.inner.shards.values()]
    assert not any(feed.listening or feed._keys for feed in feeds)
    job.catch_up(following)
    job.train(range(100))
    assert all(feed.listening and feed._keys for feed in feeds)
    job.clock.now += 1000
    job.train(range(100))
    assert not any(feed.listening or feed._keys or feed.nbytes for feed in feeds)
    job.catch_up(following)
    same(job, following)


def test_it_goes_on_when_a_shard_is_silent_and_says_how_old_it_is(followed):
    job, following = followed
    job.train(range(100))
    job.catch_up(following)
    assert following.current.version.run == 1
    assert following.current.version.age() < 2.5
    job.silent.add("shard-1")
    job.train(range(100))
    for _ in range(10):
        job.clock.now += 1.0
        following.poll(following._routes.shards[0])
        with pytest.raises(Unavailable):
            following.poll(following._routes.shards[1])
    assert following.current.version.age() >= 10
    job.silent.clear()
    job.catch_up(following)
    assert following.current.version.age() < 2.5
    same(job, following)


def test_a_new_run_takes_the_place_of_what_it_abandoned_in_one_assignment(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path)
    job.train(range(100))
    job.catch_up(following)
    served = following.current
    old = job.inner
    job.inner = follow_rig.Job().inner
    job.inner.run = job.inner.coordinator.run = 2
    for s, service in job.inner.services.items():
        identity = rig.Identity(job.spec.job_bytes, 2, s, 100 + s)
        job.inner.shards[s] = service.configure(job.spec, identity)
        job.tune(service)
    job.inner.place()
    shard = following._routes.shards[0]
    with pytest.raises(Exception, match="run"):
        following.poll(shard)
    assert following.current is served
    assert following.look()
    # Nothing of the abandoned run is there, though no shard has told anything yet.
    assert following.live.run == 2
    assert following.live.rows == 0
    job.train(range(50, 120))
    job.catch_up(following)
    same(job, following)
    assert following.current.version.run == 2
    assert old is not job.inner


def test_another_job_at_the_address_is_refused(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path)
    following._job = "f" * 32
    with pytest.raises(WrongJob, match="another job"):
        following.look()
