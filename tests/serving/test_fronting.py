# SPDX-License-Identifier: Apache-2.0
"""A process without rows asks the servers of a model's parts: the same answers, of the cut that they serve, and of no other."""

import contextlib
import random
import threading

import fleet_rig
import numpy as np
import pytest
import serving_rig

from oarlock.proto.errors import InvalidArgument, Unavailable, WrongJob
from oarlock.proto.rpc import GrpcServer
from oarlock.serving import Client
from oarlock.serving.client import lookup_request
from oarlock.serving.fronting import Fronting
from oarlock.serving.models import Models
from oarlock.serving.remote import RowServers
from oarlock.serving.service import ServingService
from oarlock.serving.tensors import Tensor

KEYS = np.array([7, 900_001, 206, 8, 7, 900_002], np.uint64)


@pytest.fixture
def front(model, servers):
    """Return a function that makes a Fronting of servers at addresses."""
    made = []

    def make(addresses, store=None, **options):
        made.append(Fronting(store or model.store, RowServers(addresses, rows_seconds=1.0), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.dispose()


def addresses(parts):
    return [each.address for each in parts]


def looked_up(model, keys):
    """Return rows and missing of both tables, as a process of its own has them."""
    found = {}
    for name, dim in (("user", 4), ("item", 16)):
        out = np.full((len(keys), dim), np.nan, np.float32)
        found[name] = out, model.lookup(name, keys, out)
    return found


def same(mine, others):
    return all(mine[n][1] == others[n][1] and mine[n][0].tobytes() == others[n][0].tobytes() for n in others)


def test_rows_are_those_of_a_process_that_has_them(model, servers, front):
    fronting = front(addresses(servers.parts(model.store, 3)))
    current = fronting.load()
    whole = serving_rig.loaded(model.store).current
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 100, 5000):
        keys = rng.integers(0, 400, size).astype(np.uint64)
        assert same(looked_up(current, keys), looked_up(whole, keys))
    assert current.version == whole.version
    assert current.dense.tobytes() == whole.dense.tobytes()
    assert {n: (t.rows, t.form) for n, t in current.tables.items()} == {
        n: (t.rows, t.form) for n, t in whole.tables.items()
    }
    # Nothing of them is here.
    assert (current.base.rows, current.part.whole) == (0, True)
    assert current is fronting.current, "callers of one cut are joined in one batch"


def test_all_tables_are_asked_for_in_one_request(model, servers, front):
    parts = servers.parts(model.store, 2)
    current = front(addresses(parts)).load()
    looked_up(current, model.keys)
    before = [each.service.lookups for each in parts]
    wanted = [
        (name, model.keys, np.empty((len(model.keys), dim), np.float32)) for name, dim in (("user", 4), ("item", 16))
    ]
    current.lookup_many(wanted)
    assert [each.service.lookups for each in parts] == [n + 1 for n in before]


def test_a_table_that_is_wanted_several_times_is_asked_for_once(model, servers, front):
    current = front(addresses(servers.parts(model.store, 2))).load()
    whole = serving_rig.loaded(model.store).current
    there, some = model.keys[:5], KEYS

    def wanted(*keys):
        return [("user", each, np.full((len(each), 4), np.nan, np.float32)) for each in keys]

    mine, others = wanted(there, some, there[:0]), wanted(there, some, there[:0])
    assert current.lookup_many(mine) == [None, None, None], "how many of which have no row is not told"
    assert whole.lookup_many(others) == [0, 2, 0]
    assert [out.tobytes() for _, _, out in mine] == [out.tobytes() for _, _, out in others]
    assert current.lookup_many(wanted(there, there)) == [0, 0], "all have one"


def test_a_request_that_names_a_table_twice_is_refused_before_anybody_is_asked(model, servers, front):
    parts = servers.parts(model.store, 2)
    fronting = front(addresses(parts))
    fronting.load()
    before = [each.service.lookups for each in parts]
    request = lookup_request({"user": KEYS, "item": KEYS}).message
    request.tables.append(request.tables[0])
    with pytest.raises(InvalidArgument, match="a table is named twice"):
        ServingService(fronting).lookup(request)
    assert [each.service.lookups for each in parts] == before


def test_clients_ask_it_like_any_server(model, servers, front):
    fronting = front(addresses(servers.parts(model.store, 2)))
    fronting.load()
    server = GrpcServer(ServingService(fronting), "Serving", listen="127.0.0.1:0", serving=lambda: fronting.ready)
    address = server.start()
    try:
        with Client([address, servers.start(model.store).address]) as client:
            for _ in range(20):
                fleet_rig.check(client.lookup(fleet_rig.both(model.keys)), model, model.keys, 1)
            told = client.describe()
            assert (told.version.cut, [t.rows for t in told.tables]) == (1, [200, 200])
        with Client(address) as client:
            with pytest.raises(InvalidArgument, match="serves the cut that its servers of rows do"):
                client.rollback()
            with pytest.raises(InvalidArgument, match="serves the cut that its servers of rows do"):
                client.rollback(newest=True)
    finally:
        server.stop()


def test_rows_by_the_open_inference_protocol(model, servers, front):
    fronting = front(addresses(servers.parts(model.store, 2)))
    fronting.load()
    models = Models(ServingService(fronting))
    models.begin(None)
    assert models.names() == ["user", "item"]
    answer = models.infer("user", "0.1", [Tensor("keys", "UINT64", (len(KEYS),), KEYS)], [])
    assert (
        answer.outputs[0].values.tobytes()
        == looked_up(serving_rig.loaded(model.store).current, KEYS)["user"][0].tobytes()
    )
    assert answer.parameters["missing"] == 2


def test_it_serves_the_cut_that_its_servers_serve(model, servers, front):
    parts = servers.parts(model.store, 3)
    fronting = front(addresses(parts))
    model.cut(2)
    assert fronting.load().version.cut == 1, "the newest is not what they serve"
    for number, each in enumerate(parts):
        assert each.serving.look()
        assert fronting.look() == (number == 2)
        # Those that are at 2 have kept 1.
        found = looked_up(fronting.current, model.keys)["user"][0]
        cut = fronting.current.version.cut
        assert cut == (2 if number == 2 else 1)
        assert (found == serving_rig.value_of(cut, model.keys)[:, None]).all()
    for number, each in enumerate(parts):
        each.serving.roll_back(1)
        assert fronting.look() == (number == 2)
        assert (looked_up(fronting.current, model.keys)["user"][0][:, 0] % 1000 == model.keys % 1000).all()
    assert fronting.current.version.cut == 1
    assert (fronting.swaps, fronting.problem) == (2, "")


def test_who_asks_while_cuts_change_has_rows_and_dense_parameters_of_one(tmp_path, servers, front):
    model = serving_rig.Model(
        tmp_path / "dense", dense=(serving_rig.DenseSpec("bias", (8,), serving_rig.OptimizerSpec("sgd")),)
    )
    model.cut(1)
    parts = servers.parts(model.store, 2, 2)
    fronting = front(addresses(parts), store=model.store)
    fronting.load()
    over, seen, wrong = threading.Event(), set(), []

    def ask(seed):
        rng = np.random.default_rng(seed)
        while not over.is_set():
            state = fronting.current
            keys = rng.choice(model.keys, 50)
            out = np.empty((50, 4), np.float32)
            try:
                state.lookup_many([("user", keys, out)])
            except Exception as error:
                wrong.append(error)
                continue
            cut = int(state.dense[0])
            seen.add(cut)
            if state.version.cut != cut or not (out == serving_rig.value_of(cut, keys)[:, None]).all():
                wrong.append((state.version, cut, out))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for each in threads:
        each.start()
    rng = random.Random(5)
    try:
        for cut in range(2, 12):
            model.cut(cut)
            for each in rng.sample(parts, len(parts)):
                each.serving.look()
                fronting.look()
            while cut not in seen and not wrong:
                threads[0].join(0.001)
    finally:
        over.set()
        for each in threads:
            each.join()
    assert not wrong, wrong[:3]
    assert seen == set(range(1, 12))


def test_a_server_that_dies_is_done_without(model, servers, front):
    parts = servers.parts(model.store, 2, 2)
    fronting = front(addresses(parts))
    fronting.load()
    looked_up(fronting.current, model.keys)
    # Of each part the one that was asked.
    used = [each for each in parts if each.service.lookups]
    assert sorted(each.serving.part.number for each in used) == [0, 1]
    for each in used:
        each.stop()
    for _ in range(20):
        assert same(looked_up(fronting.current, KEYS), looked_up(serving_rig.loaded(model.store).current, KEYS))
    model.cut(2)
    for each in parts:
        each.serving.look()
    assert fronting.look()
    assert fronting.servers.counts.failovers > 0


def test_servers_that_go_on_apart_are_a_problem_after_a_while(model, servers, front):
    first, second = servers.parts(model.store, 2)
    fronting = front([first.address, second.address])
    fronting.load()
    clock = [0.0]
    fronting._clock = lambda: clock[0]
    model.cut(2)
    first.serving.look()
    for clock[0], problem in ((0.0, False), (29.0, False), (31.0, True)):
        assert not fronting.look()
        assert ("their servers have cut 1 of run 0, cut 2 of run 0" in fronting.problem) == problem
    second.serving.look()
    assert fronting.look()
    assert fronting.problem == ""
    # The time begins anew.
    model.cut(3)
    first.serving.look()
    clock[0] = 100.0
    fronting.look()
    assert fronting.problem == ""


def test_without_servers_it_says_so_and_goes_on_once_they_are_there(model, servers, front):
    first, second = servers.parts(model.store, 2)
    fronting = front([first.address, second.address], look_seconds=0.01)
    fronting.load()
    second.stop()
    with pytest.raises(Unavailable, match="rows of cut 1 of run 0 cannot be had now: ask again"):
        looked_up(fronting.current, model.keys)
    assert not fronting.look()
    assert fronting.problem.startswith(
        "what the servers of rows serve is not served: no server answers that has part 1 of 2"
    )
    assert fronting.ready, "who asks is told for himself"
    again = servers.start(model.store, 1, 2, listen=second.address)
    assert again.address == second.address
    found = None
    for _ in range(60):
        # It is asked again what it has after a pause.
        with contextlib.suppress(Unavailable):
            found = looked_up(fronting.current, KEYS)
            break
    assert found is not None
    assert same(found, looked_up(serving_rig.loaded(model.store).current, KEYS))
    fronting.look()
    assert fronting.problem == ""


def test_it_waits_for_servers_at_the_beginning(model, servers, front):
    first = servers.start(model.store, 0, 2)
    unborn = servers.start(model.store, 1, 2)
    unborn.stop()
    fronting = front([first.address, unborn.address])
    said = []

    def progress(done, total):
        said.append(fronting.problem)
        if len(said) == 2:
            servers.start(model.store, 1, 2, listen=unborn.address)

    assert fronting.load(progress=progress).version.cut == 1
    assert said[0] == ""
    assert "no server answers that has part 1 of 2" in said[1]
    assert fronting.problem == ""


def test_the_end_does_not_wait_for_servers(model, front):
    fronting = front(["127.0.0.1:1"])
    ending = threading.Timer(0.1, fronting.close)
    ending.start()
    with pytest.raises(Unavailable, match="this process is ending"):
        fronting.load()
    ending.join()


def test_rows_of_another_version_are_not_had(model, servers, front):
    parts = servers.parts(model.store, 2)
    fronting = front(addresses(parts))
    state = fronting.load()
    for cut in (2, 3):
        model.cut(cut)
        for each in parts:
            each.serving.look()
    # They have kept 2.
    with pytest.raises(Unavailable, match="rows of cut 1 of run 0 cannot be had now: ask again"):
        state.lookup("user", model.keys, np.empty((200, 4), np.float32))
    assert fronting.look()
    assert fronting.current.version.cut == 3


def test_a_cut_that_is_not_in_the_folder_changes_nothing(model, servers, front, tmp_path):
    parts = servers.parts(model.store, 2)
    copy = serving_rig.Model(tmp_path / "copy")
    copy.cut(1)
    fronting = front(addresses(parts), store=copy.store)
    fronting.load()
    model.cut(2)
    for each in parts:
        each.serving.look()
    assert not fronting.look()
    assert "no committed cut 2" in fronting.problem
    assert same(looked_up(fronting.current, KEYS), looked_up(serving_rig.loaded(copy.store).current, KEYS))
    copy.cut(2)
    assert fronting.look()
    assert (fronting.problem, fronting.current.version.cut) == ("", 2)


def test_a_server_that_is_another_one_now_is_left_out_and_named(model, servers, front, tmp_path):
    parts = servers.parts(model.store, 2, 2)
    fronting = front(addresses(parts))
    fronting.load()
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(1)
    parts[0].stop()
    stranger = servers.start(other.store, 0, 2, listen=parts[0].address)
    assert not fronting.look()
    assert fronting.problem == f"{stranger.address} serves rows of job {'f' * 32}, and not of {serving_rig.JOB}"
    model.cut(2)
    for each in parts[1:]:
        each.serving.look()
    assert fronting.look(), "the others are followed"
    for _ in range(20):
        assert same(looked_up(fronting.current, KEYS), looked_up(serving_rig.loaded(model.store).current, KEYS))
    assert stranger.service.asked == {}
    fronting.look()
    assert stranger.address in fronting.problem
    stranger.stop()
    fronting.look()
    assert fronting.problem == ""


def test_servers_that_do_not_belong_here_are_refused(model, servers, front, tmp_path):
    with pytest.raises(InvalidArgument, match="has all of its model, not a part"):
        front([servers.start(model.store).address]).load()
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(1)
    with pytest.raises(WrongJob, match="serves rows of job f"):
        front(addresses(servers.parts(other.store, 2))).load()
    with pytest.raises(InvalidArgument, match="is no address"):
        front(["nowhere"])
