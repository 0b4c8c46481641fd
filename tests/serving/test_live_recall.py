# SPDX-License-Identifier: Apache-2.0
"""Nearest rows of a job that trains: of rows that there are, with the scores that they have, and all of them a moment later."""

import follow_rig
import numpy as np
import pytest
import rig
import serving_rig

from oarlock.proto.errors import InvalidArgument, Unavailable, UnknownTable
from oarlock.serving import live_index
from oarlock.serving.live_recall import Ended
from oarlock.serving.nearest import NearestIndex
from oarlock.serving.recall import RecallSpec

KEYS = np.arange(200, dtype=np.uint64)
USER = RecallSpec("user", ann=False)


def keep(following):
    """Have the indexes in step."""
    recall = following._live_recall
    while recall.step():
        pass
    while (due := recall.due()) is not None:
        due.rebuild()


@pytest.fixture
def followed(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path, recall=[USER])
    job.train(range(100))
    job.catch_up(following)
    keep(following)
    yield job, following
    following.close()


def present(job, name="user", keys=KEYS):
    """Return the keys that have rows in the job's shards, and these."""
    number = job.inner.layout.table_index[name]
    held = set()
    for shard in job.inner.shards.values():
        table = shard.tables[number]
        for block in table.owned.tolist():
            held |= set(table.export_block(block).keys.tolist())
    there = np.array([key for key in keys.tolist() if key in held], np.uint64)
    return there, job.inner.rows(name, there)


def score(rows, query, metric="inner"):
    rows, query = rows.astype(np.float64), query.astype(np.float64)
    found = rows @ query
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
        found = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
    return found


def check(job, following, rng, spec=USER, **filters):
    """Compare with the rows of the shards."""
    keys, rows = present(job, spec.table)
    first, end = spec.columns or (0, rows.shape[1])
    for name, chosen in filters.items():
        mine = np.isin(keys, chosen) == (name == "among")
        keys, rows = keys[mine], rows[mine]
    for k in (1, 10, 300):
        query = rng.normal(0, 1, end - first).astype(np.float32)
        found, _ = following.recall.nearest(spec.table, query[None], k, **filters)
        want = np.sort(score(rows[:, first:end], query, spec.metric))[::-1][:k]
        assert found.counts[0] == len(want)
        assert np.allclose(found.scores[0, : len(want)], want, atol=1e-6)
        of = dict(zip(keys.tolist(), score(rows[:, first:end], query, spec.metric), strict=True))
        mine = [of[key] for key in found.keys[0, : len(want)].tolist()]
        assert np.allclose(mine, want, atol=1e-6)
        assert len(set(found.keys[0, : len(want)].tolist())) == len(want)


@pytest.mark.parametrize("spec", follow_rig.SPECS)
@pytest.mark.parametrize("metric", ["inner", "cosine"])
def test_it_is_in_step_with_any_history(tmp_path, spec, metric):
    job = follow_rig.Job(spec)
    asked = RecallSpec("user", metric, (1, job.spec.tables[0].dim), ann=False)
    following = job.follower(tmp_path, recall=[asked])
    rng = np.random.default_rng(len(spec))
    job.catch_up(following)
    for turn in range(80):
        deed = rng.integers(0, 8)
        if deed < 3:
            job.train(np.unique(rng.integers(0, 60, 20)), float(rng.normal()))
        elif deed == 3:
            job.sweep()
        elif deed == 4:
            block = int(rng.integers(0, job.inner.layout.dense_base))
            job.inner.move(block, int(rng.integers(0, 2)))
        elif deed == 5:
            following._live_recall.step()
        else:
            job.clock.now += 1
            for shard in following._routes.shards.values():
                following.poll(shard)
        if following.indexes["user"].ready:
            # Whatever is told has a row, and that score by it.
            query = rng.normal(0, 1, job.spec.tables[0].dim - 1).astype(np.float32)
            found, _ = following.recall.nearest("user", query[None], 5)
            keys = found.keys[0, : found.counts[0]]
            rows, missing = follow_rig.served(following, "user", keys)
            assert missing == 0
            assert np.allclose(score(rows[:, 1:], query, metric), found.scores[0, : len(keys)], atol=1e-6)
        if turn % 20 == 19:
            following.look()
            job.catch_up(following)
            keep(following)
            check(job, following, rng, asked)
            check(job, following, rng, asked, among=KEYS[10:50])
            check(job, following, rng, asked, without=KEYS[:30])
    following.close()


def test_a_key_that_left_is_gone_as_soon_as_look_ups_lack_it(followed):
    job, following = followed
    best, _ = following.recall.nearest("user", np.ones((1, 2), np.float32), 100)
    assert best.counts.tolist() == [100]
    kept = sorted(best.keys[0].tolist())[50:]
    for _ in range(40):
        job.train(kept)
        job.sweep()
    job.catch_up(following)
    # Nothing was put into the index, whose rows are 100 still; of those most are none any more.
    assert following.indexes["user"].rows == 100
    found, _ = following.recall.nearest("user", np.ones((1, 2), np.float32), 5)
    assert found.counts.tolist() == [5]
    assert set(found.keys[0].tolist()) <= set(kept)
    rows, _ = follow_rig.served(following, "user", found.keys[0])
    assert np.allclose(found.scores[0], rows.sum(axis=1), atol=1e-6)
    assert following.recall.nearest("user", np.ones((3, 2), np.float32), 90)[0].counts.tolist() == [50] * 3
    keep(following)
    assert following.indexes["user"].rows == 50
    assert following.indexes["user"].waiting == 0


def test_an_answer_says_how_old_it_may_be(followed):
    job, following = followed
    job.train(range(50, 150))
    job.catch_up(following)
    job.clock.now += 100
    for shard in following._routes.shards.values():
        following.poll(shard)
    query = np.ones((1, 2), np.float32)
    assert following.recall.nearest("user", query, 5)[1].age() >= 100
    assert following.recall.nearest("user", query, 5, among=KEYS)[1].age() < 10
    keep(following)
    found, version = following.recall.nearest("user", query, 200)
    assert version.age() < 10
    assert found.counts.tolist() == [150]
    assert sum(following.recall_lags.counts[-3:]) > 0


def test_what_is_kept_of_changes_is_bounded(followed, monkeypatch):
    job, following = followed
    monkeypatch.setattr("oarlock.serving.backlog.LEAST_NOTED", 50)
    kept = following.indexes["user"]._answers
    kept.backlog._most = 50
    rng = np.random.default_rng(0)
    for _ in range(60):
        job.train(np.unique(rng.integers(0, 200, 40)))
        job.sweep()
        job.catch_up(following)
        # Each of 200 keys once, and as many until they are sorted out.
        assert following.indexes["user"].waiting <= 400
    keep(following)
    check(job, following, rng)


def test_a_new_run_has_an_index_of_its_own(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path, recall=[USER])
    job.train(range(100))
    job.catch_up(following)
    keep(following)
    old = following._live_recall
    query = np.ones((1, 2), np.float32)
    assert following.recall.nearest("user", query, 200)[1].run == 1
    job.inner = follow_rig.Job().inner
    job.inner.run = job.inner.coordinator.run = 2
    for s, service in job.inner.services.items():
        job.inner.shards[s] = service.configure(job.spec, rig.Identity(job.spec.job_bytes, 2, s, 100 + s))
        job.tune(service)
    job.inner.place()
    assert following.look()
    with pytest.raises(Unavailable, match="still being built"):
        following.recall.nearest("user", query, 200)
    assert following._live_recall is not old
    job.train(range(150, 160))
    following._live_recall.step()
    with pytest.raises(Unavailable, match="still being built"):
        following.recall.nearest("user", query, 200)
    job.catch_up(following)
    keep(following)
    found, version = following.recall.nearest("user", query, 200)
    assert version.run == 2
    assert sorted(found.keys[0, : found.counts[0]].tolist()) == list(range(150, 160))
    following.close()


def test_what_goes_wrong_with_an_index_makes_it_anew(followed, monkeypatch):
    job, following = followed
    query = np.ones((1, 2), np.float32)
    job.train(range(150))
    job.catch_up(following)
    with monkeypatch.context() as patch:
        patch.setattr(NearestIndex, "apply", lambda *given, **more: (_ for _ in ()).throw(RuntimeError("it broke")))
        assert not following._keeper.keep(following._live_recall)
    assert "the index: it broke" in following.problem
    with pytest.raises(Unavailable, match="still being built"):
        following.recall.nearest("user", query, 200)
    following._keeper.keep(following._live_recall)
    assert not following.indexes["user"].ready
    job.clock.now += live_index.FAILED_SECONDS
    following._keeper.keep(following._live_recall)
    assert following.problem == ""
    check(job, following, np.random.default_rng(0))


def test_an_index_that_was_not_told_of_all_changes_never_answers(followed, monkeypatch):
    """Something went wrong with the one that answers while another one was made, so all are given up."""
    job, following = followed
    index = following.indexes["user"]
    build = NearestIndex.build

    def slowly(made, *given, **more):
        build(made, *given, **more)
        index.stop()
        job.train(range(100, 200))
        job.catch_up(following)

    with monkeypatch.context() as patch:
        patch.setattr(NearestIndex, "build", slowly)
        patch.setattr(live_index, "NearestIndex", lambda dim, metric, ann: NearestIndex(dim, metric, ann=False))
        index.rebuild()
    job.clock.now += live_index.FAILED_SECONDS
    keep(following)
    check(job, following, np.random.default_rng(0))


def test_an_index_is_made_beside_the_one_that_answers(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("oarlock.serving.live_index.LEAST_ROWS", 50)
    monkeypatch.setattr("oarlock.serving.nearest.LEAST_ROWS", 50)
    job = follow_rig.Job("bfloat16")
    spec = RecallSpec("user")
    following = job.follower(tmp_path, recall=[spec])
    rng = np.random.default_rng(1)
    job.train(range(40))
    job.catch_up(following)
    keep(following)
    index = following.indexes["user"]
    assert not index._answers.index.trained
    job.train(range(40, 200))
    job.catch_up(following)
    while following._live_recall.step():
        pass
    assert index.due
    # What changes while it is made is there when it answers.
    train = NearestIndex._train

    def slowly(made, going_on):
        train(made, going_on)
        job.train(range(100, 200), 3.0)
        for _ in range(30):
            job.train(range(100, 200), 1.0)
            job.sweep()
        job.catch_up(following)
        assert following.recall.nearest("user", np.ones((1, 5), np.float32), 7)[0].counts.tolist() == [7]

    with monkeypatch.context() as patch:
        patch.setattr(NearestIndex, "_train", slowly)
        index.rebuild()
    assert index._answers.index.trained
    assert (index.rebuilds, index.waiting, index.rows) == (1, 0, 100)
    index._answers.index.probes = 1000
    check(job, following, rng, spec)
    assert not index.due
    # So much of all time, and no more, goes into this.
    job.train(range(100, 200), 5.0)
    job.catch_up(following)
    while following._live_recall.step():
        pass
    assert index._answers.index.changed > 0.25 * index.rows
    job.clock.now += 100
    assert index.due
    following._live_recall.close()
    with pytest.raises(Ended):
        index.rebuild()
    assert len(index._told) == 1
    following.close()


def test_a_cut_that_was_gone_back_to_has_an_index_of_its_own(tmp_path):
    job = follow_rig.Job()
    cuts = serving_rig.Model(tmp_path, specs=job.spec.tables, job=job.spec.job)
    cuts.cut(1)
    following = job.follower(tmp_path, recall=[USER])
    job.train(range(100))
    job.catch_up(following)
    keep(following)
    query = np.ones((1, 2), np.float32)
    assert set(following.recall.nearest("user", query, 200)[0].keys[0, :100].tolist()) == set(range(100))
    assert following.roll_back(1).version.cut == 1
    found, version = following.recall.nearest("user", query, 300)
    assert sorted(found.keys[0, :200].tolist()) == cuts.keys.tolist()
    assert (version.cut, version.run) == (1, 0)
    assert found.scores[0, 0] == 2 * 1206
    # The live one is in step behind it.
    job.train(range(150))
    job.catch_up(following)
    keep(following)
    assert following.recall.nearest("user", query, 300)[1].cut == 1
    assert following.release().version.run == 1
    assert following.recall.nearest("user", query, 300)[0].counts.tolist() == [150]
    assert following._recall.indexes == {}
    following.close()


def test_what_cannot_be_indexed_is_refused(tmp_path):
    job = follow_rig.Job()
    with pytest.raises(UnknownTable, match="no table 'film'"):
        job.follower(tmp_path, recall=[RecallSpec("film", ann=False)])
    with pytest.raises(InvalidArgument, match="it has 2"):
        job.follower(tmp_path, recall=[RecallSpec("user", "inner", (0, 3), ann=False)])
    with pytest.raises(InvalidArgument, match="twice"):
        job.follower(tmp_path, recall=[USER, USER])
    bare = job.follower(tmp_path)
    with pytest.raises(UnknownTable, match="--recall TABLE"):
        bare.recall.nearest("user", np.ones((1, 2), np.float32), 1)
