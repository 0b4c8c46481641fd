# SPDX-License-Identifier: Apache-2.0
"""A model in parts with replicas behind one client: whole answers of one version, whoever hangs, dies or swaps when."""

import errno
import os
import threading

import fleet_rig
import follow_rig
import numpy as np
import pytest
import serving_rig
from fleet_rig import Asked, both, check

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.partition import grouped_by_part
from oarlock.export.compress import Method, compress
from oarlock.proto.errors import DeadlineExceeded, InvalidArgument, NotFound, UnknownTable, WrongJob
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.serving_pb2 import LookupRequest, ModelVersion
from oarlock.serving import Client, hedged_async, tender
from oarlock.serving.part import ModelPart, read_part

KINDS = ["blocking", "asyncio"]


def keys_of_parts(model, parts, table="user"):
    """Return a key of each part."""
    spec = next(spec for spec in model.specs if spec.name == table)
    grouped = grouped_by_part(model.keys, table_salt(table), spec.blocks, parts)
    return [int(grouped.keys[grouped.starts[part]]) for part in range(parts)]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "grpc"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_of_all_parts_come_in_the_order_of_the_keys(model, servers, kind, parts, frames):
    all_of_them = servers.parts(model.store, parts, replicas=2)
    rows = sum(each.serving.current.rows for each in all_of_them)
    assert rows == 2 * 400, "nothing twice, nothing left out"
    keys = np.random.default_rng(0).choice(np.append(model.keys, np.uint64(1 << 60)), 500)
    addresses = [each.address for each in all_of_them]
    with Asked(kind, np.random.default_rng(1).permutation(addresses).tolist(), frames=frames) as client:
        for given in (keys, keys[:1], keys[:0]):
            check(client.lookup(both(given)), model, given, 1)
        assert client.lookup({}).version.cut == 1
        for key in model.keys[:20]:
            check(client.lookup(both(np.array([key]))), model, np.array([key]), 1)
        assert client.lookup({"user": [7, 8]})["user"][:, 0].tolist() == [1007.0, 1008.0]
        found = client.describe()
        assert (sum(table.rows for table in found.tables), list(found.cuts), found.parts) == (400, [1], parts)
        with pytest.raises(UnknownTable, match="its tables are: user, item"):
            client.lookup({"shop": [1]})
        with pytest.raises(UnknownTable, match="--recall TABLE"):
            client.nearest("user", [[0.0] * 4])


def test_a_part_has_its_keys_and_says_who_has_others(model, servers):
    first, second = servers.parts(model.store, 2)
    mine, other = keys_of_parts(model, 2)
    with Client(first.address) as client:
        assert client.lookup({"user": [mine]})["user"][0, 0] == 1000 + mine % 1000
        with pytest.raises(
            InvalidArgument, match=f"key {other} of table user is in part 1 of 2, and .* part 0 of 2"
        ) as refused:
            client.lookup({"user": [mine, other]})
        assert refused.value.details["part"] == 1
        told = client.describe()
        assert (told.part, told.parts) == (0, 2)
        assert [(table.blocks, table.salt) for table in told.tables] == [
            (spec.blocks, int(table_salt(spec.name))) for spec in model.specs
        ]
        assert first.serving.current.dense.size == 0
    assert second.serving.current.nbytes < 0.8 * sum(s.serving.current.nbytes for s in (first, second))


def test_parts_are_read_and_refused():
    assert read_part("1/2") == ModelPart(1, 2)
    for wrong in ("", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3", "0/1025", "٣/4", "1" * 50 + "/2"):
        with pytest.raises(InvalidArgument):
            read_part(wrong)


def test_sets_that_are_not_whole_or_do_not_fit_are_refused(model, servers, kind, tmp_path):
    first, second, third = (servers.start(model.store, part, 3) for part in range(3))
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(1)
    stranger, whole = servers.start(other.store, 1, 3), servers.start(model.store)
    for addresses, words in (
        ([first, third], "none of 2 servers has part 1 of 3: give the addresses of all parts"),
        ([first, stranger, third], "do not go together: .* serves job f"),
        ([first, second, third, whole], "do not go together: .* serves one of 1 parts, not of 3"),
    ):
        with Asked(kind, [each.address for each in addresses]) as client:
            for _ in range(2):
                with pytest.raises(InvalidArgument, match=words):
                    client.lookup({"user": [7]})
    second.stop()
    with Asked(kind, [first.address, second.address, third.address], timeout_seconds=0.5) as client:
        with pytest.raises(DeadlineExceeded, match=f"nobody who answers has part 1 of 3: {second.address}"):
            client.lookup({"user": [7]})
        again = servers.start(model.store, 1, 3, listen=second.address)
        check(client.lookup(both(model.keys), timeout_seconds=60.0), model, model.keys, 1)
        assert again.service.lookups


def test_servers_that_did_not_fit_are_asked_again_once_somebody_put_it_right(model, servers, kind, tmp_path):
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(1)
    first, stranger = servers.start(model.store, 0, 2), servers.start(other.store, 1, 2)
    with Asked(kind, [first.address, stranger.address]) as client:
        with pytest.raises(InvalidArgument, match="do not go together"):
            client.lookup({"user": [7]})
        stranger.stop()
        servers.start(model.store, 1, 2, listen=stranger.address)
        for _ in range(3000):
            try:
                found = client.lookup(both(model.keys))
            except InvalidArgument:
                client.go_on()
            else:
                break
        check(found, model, model.keys, 1)


def test_addresses_that_are_none_are_refused():
    for wrong in (
        [],
        ["nowhere"],
        ["a:b"],
        ["a:70000"],
        ["a:0"],
        [":1"],
        [7],
        ["h:1\n"],
        ["unix:"],
        {"a:1": 2},
        ["a:1"] * 5000,
    ):
        with pytest.raises(InvalidArgument, match="address"):
            Client(wrong)
    with pytest.raises(InvalidArgument, match="hedge_share"):
        Client(["a:1"], hedge_share=1.5)


def warm(client, model):
    for _ in range(40):
        client.lookup({"user": model.keys[:5]})


def test_a_replica_that_hangs_is_passed_by(model, servers, kind):
    two = servers.parts(model.store, 1, replicas=2)
    with Asked(kind, [each.address for each in two]) as client:
        warm(client, model)
        favourite = max(two, key=lambda each: each.service.lookups)
        favourite.service.go.clear()
        for _ in range(50):
            check(client.lookup(both(model.keys)), model, model.keys, 1)
        assert 1 <= client.counts.hedges_won <= client.counts.hedges <= 20
        assert client.counts.failovers == 0


def test_without_a_budget_half_of_the_time_is_waited_and_the_answer_still_comes(model, servers, kind):
    two = servers.parts(model.store, 1, replicas=2)
    with Asked(kind, [each.address for each in two], hedge_share=0.0) as client:
        warm(client, model)
        max(two, key=lambda each: each.service.lookups).service.go.clear()
        check(client.lookup(both(model.keys), timeout_seconds=2.0), model, model.keys, 1)
        assert (client.counts.hedges, client.counts.failovers) == (0, 1)


def test_hedges_have_a_budget(model, servers, kind):
    """All hang for a while: one request in ten is asked twice, and some to begin with."""
    two = servers.parts(model.store, 1, replicas=2)
    with Asked(kind, [each.address for each in two], hedge_share=0.1, timeout_seconds=0.3) as client:
        client.lookup({"user": [7]}, timeout_seconds=60.0)
        hedging = client.client._fleet._hedging
        for _ in range(200):
            hedging.began()
        spent = sum(hedging.spend() for _ in range(1000))
        assert spent == 10
        for _ in range(55):
            hedging.began()
        assert sum(hedging.spend() for _ in range(1000)) == 5


def test_a_replica_that_dies_is_done_without_and_comes_back(model, servers, kind):
    four = servers.parts(model.store, 2, replicas=2)
    with Asked(kind, [each.address for each in four]) as client:
        warm(client, model)
        favourites = [max(pair, key=lambda each: each.service.lookups) for pair in (four[:2], four[2:])]
        for dead in favourites:
            dead.stop()
            for _ in range(20):
                check(client.lookup(both(model.keys)), model, model.keys, 1)
        assert client.counts.failovers >= 1
        back = servers.start(model.store, 0, 2, listen=favourites[0].address)
        next(each for each in four[:2] if each is not favourites[0]).stop()
        for _ in range(20):
            check(client.lookup(both(model.keys)), model, model.keys, 1)
        assert back.service.lookups > 0


def test_one_that_does_not_say_what_it_has_keeps_nobody_from_asking_another(model, servers, kind, monkeypatch):
    for module in (tender, hedged_async):
        monkeypatch.setattr(module, "DESCRIBE_SECONDS", fleet_rig.SECONDS)
    two = servers.parts(model.store, 1, replicas=2)
    with Asked(kind, [each.address for each in two]) as client:
        warm(client, model)
        for each in two:
            each.stop()
        with pytest.raises(DeadlineExceeded):
            client.lookup({"user": [7]}, timeout_seconds=0.5)
        silent = servers.start(model.store, listen=two[0].address, tells=False)
        while not silent.service.waiting.is_set():
            with pytest.raises(DeadlineExceeded):
                client.lookup({"user": [7]}, timeout_seconds=0.5)
        servers.start(model.store, listen=two[1].address)
        check(client.lookup(both(model.keys), timeout_seconds=fleet_rig.SECONDS / 2), model, model.keys, 1)


@pytest.mark.parametrize("many", [False, True])
def test_a_client_that_is_closed_says_so(model, servers, kind, many):
    two = servers.parts(model.store, 1, replicas=2)
    with Asked(kind, [each.address for each in two] if many else two[0].address) as client:
        client.lookup({"user": [7]})
        client.close()
        with pytest.raises(InvalidArgument, match="this client is closed"):
            client.lookup({"user": [7]})
        client.close()


def test_a_process_that_had_no_file_left_for_a_moment_goes_on(model, servers, monkeypatch):
    two = servers.parts(model.store, 2)
    make, refused = os.eventfd, []

    def eventfd(*given):
        if len(refused) < 3:
            refused.append(given)
            raise OSError(errno.EMFILE, "Too many open files")
        return make(*given)

    monkeypatch.setattr(os, "eventfd", eventfd)
    with Client([each.address for each in two], timeout_seconds=5.0, frames=False) as client:
        check(client.lookup(both(model.keys)), model, model.keys, 1)
    assert len(refused) == 3


def test_who_comes_back_as_another_is_left_out(model, servers, kind, tmp_path):
    two = servers.parts(model.store, 1, replicas=2)
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(9)
    with Asked(kind, [each.address for each in two]) as client:
        warm(client, model)
        two[0].stop()
        stranger = servers.start(other.store, listen=two[0].address)
        for _ in range(50):
            check(client.lookup(both(model.keys)), model, model.keys, 1)
        two[1].stop()
        with pytest.raises(DeadlineExceeded):
            client.lookup({"user": [7]}, timeout_seconds=1.5)
        # Whoever asked it was told so.
        assert stranger.service.asked == {}


def test_parts_that_swap_at_different_moments_answer_of_one_version(model, servers, kind):
    parts = servers.parts(model.store, 3)
    with Asked(kind, [each.address for each in parts]) as client:
        check(client.lookup(both(model.keys)), model, model.keys, 1)
        for cut in range(2, 5):
            model.cut(cut)
            for number, each in enumerate(parts):
                assert each.serving.look()
                check(client.lookup(both(model.keys)), model, model.keys, cut if number == 2 else cut - 1)
        assert client.counts.asked_again == 6
        # Back again, one after the other: those that are still at 4 have kept 3.
        for number, each in enumerate(parts):
            each.serving.roll_back(3)
            check(client.lookup(both(model.keys)), model, model.keys, 3)
            assert number < 2 or each.serving.current.version.cut == 3


def test_where_nobody_has_kept_a_version_all_are_asked_again(model, servers, kind):
    first, second = servers.parts(model.store, 2)
    model.cut(2)
    model.cut(3)
    first.serving.load(2)
    first.serving.load(3)
    with Asked(kind, [first.address, second.address]) as client:
        with pytest.raises(DeadlineExceeded, match=r"several versions \(run 0 cut 1, run 0 cut 3\)"):
            client.lookup(both(model.keys), timeout_seconds=0.3)
        coming = threading.Timer(0.1, second.serving.load)
        coming.start()
        check(client.lookup(both(model.keys)), model, model.keys, 3)
        coming.join()


def test_what_is_kept_of_an_older_cut_goes_in_time(model):
    clock = [0.0]
    serving = fleet_rig.Serving(model.store, part=ModelPart(0, 2), clock=lambda: clock[0])
    old = serving.load()
    model.cut(2)
    serving.look()
    assert serving.version(old.version) is old
    clock[0] = 301.0
    with pytest.raises(NotFound, match=r"cut 1 of run 0 is not served here; cut 2 of run 0 is"):
        serving.version(old.version)
    serving._let_go()
    assert serving._before is None
    whole = fleet_rig.Serving(model.store)
    whole.load(1)
    whole.load(2)
    assert whole._before is None, "who has all of it needs no older cut"


def test_a_request_for_another_job_or_version_is_refused(model, servers):
    server = servers.start(model.store)
    transport = BlockingTransport()
    try:
        for request, error in (
            (LookupRequest(job="f" * 32), WrongJob),
            (LookupRequest(version=ModelVersion(run=0, cut=7)), NotFound),
            (LookupRequest(version=ModelVersion(run=0, cut=1, live=True)), NotFound),
        ):
            with pytest.raises(error):
                transport.call(server.address, "Serving.Lookup", request, timeout_seconds=60)
        right = LookupRequest(job=model.job, version=ModelVersion(run=0, cut=1))
        assert transport.call(server.address, "Serving.Lookup", right, timeout_seconds=60).version.cut == 1
    finally:
        transport.close()


def test_threads_share_a_client_of_many(model, servers):
    four = servers.parts(model.store, 2, replicas=2)
    wrong = []
    with Client([each.address for each in four], timeout_seconds=60) as client:

        def ask(seed):
            keys = np.random.default_rng(seed).choice(model.keys, 300)
            try:
                for _ in range(30):
                    check(client.lookup(both(keys)), model, keys, 1)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        four[0].stop()
        four[3].stop()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_compressed_checkpoint_is_served_in_parts(model, servers, tmp_path):
    store = compress(model.store, model.store.load_manifest(None), {"item": Method("int8")}, tmp_path / "small")
    two = servers.parts(store, 2)
    keys = np.append(model.keys, np.uint64(1 << 60))
    whole = servers.start(store)
    assert sum(each.serving.current.rows for each in two) == whole.serving.current.rows == 400
    with Client([each.address for each in two]) as client, Client(whole.address) as other:
        found, same = client.lookup(both(keys)), other.lookup(both(keys))
    assert all((found[table] == same[table]).all() for table in ("user", "item"))
    assert found.missing == same.missing == {"user": 1, "item": 1}


def test_a_job_is_followed_in_parts(servers, tmp_path):
    job = follow_rig.Job()
    keys = np.arange(200)
    job.train(keys)
    two = [job.follower(tmp_path, part=ModelPart(number, 2)) for number in range(2)]
    whole = job.follower(tmp_path)
    for following in (*two, whole):
        job.catch_up(following)
    assert sum(each.live.rows for each in two) == whole.live.rows == 200
    assert all(each.ready and each.live.complete for each in two)
    started = [servers.serve(each) for each in two]
    with Client([each.address for each in started]) as client:
        found = client.lookup({"user": keys})
        assert (found["user"] == follow_rig.served(whole, "user", keys)[0]).all()
        assert found.version.live
        # One has begun with a new run, the other has not: what is kept of the one before is what is served.
        before = two[0].current
        made = two[0]._model(before.run + 1, before.layout, before.seed)
        made.complete = True
        two[0]._keep(before)
        two[0]._live = made
        again = client.lookup({"user": keys})
        assert (again["user"] == found["user"]).all()
        assert (again.version.run, client.counts.asked_again) == (before.run, 1)
