# SPDX-License-Identifier: Apache-2.0
"""Which version the servers of a model's parts agree on, and rows of one version that is asked for."""

import fleet_rig
import pytest

from oarlock.proto.errors import InvalidArgument, Malformed, NotFound, SpecMismatch, Unavailable, WrongJob
from oarlock.proto.serving_pb2 import ModelReply, ModelVersion, ServedTable
from oarlock.serving.agreeing import agreed_version, check_fits, held_by
from oarlock.serving.client import ModelVersion as Told
from oarlock.serving.fleet import ServedModel, TableForm

TABLES = {"user": TableForm(4, 4, 11), "item": TableForm(16, 2, 12)}


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param


def addresses(parts):
    return [each.address for each in parts]


def reply(cut, part, parts=2, *, run=0, live=False, job="j", tables=TABLES, old=1.0, rows=10):
    return ModelReply(
        job=job,
        version=ModelVersion(run=run, cut=cut, live=live, seconds_since=old),
        part=part,
        parts=parts,
        tables=[
            ServedTable(name=name, dim=form.dim, blocks=form.blocks, salt=form.salt, rows=rows + part, dtype="float32")
            for name, form in tables.items()
        ],
    )


def agreed(*replies):
    by_address, parts = {f"h:{n}": each for n, each in enumerate(replies, 1)}, 0
    for address, each in by_address.items():
        parts = check_fits(address, each, ServedModel("j", parts, TABLES))
    return agreed_version(by_address, parts)


@pytest.mark.parametrize(
    ("replies", "found"),
    [
        ([reply(3, 0), reply(3, 1)], (0, 3, False)),
        # The newest that both parts have a server of, whatever others have.
        ([reply(3, 0), reply(4, 0), reply(3, 1), reply(4, 1), reply(5, 1)], (0, 4, False)),
        ([reply(9, 0), reply(9, 1), reply(2, 0, run=1), reply(2, 1, run=1)], (1, 2, False)),
        # Of what is live the run tells.
        ([reply(7, 0, live=True), reply(8, 1, live=True)], (0, 0, True)),
    ],
)
def test_which_version_they_agree_on(replies, found):
    version = agreed(*replies)
    assert (version.run, version.cut, version.live) == found


@pytest.mark.parametrize(
    ("replies", "error", "words"),
    [
        ([reply(3, 0), reply(4, 1)], Unavailable, "their servers have cut 3 of run 0, cut 4 of run 0"),
        ([reply(3, 0), reply(3, 1, live=True)], Unavailable, "have run 0, live, cut 3 of run 0"),
        ([reply(3, 0), reply(3, 0)], Unavailable, "no server answers that has part 1 of 2"),
        ([reply(3, 0), reply(3, 1, 3)], InvalidArgument, "h:2 serves one of 3 parts, others one of 2"),
        ([reply(3, 0, 1)], InvalidArgument, "h:1 has all of its model"),
        ([reply(3, 0), reply(3, 1, job="k")], WrongJob, "h:2 serves rows of job k, and not of j"),
        ([reply(3, 0, tables={"user": TABLES["user"]})], SpecMismatch, "h:1 serves other tables"),
        ([reply(3, 0, tables={**TABLES, "item": TableForm(16, 4, 12)})], SpecMismatch, "h:1 serves other tables"),
        ([reply(3, 7)], Malformed, "h:1: it says that it has part 7 of 2"),
        ([reply(3, 0, old=float("nan"))], Malformed, "what it serves is nan s old"),
        ([reply(3, 0, old=float("inf"))], Malformed, "what it serves is inf s old"),
        ([reply(3, 0, old=-1.0)], Malformed, "what it serves is -1.0 s old"),
        ([reply(3, 0, rows=1 << 63)], Malformed, "it says that it has 9223372036854775808 rows of a table"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(replies, error, words):
    with pytest.raises(error, match=words):
        agreed(*replies)


def test_what_servers_hold_counts_one_of_each_part():
    replies = {str(n): each for n, each in enumerate([reply(1, 0), reply(1, 0), reply(1, 1)])}
    assert held_by(replies) == {"user": (21, "float32"), "item": (21, "float32")}


def test_a_version_can_be_asked_for(model, servers, kind):
    parts = servers.parts(model.store, 2)
    whole = servers.start(model.store)
    model.cut(2)
    for each in (*parts, whole):
        each.serving.look()
    old, new, never = (Told(0, cut, 0.0) for cut in (1, 2, 9))
    with fleet_rig.Asked(kind, addresses(parts)) as client:
        fleet_rig.check(client.lookup(fleet_rig.both(model.keys), version=old), model, model.keys, 1)
        fleet_rig.check(client.lookup(fleet_rig.both(model.keys), version=new), model, model.keys, 2)
        with pytest.raises(NotFound, match="cut 9 of run 0 is not served here"):
            client.lookup(fleet_rig.both(model.keys), version=never)
    for address in (whole.address, [whole.address]):
        with fleet_rig.Asked(kind, address) as client:
            fleet_rig.check(client.lookup(fleet_rig.both(model.keys), version=new), model, model.keys, 2)
            with pytest.raises(NotFound, match="cut 1 of run 0 is not served here"):
                client.lookup(fleet_rig.both(model.keys), version=old)


def test_a_server_that_answers_of_another_version_is_not_believed(model, servers, kind, monkeypatch):
    parts = servers.parts(model.store, 2)
    for each in parts:
        monkeypatch.setattr(each.service, "_asked_of", lambda message, serving=each.serving: serving.current)
    with (
        fleet_rig.Asked(kind, addresses(parts)) as client,
        pytest.raises(Malformed, match="rows of another version came"),
    ):
        client.lookup(fleet_rig.both(model.keys), version=Told(0, 9, 0.0))
