# SPDX-License-Identifier: Apache-2.0
"""Whom a shard listens to, and what it says to the others."""

import contextlib
import json

import numpy as np
import pytest
import rig

from oarlock import __version__
from oarlock.client.autoscale import Autoscale
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack
from oarlock.proto.common_pb2 import ClosedSplits, Header, HelloRequest
from oarlock.proto.errors import (
    InvalidArgument,
    LeaseLost,
    Malformed,
    OutOfMemory,
    Unavailable,
    UnknownTable,
    VersionMismatch,
    WrongIncarnation,
    WrongJob,
    WrongRun,
)
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import (
    CloseRequest,
    MarksRequest,
    PullRequest,
    PushRequest,
    ShardStatsRequest,
    TableKeys,
    WriteRequest,
)
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService

WITH_HEADER = sorted(n for n, m in METHODS.items() if n.startswith("Shard.") and n != "Shard.Hello")


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def ask(service, name, header):
    method = METHODS[name]
    return getattr(service, method.attribute)(method.request(header=header))


def test_every_method_of_the_wire_is_answered(job):
    for name, method in METHODS.items():
        assert hasattr(job.services[0], method.attribute) == name.startswith("Shard.") or name == "Coordinator.Hello"


@pytest.mark.parametrize("name", WITH_HEADER)
def test_before_joining_a_shard_is_unavailable(job, name):
    with pytest.raises(Unavailable, match="has not joined its job yet"):
        ask(ShardService(), name, job.header(0))


def test_a_greeting_is_answered_before_joining():
    reply = ShardService().hello(HelloRequest(protocol=PROTOCOL))
    assert (reply.role, reply.version, reply.protocol) == ("shard", __version__, PROTOCOL)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"protocol": PROTOCOL + 1}, VersionMismatch, "speaks protocol 2, this process 1"),
        (
            {"job": b"\xab" * 16},
            WrongJob,
            "serves job 00112233445566778899aabbccddeeff, the message is of job " + "ab" * 16,
        ),
        ({"job": b""}, WrongJob, "the message is of job none"),
        ({"run": 2}, WrongRun, "in run 1, the message is of run 2"),
        ({"run": 0}, WrongRun, "in run 1, the message is of run 0"),
        ({"target": 99}, WrongIncarnation, "for incarnation 99, this shard is 100"),
        ({"target": 0}, WrongIncarnation, "for incarnation 0, this shard is 100"),
    ],
)
@pytest.mark.parametrize("name", WITH_HEADER)
def test_a_message_for_another_is_refused_by_name(job, name, changes, kind, text):
    with pytest.raises(kind, match=text):
        ask(job.services[0], name, job.header(0, **changes))


@pytest.mark.parametrize("name", WITH_HEADER)
def test_a_message_without_a_header_is_refused(job, name):
    with pytest.raises(VersionMismatch, match="protocol 0"):
        getattr(job.services[0], METHODS[name].attribute)(METHODS[name].request())
    with pytest.raises(VersionMismatch, match="protocol 0"):
        ask(job.services[0], name, Header())


def test_what_comes_first_is_named_first(job):
    wrong = {"protocol": 9, "job": b"x", "run": 9, "target": 9}
    for field, kind in (
        ("protocol", VersionMismatch),
        ("job", WrongJob),
        ("run", WrongRun),
        ("target", WrongIncarnation),
    ):
        with pytest.raises(kind):
            ask(job.services[0], "Shard.Marks", job.header(0, **wrong))
        del wrong[field]


def test_orders_of_a_coordinator_that_was_replaced_are_refused(job):
    service = job.services[0]
    close = lambda term, split: service.close(  # noqa: E731
        CloseRequest(header=job.header(0, term=term), closed=ClosedSplits(floor=split))
    )
    close(5, 1)
    close(5, 2)
    with pytest.raises(LeaseLost, match="of term 4, a coordinator of term 5 is in charge"):
        close(4, 3)
    with pytest.raises(LeaseLost, match="of term 4"):
        service.write(WriteRequest(header=job.header(0, term=4)))
    adopt = job.adoption(0)
    adopt.header.term = 4
    with pytest.raises(LeaseLost, match="of term 4"):
        service.adopt(adopt)
    assert job.shards[0].closed.floor == 2
    # A message for another process says nothing about the coordinator of this one.
    with pytest.raises(WrongIncarnation):
        service.close(CloseRequest(header=job.header(0, term=9, target=1)))
    close(5, 3)
    assert job.shards[0].closed.floor == 3


def test_marks_are_told_for_a_limited_number_of_splits(job):
    reply = job.services[0].marks(MarksRequest(header=job.header(0), splits=range(1024)))
    assert list(reply.next) == [0] * 1024
    with pytest.raises(InvalidArgument, match="1025 splits asked for, at most 1024"):
        job.services[0].marks(MarksRequest(header=job.header(0), splits=range(1025)))


def test_a_closed_set_that_is_none_is_malformed_and_changes_nothing(job):
    wide = ClosedSplits(floor=7, bitmap=b"\xff" * 1000)
    with pytest.raises(Malformed, match="at most 1024"):
        job.services[0].close(CloseRequest(header=job.header(0), closed=wide))
    with pytest.raises(Malformed, match="at most 1024"):
        job.services[0].adopt(job.adoption(0, closed=wide))
    assert job.shards[0].closed.floor == 0


def keys_of(job, raw):
    found = rig.group_keys(job.layout, job.routes(), job.layout.tables[0].name, raw)
    return TableKeys(keys=pack(found.keys), blocks=pack(found.blocks), counts=pack(found.counts))


def test_a_pull_that_asks_for_more_than_a_message_holds_is_refused_before_memory_is_taken():
    """A wide table: 3000 keys are 24 kB of request and 786 MB of answer."""
    job = rig.Job(rig.spec_of(tables=(TableSpec("wide", 65536, rig.SGD, rig.ZEROS, 8),)), shards=1).place()
    over = MAX_MESSAGE_BYTES // (4 * 65536) + 1
    request = PullRequest(header=job.header(0), tables=[keys_of(job, range(over))])
    with pytest.raises(OutOfMemory, match=f"are {over * 65536 * 4} bytes, over the limit of {MAX_MESSAGE_BYTES}"):
        job.services[0].pull(request)
    # Many tables in one message add up, and so does a table that is named again and again.
    again = PullRequest(header=job.header(0), tables=[keys_of(job, range(over // 2 + 1))] * 2)
    with pytest.raises(OutOfMemory, match="over the limit"):
        job.services[0].pull(again)
    assert job.services[0].stats(ShardStatsRequest(header=job.header(0)))


@pytest.mark.parametrize(
    ("table", "kind", "text"),
    [
        (TableKeys(table=2), UnknownTable, "names table 2, this job has 2"),
        (TableKeys(keys=pack(np.zeros(1, np.uint64))), Malformed, "counts add up to 0, 1 keys came"),
        (TableKeys(keys={"data": b"x"}), Malformed, "keys of user: dtype 0, wanted uint64"),
    ],
)
def test_a_malformed_pull_is_refused(job, table, kind, text):
    with pytest.raises(kind, match=text):
        job.services[0].pull(PullRequest(header=job.header(0), tables=[table]))


def test_an_empty_pull_is_empty(job):
    reply = job.services[0].pull(PullRequest(header=job.header(0)))
    assert (len(reply.rows), reply.pushes) == (0, 0)
    reply = job.services[0].pull(PullRequest(header=job.header(0), tables=[TableKeys()]))
    assert list(reply.rows[0].shape) == [0, 2]


@pytest.mark.parametrize("ask_it", [
    lambda job: job.services[0].pull(PullRequest(header=job.header(0), tables=[keys_of(job, range(5))])),
    lambda job: job.services[0].push(PushRequest(header=job.header(0))),
    lambda job: job.services[0].stats(ShardStatsRequest(header=job.header(0))),
], ids=["pull", "push", "stats"])  # fmt: skip
def test_a_run_that_ends_while_a_request_is_looked_at_is_no_defect(job, monkeypatch, ask_it):
    """Which a worker would take for an error of the job."""
    check = Identity.check

    def ends(identity, header):
        check(identity, header)
        job.services[0].let_go()

    monkeypatch.setattr(Identity, "check", ends)
    # Answered by the run before, or told to come again.
    with contextlib.suppress(Unavailable):
        ask_it(job)
    with pytest.raises(Unavailable):
        ask_it(job)


def test_stats_say_what_the_shard_holds_and_did(job):
    job.services[0].push(PushRequest(header=job.header(0)))
    job.services[0].pull(PullRequest(header=job.header(0), tables=[keys_of(job, range(5))]))
    found = json.loads(job.services[0].stats(ShardStatsRequest(header=job.header(0))).stats)
    assert {k: found[k] for k in ("blocks", "rows", "tables", "pulls", "rows_pulled", "marks_bytes")} == {
        "blocks": 17,
        "rows": 0,
        "tables": {"user": 0, "item": 0},
        "pulls": 1,
        "rows_pulled": 5,
        "marks_bytes": 0,
    }
    assert found["bytes"] > 0


def test_without_a_scaler_no_push_is_measured_and_nothing_told(job, monkeypatch):
    monkeypatch.setattr("oarlock.ps.load.Load.__enter__", lambda load: pytest.fail("a push paid for what nobody asks"))
    job.services[0].push(PushRequest(header=job.header(0)))
    assert "load" not in json.loads(job.services[0].stats(ShardStatsRequest(header=job.header(0))).stats)


def test_for_a_scaler_a_shard_tells_how_busy_it_is():
    job = rig.Job(rig.spec_of(autoscale=Autoscale(servers_most=2)), shards=1).place()
    job.services[0].push(PushRequest(header=job.header(0)))
    found = json.loads(job.services[0].stats(ShardStatsRequest(header=job.header(0))).stats)["load"]
    assert found["pushes_seconds"] == found["pushing_seconds"] > 0
