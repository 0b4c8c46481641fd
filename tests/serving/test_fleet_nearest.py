# SPDX-License-Identifier: Apache-2.0
"""Nearest rows of a model in parts: those of the whole model, of one version, whichever parts have swapped already."""

import threading
from dataclasses import replace

import follow_rig
import numpy as np
import pytest
import serving_rig
from fleet_rig import Asked

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.partition import grouped_by_part
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, NotFound, UnknownTable, WrongJob
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.serving_pb2 import ModelVersion, NearestRequest
from oarlock.serving import Client
from oarlock.serving.gather_nearest import best_of_all
from oarlock.serving.nearest_wire import Neighbours
from oarlock.serving.part import ModelPart
from oarlock.serving.recall import Recall, RecallSpec
from oarlock.serving.snapshot import Version
from oarlock.serving.swap import KEEP_SECONDS, Serving

RECALL = [RecallSpec("item", ann=False), RecallSpec("user", "cosine", (1, 3), ann=False)]
SPEC = TableSpec("item", 8, blocks=8)


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A model whose rows are drawn: cut c has rows * c, and from cut 2 on a tenth of them are others."""
    made = serving_rig.Model(tmp_path_factory.mktemp("drawn"), specs=(SPEC,))
    made.keys = np.arange(30_000, dtype=np.uint64)
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, (2, 30_000, 8)).astype(np.float32)
    rows[1, 3_000:] = rows[0, 3_000:]
    images = made.images

    def with_rows(spec, cut):
        return [replace(image, weights=rows[int(cut > 1)][image.keys]) for image in images(spec, cut)]

    made.images, made.rows = with_rows, rows
    made.cut(1)
    made.cut(2)
    return made


def ones(n=16):
    return np.ones((1, n), np.float32)


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_nearest_of_all_parts_are_those_of_the_model(model, servers, kind, parts, frames):
    addresses = [each.address for each in servers.parts(model.store, parts, replicas=2, recall=RECALL)]
    whole = Serving(model.store, recall=RECALL)
    whole.load()
    rng = np.random.default_rng(parts)
    with Asked(kind, addresses, frames=frames) as client:
        for k in (1, 7, 300):
            for filters in (
                {},
                {"exact": True},
                {"among": model.keys[rng.random(len(model.keys)) < 0.2]},
                {"without": np.append(model.keys[:50], np.uint64(1 << 60))},
                {"among": model.keys[:20], "without": model.keys[10:30]},
                {"among": []},
                {"among": [int(model.keys[3])]},
            ):
                vectors = rng.normal(0, 1, (3, 16)).astype(np.float32)
                found = client.nearest("item", vectors, k, **filters)
                given = {
                    name: value if name == "exact" else np.array(value, np.uint64) for name, value in filters.items()
                }
                want, version = whole.recall.nearest("item", vectors, k, **given)
                assert found.keys.tolist() == want.keys.tolist()
                assert found.scores.tolist() == want.scores.tolist()
                assert found.counts.tolist() == want.counts.tolist()
                assert found.version[:2] == (version.run, version.cut) == (0, 1)
        assert client.nearest("user", np.ones(2), 300).counts.tolist() == [200]
        with pytest.raises(UnknownTable, match=r"no table 'film'|of these: item, user"):
            client.nearest("film", ones())
        with pytest.raises(InvalidArgument, match="have 16 values"):
            client.nearest("item", ones(4))
        with pytest.raises(InvalidArgument, match=r"keys of a filter of item|keys of table"):
            client.nearest("item", ones(), among=[-1])
        assert client.counts.asked_again == 0


def test_a_part_is_asked_for_its_own_keys_alone(model, servers):
    first, second = servers.parts(model.store, 2, recall=RECALL)
    spec = model.specs[1]
    grouped = grouped_by_part(model.keys, table_salt("item"), spec.blocks, 2)
    mine, other = grouped.keys[: grouped.starts[1]], grouped.keys[grouped.starts[1] :]
    with Client(first.address) as client:
        assert set(client.nearest("item", ones(), 200).keys[0, : len(mine)].tolist()) == set(mine.tolist())
        assert client.nearest("item", ones(), 3, among=mine[:3]).counts.tolist() == [3]
        with pytest.raises(InvalidArgument, match=f"key {other[0]} of table item is in part 1 of 2") as refused:
            client.nearest("item", ones(), among=[mine[0], other[0]])
        assert refused.value.details["part"] == 1
    assert second.serving.recall.index("item").rows == len(other)


def test_parts_that_swap_at_different_moments_answer_of_one_version(model, servers, kind):
    parts = servers.parts(model.store, 2, recall=RECALL)
    best = 16 * (1000 + int((model.keys % np.uint64(1000)).max()))
    with Asked(kind, [each.address for each in parts]) as client:

        def check(cut):
            for filters in ({}, {"among": model.keys}):
                found = client.nearest("item", ones(), 200, **filters)
                assert found.version[1] == cut
                assert found.scores[0, 0] == best + 16_000 * (cut - 1)
                want = np.sort(16 * serving_rig.value_of(cut, model.keys))[::-1]
                assert found.scores[0].tolist() == want.tolist()

        check(1)
        for cut in range(2, 5):
            model.cut(cut)
            for number, each in enumerate(parts):
                assert each.serving.look()
                check(cut if number == 1 else cut - 1)
        assert client.counts.asked_again == 6
        for each in parts:
            each.serving.roll_back(3)
            check(3)


def test_where_nobody_has_kept_a_version_all_are_asked_again(model, servers, kind):
    first, second = servers.parts(model.store, 2, recall=RECALL)
    model.cut(2)
    model.cut(3)
    first.serving.load(2)
    first.serving.load(3)
    with Asked(kind, [first.address, second.address]) as client:
        with pytest.raises(DeadlineExceeded, match=r"several versions \(run 0 cut 1, run 0 cut 3\)"):
            client.nearest("item", ones(), timeout_seconds=0.3)
        coming = threading.Timer(0.1, second.serving.load)
        coming.start()
        assert client.nearest("item", ones(), 1).version[1] == 3
        coming.join()


def test_a_request_for_another_job_or_version_is_refused(model, servers):
    server = servers.start(model.store, 0, 1, recall=RECALL)
    transport = BlockingTransport()
    asked = {"table": "item", "vectors": pack(ones()), "k": 1}
    try:
        for more, error in (
            ({"job": "f" * 32}, WrongJob),
            ({"version": ModelVersion(run=0, cut=7)}, NotFound),
            ({"version": ModelVersion(run=0, cut=1, live=True)}, NotFound),
        ):
            with pytest.raises(error):
                transport.call(server.address, "Serving.Nearest", NearestRequest(**asked, **more), timeout_seconds=60)
        right = NearestRequest(**asked, job=model.job, version=ModelVersion(run=0, cut=1))
        assert transport.call(server.address, "Serving.Nearest", right, timeout_seconds=60).version.cut == 1
    finally:
        transport.close()


@pytest.mark.parametrize("ann", [False, True], ids=["exact", "index"])
def test_indexes_of_the_cut_before_are_kept_as_they_were(drawn, ann):
    if ann:
        pytest.importorskip("faiss")
    clock = [0.0]
    serving = Serving(drawn.store, part=ModelPart(0, 2), recall=[RecallSpec("item", ann=ann)], clock=lambda: clock[0])
    first = serving.load(1).version
    queries = drawn.rows[0][:50]
    before = serving.recall.nearest("item", queries, 20)[0]
    assert serving.recall.index("item").trained is ann
    second = serving.load(2).version
    now = serving.recall.index("item")
    assert 0 < now.changed < 0.25 * now.rows, "changed in place, in a copy"
    kept = serving.recall_of(first)
    again, version = kept.nearest("item", queries, 20)
    assert version == first
    assert again.keys.tolist() == before.keys.tolist()
    assert again.scores.tolist() == before.scores.tolist()
    found, version = serving.recall_of(second).nearest("item", queries, 20)
    assert version == second
    assert found.keys.tolist() != before.keys.tolist()
    truth = serving.recall.nearest("item", queries, 20, exact=True)[0]
    assert np.mean([len(np.intersect1d(*pair)) / 20 for pair in zip(found.keys, truth.keys, strict=True)]) >= 0.95
    clock[0] = KEEP_SECONDS + 1
    serving._let_go()
    with pytest.raises(NotFound, match="nearest rows of cut 1 of run 0 are not to be had here; of cut 2 of run 0"):
        serving.recall_of(first)
    assert serving.recall_of(second).nearest("item", queries, 20)[0].keys.tolist() == found.keys.tolist()
    serving.close()


def test_parts_of_a_followed_job_answer_of_one_run(servers, tmp_path):
    job = follow_rig.Job()
    spec = RecallSpec("user", ann=False)
    parts = [job.follower(tmp_path, part=ModelPart(number, 2), recall=[spec]) for number in range(2)]
    whole = job.follower(tmp_path, recall=[spec])

    def in_step():
        for each in (*parts, whole):
            job.catch_up(each)
            while each._live_recall.step():
                pass

    job.train(range(150))
    in_step()
    with Client([servers.serve(each).address for each in parts]) as client:
        for raw in (range(0), range(100, 200)):
            if len(raw):
                job.train(raw, 2.0)
                in_step()
            query = np.ones((1, 2), np.float32)
            found, (want, _) = client.nearest("user", query, 300), whole.recall.nearest("user", query, 300)
            assert found.counts.tolist() == want.counts.tolist()
            assert found.scores.tolist() == want.scores.tolist()
            assert set(found.keys[0].tolist()) == set(want.keys[0].tolist())
        # One has begun with a new run: nearest rows of it are not mixed with those of the run before.
        before = parts[0].current
        made = parts[0]._model(before.run + 1, before.layout, before.seed)
        made.complete = True
        parts[0]._exchange(made)
        parts[0]._live_recall.step()
        with pytest.raises(DeadlineExceeded, match="live run 1 cut 0, live run 2 cut 0"):
            client.nearest("user", query, 3, timeout_seconds=0.3)
    for each in (*parts, whole):
        each.close()


def test_who_has_all_of_a_model_keeps_no_second_index(model):
    recall = Recall(RECALL)
    serving = Serving(model.store, recall=RECALL)
    with pytest.raises(NotFound, match="of none"):
        recall.of(Version(0, 1, 0.0))
    first = serving.load().version
    model.cut(2, same=model.store.load_manifest(1))
    serving.look()
    with pytest.raises(NotFound):
        serving.recall_of(first)


def test_the_best_of_parts_are_the_best_of_all():
    rng = np.random.default_rng(3)
    for _ in range(200):
        parts, q, k = rng.integers(1, 5), rng.integers(1, 4), int(rng.integers(1, 9))
        found, everything = [], []
        for part in range(parts):
            count = int(rng.integers(0, k + 1))
            scores = np.full((q, k), -np.inf, np.float32)
            scores[:, :count] = -np.sort(-rng.normal(0, 1, (q, count)).astype(np.float32), axis=1)
            keys = np.zeros((q, k), np.uint64)
            keys[:, :count] = rng.integers(0, 1000, (q, count)) * parts + part
            found.append(Neighbours(keys, scores, np.full(q, count), (1, 7, float(part))))
            everything.append([list(zip(scores[i, :count], keys[i, :count], strict=True)) for i in range(q)])
        best = best_of_all(found, k)
        for i in range(q):
            want = sorted((pair for part in everything for pair in part[i]), key=lambda pair: -pair[0])[:k]
            n = len(want)
            assert best.counts[i] == n
            assert [*zip(best.scores[i, :n], best.keys[i, :n], strict=True)] == want
            assert (best.keys[i, n:] == 0).all()
            assert np.isneginf(best.scores[i, n:]).all()
        assert best.version == (1, 7, float(parts - 1))
