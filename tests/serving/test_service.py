# SPDX-License-Identifier: Apache-2.0
"""The service: whole answers with their version, and for every wrong request one clear error, before memory is taken for it."""

import random

import numpy as np
import pytest
import serving_rig
from google.protobuf.message import DecodeError

from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import (
    Internal,
    InvalidArgument,
    Malformed,
    NotFound,
    OutOfMemory,
    PSError,
    UnknownTable,
    VersionMismatch,
)
from oarlock.proto.serving_pb2 import LookupReply, LookupRequest, ModelRequest, ServeCutRequest, TableLookup
from oarlock.proto.transport import dispatch
from oarlock.serving.service import MAX_TABLES, ServingService
from oarlock.serving.swap import Serving
from oarlock.serving.telemetry import serving_source
from oarlock.telemetry.registry import Registry


@pytest.fixture
def service(model):
    serving = Serving(model.store)
    serving.load()
    return ServingService(serving, max_keys=1000)


def asked(keys, table="user"):
    return TableLookup(table=table, keys=pack(np.asarray(keys, np.uint64)))


def test_an_answer_has_rows_in_the_order_of_keys_the_missing_and_the_version(service, model):
    keys = np.concatenate([model.keys[::-3], model.keys[:2], [1 << 63]]).astype(np.uint64)
    reply = service.lookup(LookupRequest(protocol=1, tables=[asked(keys), asked([7], "item"), asked([])]))
    assert (reply.version.run, reply.version.cut) == (0, 1)
    assert reply.version.seconds_since > 0
    rows = [unpack(found.rows, np.float32, "rows", dims=2) for found in reply.tables]
    assert [r.shape for r in rows] == [(len(keys), 4), (1, 16), (0, 4)]
    assert (rows[0][:-1, 0] == serving_rig.value_of(1, keys[:-1])).all()
    assert [found.missing for found in reply.tables] == [1, 0, 0]
    assert (service.asked, service.missing) == ({"user": len(keys), "item": 1}, {"user": 1, "item": 0})


def test_rows_travel_beside_the_message_of_who_can_take_them(service, model):
    answer = service.lookup(Bulk(LookupRequest(tables=[asked(model.keys)]), ()))
    assert isinstance(answer, Bulk)
    assert answer.message.tables[0].rows.part == 1
    rows = unpack(answer.message.tables[0].rows, np.float32, "rows", dims=2, parts=answer.parts)
    assert (rows[:, 0] == serving_rig.value_of(1, model.keys)).all()


def test_a_table_may_be_named_twice_and_no_table_is_no_error(service):
    reply = service.lookup(LookupRequest(tables=[asked([7]), asked([8, 9])]))
    assert [len(unpack(f.rows, np.float32, "rows", dims=2)) for f in reply.tables] == [1, 2]
    assert list(service.lookup(LookupRequest()).tables) == []


KEYS = pack(np.arange(3, dtype=np.uint64))
WRONG = {
    "unknown table": (TableLookup(table="shop", keys=KEYS), UnknownTable, "its tables are: user, item"),
    "no name": (TableLookup(keys=KEYS), UnknownTable, "no table ''"),
    "signed keys": (TableLookup(table="user", keys=pack(np.arange(3, dtype=np.int32))), Malformed, "wanted uint64"),
    "rows of keys": (TableLookup(table="user", keys=pack(np.zeros((1, 3), np.uint64))), Malformed, "2 dimensions"),
    "too few bytes": (TableLookup(table="user", keys=Array(data=bytes(23), dtype=1, shape=[3])), Malformed, "23 bytes"),
    "too many bytes": (
        TableLookup(table="user", keys=Array(data=bytes(32), dtype=1, shape=[3])),
        Malformed,
        "32 bytes",
    ),
    "no shape": (TableLookup(table="user", keys=Array(data=bytes(8), dtype=1)), Malformed, "0 dimensions"),
    "no such part": (TableLookup(table="user", keys=Array(dtype=1, shape=[3], part=1)), Malformed, "part 1 of 0"),
    "a huge shape": (TableLookup(table="user", keys=Array(dtype=1, shape=[1 << 31])), OutOfMemory, "over the limit"),
    "too many keys": (asked(np.zeros(1001)), InvalidArgument, "1002 keys; the limit is 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_whole_by_name(service, name):
    wrong, kind, words = WRONG[name]
    with pytest.raises(kind, match=words) as refused:
        service.lookup(LookupRequest(tables=[asked([7]), wrong]))
    assert type(refused.value) is kind
    assert service.asked == {}, "nothing was looked up"


def test_limits_are_over_all_tables_and_of_the_answer_too(service, tmp_path):
    with pytest.raises(InvalidArgument, match="1002 keys"):
        service.lookup(LookupRequest(tables=[asked(np.zeros(501)), asked(np.zeros(501), "item")]))
    with pytest.raises(Malformed, match=f"{MAX_TABLES + 1} tables"):
        service.lookup(LookupRequest(tables=[TableLookup(table="user")] * (MAX_TABLES + 1)))
    wide = serving_rig.Model(tmp_path / "wide", specs=(TableSpec("w", 65536, blocks=1),))
    wide.keys = np.arange(2, dtype=np.uint64)
    wide.cut(1)
    serving = Serving(wide.store)
    serving.load()
    with pytest.raises(OutOfMemory, match="ask for them in parts"):
        ServingService(serving).lookup(LookupRequest(tables=[asked(np.zeros(513), "w")]))


def test_another_version_of_the_messages_is_refused(service):
    for method, request in (
        ("Serving.Lookup", LookupRequest(protocol=2)),
        ("Serving.Describe", ModelRequest(protocol=2)),
        ("Serving.Rollback", ServeCutRequest(protocol=2)),
    ):
        with pytest.raises(VersionMismatch):
            dispatch(service, method, request)


def test_what_is_served_is_described(service, model):
    model.cut(2)
    found = service.describe(ModelRequest())
    assert (found.job, found.version.cut, list(found.cuts), found.pinned) == (serving_rig.JOB, 1, [1, 2], False)
    assert [(t.name, t.dim, t.rows, t.dtype, t.absent) for t in found.tables] == [
        ("user", 4, len(model.keys), "float32", "first"),
        ("item", 16, len(model.keys), "float32", "zeros"),
    ]
    assert all(t.bytes >= t.rows * (8 + 4 * t.dim) for t in found.tables)


def test_a_rollback_serves_another_cut_and_says_so(service, model):
    model.cut(2)
    assert service.rollback(ServeCutRequest(newest=True)).version.cut == 2
    reply = service.rollback(ServeCutRequest())
    assert (reply.version.cut, reply.pinned) == (1, True)
    assert service.lookup(LookupRequest(tables=[asked([7])])).version.cut == 1
    with pytest.raises(NotFound, match="no committed cut 5"):
        service.rollback(ServeCutRequest(cut=5))
    with pytest.raises(InvalidArgument, match="ask for one of them"):
        service.rollback(ServeCutRequest(cut=1, newest=True))
    assert service.rollback(ServeCutRequest(newest=True)).pinned is False


def test_any_bytes_end_in_an_answer_or_a_clear_error(service, model):
    """Messages that are cut off, changed and made up: no crash, no defect, nothing that grows."""
    rng = random.Random(5)
    good = [
        LookupRequest(protocol=1, tables=[asked(model.keys[:5]), asked([1], "item")]).SerializeToString(),
        LookupRequest(
            tables=[TableLookup(table="user", keys=Array(dtype=1, shape=[2, 3], part=7))]
        ).SerializeToString(),
    ]
    answered = refused = 0
    for _ in range(3000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data
        try:
            request = LookupRequest.FromString(bytes(data))
        except DecodeError:
            continue
        try:
            assert isinstance(dispatch(service, "Serving.Lookup", request), LookupReply)
            answered += 1
        except Internal:
            raise
        except PSError:
            refused += 1
    assert answered > 100
    assert refused > 100
    assert set(service.asked) <= {"user", "item"}


def test_metrics_are_those_of_the_table(service, model):
    registry = Registry()
    registry.add(serving_source(service))
    service.lookup(LookupRequest(tables=[asked([7, 1 << 60])]))
    found = {family.metric.name: family.samples for family in registry.collect()}
    user = (("table", "user"),)
    assert found["oarlock_serving_asked_keys_total"][user] == 2
    assert found["oarlock_serving_missing_keys_total"][user] == 1
    assert found["oarlock_serving_rows"][user] == len(model.keys)
    assert found["oarlock_serving_cut"][()] == 1
    assert sum(found["oarlock_serving_lookup_seconds"][()].counts) == 1
    assert found["oarlock_telemetry_failures_total"][()] == 0
    empty = Registry()
    empty.add(serving_source(ServingService(Serving(model.store))))
    unready = {family.metric.name: family.samples for family in empty.collect()}
    assert unready["oarlock_serving_ready"][()] == 0
    assert "oarlock_serving_cut" not in unready
