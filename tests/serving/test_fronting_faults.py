# SPDX-License-Identifier: Apache-2.0
"""A process without rows while something is wrong: with its servers, its folder, its callers, or its own end."""

import fleet_rig
import numpy as np
import pytest
import serving_rig

from oarlock.checkpoint.store import open_store
from oarlock.proto.errors import InvalidArgument, Malformed, SpecMismatch, Unavailable, WrongRun
from oarlock.proto.serving_pb2 import ModelReply, NearestRequest, ServedTable, TableFound
from oarlock.serving import service as service_module
from oarlock.serving.agreeing import check_form
from oarlock.serving.client import ModelVersion as Told
from oarlock.serving.client import lookup_request
from oarlock.serving.fronting import Fronting
from oarlock.serving.models import Models
from oarlock.serving.remote import RowServers
from oarlock.serving.service import ServingService


@pytest.fixture
def front(model):
    made = []

    def make(parts, store=None, **options):
        servers = RowServers([each.address for each in parts], rows_seconds=1.0)
        made.append(Fronting(store or model.store, servers, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.dispose()


def rows_of(state, keys):
    out = np.full((len(keys), 4), np.nan, np.float32)
    state.lookup("user", keys, out)
    return out


def test_what_is_under_way_at_the_end_is_answered(model, servers, front):
    fronting = front(servers.parts(model.store, 2))
    state = fronting.load()
    fronting.follow()
    fronting.close()
    assert (rows_of(state, model.keys)[:, 0] == serving_rig.value_of(1, model.keys)).all()
    fronting.dispose()
    with pytest.raises(Unavailable, match="cannot be had now"):
        rows_of(state, model.keys)


def test_who_has_not_said_what_it_serves_keeps_nobody_waiting(model, servers, front):
    parts = servers.parts(model.store, 2, 2)
    fronting = front(parts)
    fronting.load()
    parts[0].service.tells.clear()
    model.cut(2)
    for each in parts:
        each.serving.look()
    assert fronting.look()
    assert list(fronting.servers._asked) == [parts[0].address], "it is still asked"
    parts[0].service.tells.set()
    # What it says by then is its answer of the next time.
    fronting.look()
    assert (fronting.current.version.cut, fronting.problem) == (2, "")


def test_rows_that_are_not_had_are_told_without_addresses_and_looked_into_at_once(model, servers, front):
    parts = servers.parts(model.store, 2)
    fronting = front(parts, look_seconds=1000.0)
    state = fronting.load()
    fronting.follow()
    for cut in (2, 3):
        model.cut(cut)
        for each in parts:
            each.serving.look()
    with pytest.raises(Unavailable) as told:
        rows_of(state, model.keys)
    assert told.value.message == "rows of cut 1 of run 0 cannot be had now: ask again"
    while fronting.current.version.cut != 3:
        pass
    assert (rows_of(fronting.current, model.keys)[:, 0] == serving_rig.value_of(3, model.keys)).all()
    fronting.look()
    assert fronting.problem == ""


def test_why_rows_are_not_had_is_the_problem_for_a_while(model, servers, front, monkeypatch):
    fronting = front(servers.parts(model.store, 2))
    state = fronting.load()
    monkeypatch.setattr(
        ServingService, "lookup", lambda self, request: service_module.LookupReply(version={"run": 0, "cut": 1})
    )
    with pytest.raises(Unavailable, match="cannot be had now"):
        rows_of(state, model.keys)
    fronting.look()
    assert "rows of 0 tables came, 1 were asked for" in fronting.problem
    monkeypatch.undo()
    rows_of(state, model.keys)
    fronting.look()
    assert fronting.problem == ""


def test_a_predictor_is_warm_without_servers(model, servers, front):
    parts = servers.parts(model.store, 2)
    fronting = front(parts)
    fronting.load()
    for each in parts:
        each.stop()

    class Predictor:
        def warm_up(self, state):
            self.state = state
            rows_of(state, model.keys)

    predictor = Predictor()
    Models(ServingService(fronting)).begin(predictor)
    assert predictor.state is fronting.current.base


def test_another_folder_of_the_job_is_refused_by_its_run(model, servers, front, tmp_path):
    parts = servers.parts(model.store, 2)
    other = serving_rig.Model(tmp_path / "other")
    other.cut(1, run=3)
    with pytest.raises(
        WrongRun, match="cut 1 of run 0 is what the servers of rows have; in this folder cut 1 is of run 3"
    ):
        front(parts, store=open_store(tmp_path / "other")).load()


def test_rows_of_another_form_are_not_taken():
    kept = {}

    def reply(form):
        return ModelReply(tables=[ServedTable(name="user", dtype=form)])

    check_form("h:1", reply("float32"), kept)
    check_form("h:2", reply("float32"), kept)
    with pytest.raises(SpecMismatch, match="h:3 has the rows of user as pq, others as float32"):
        check_form("h:3", reply("pq"), kept)


def test_memory_is_asked_for_as_often_as_rows_lie_in_it(model, servers, front, monkeypatch):
    fronting = front(servers.parts(model.store, 2))
    fronting.load()
    asked = []
    monkeypatch.setattr(service_module, "expects", asked.append)
    for serving in (fronting, serving_rig.loaded(model.store)):
        ServingService(serving).lookup(lookup_request({"user": model.keys}))
    whole = 4 * 4 * len(model.keys)
    # In between the parts were asked, each for its own.
    assert (asked[0], asked[-1], sum(asked[1:-1])) == (3 * whole, whole, whole)


def test_nearest_rows_are_the_servers_business(model, servers, front):
    fronting = front(servers.parts(model.store, 2))
    fronting.load()
    with pytest.raises(InvalidArgument, match="nearest rows are asked of the servers of the parts"):
        ServingService(fronting).nearest(NearestRequest(table="user"))


@pytest.mark.parametrize(
    "version", [Told(-1, 1, 0.0), Told(1 << 40, 1, 0.0), Told(0, 1 << 64, 0.0), (0, 1), "newest", 3]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_no_version_is_refused(model, servers, version, parts):
    addresses = [each.address for each in servers.parts(model.store, parts)]
    for address in (addresses, addresses[0]) if parts == 1 else (addresses,):
        with (
            fleet_rig.Asked("blocking", address) as client,
            pytest.raises(InvalidArgument, match="is no version of a model"),
        ):
            client.lookup({"user": model.keys}, version=version)


def test_one_server_that_answers_of_another_version_is_not_believed(model, servers, monkeypatch):
    server = servers.start(model.store)
    monkeypatch.setattr(server.service, "_asked_of", lambda message: server.serving.current)
    for address in (server.address, [server.address]):
        with fleet_rig.Asked("blocking", address) as client, pytest.raises(Malformed, match="was asked for"):
            client.lookup({"user": model.keys}, version=Told(0, 9, 0.0))


@pytest.mark.parametrize("parts", [1, 2])
def test_more_keys_without_a_row_than_there_are_keys_are_not_believed(model, servers, parts, monkeypatch):
    addresses = [each.address for each in servers.parts(model.store, parts)]
    made = TableFound

    def lying(rows, missing):
        return made(rows=rows, missing=(1 << 32) - 1)

    monkeypatch.setattr(service_module, "TableFound", lying)
    with (
        fleet_rig.Asked("blocking", addresses) as client,
        pytest.raises(Malformed, match="of which 4294967295 have none"),
    ):
        client.lookup({"user": model.keys})
