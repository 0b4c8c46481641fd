# SPDX-License-Identifier: Apache-2.0
"""The server's sockets for frames: who is let in, what ends a connection, and what is answered."""

import numpy as np
import pytest
from frame_rig import Raw, answers, offer_of

from oarlock.proto import frames
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk, Parts, inlined
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import Malformed, OutOfMemory, StalePlacement
from oarlock.proto.rpc.sockets import ABSTRACT
from oarlock.proto.rpc.status import from_failure
from oarlock.proto.shard_pb2 import PullReply, PullRequest


@pytest.fixture(params=[ABSTRACT, "tcp"])
def kind(request):
    return request.param


def test_frames_are_offered_on_both_kinds_and_answered(server, kind):
    with Raw(server, kind=kind).in_() as one:
        for run in (1, 2):
            one.pull(run)
            assert PullReply.FromString(one.receiver.receive().message).pushes == run
    assert answers(server)


@pytest.mark.parametrize("token", [b"", b"\0" * 16, b"x" * 15, b"x" * 64])
def test_who_has_not_the_token_is_not_heard(server, handler, kind, token):
    with Raw(server, kind=kind, token=token) as one:
        assert one.ended()
    assert not handler.entered.acquire(blocking=False)
    assert answers(server)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 200,
        b"GET / HTTP/1.1\r\n\r\n" * 5,
        b"OARF\x01\x00\x00\x00" + b"\xff" * 12,
        b"OARF\x02" + b"\0" * 100,
        b"".join(bytes(b) for b in frames.encode(frames.PULL, b"")),
        b"".join(bytes(b) for b in frames.encode(frames.REPLY, b"x" * 16)),
    ],
    ids=range(6),
)
def test_garbage_as_the_first_word(server, kind, garbage):
    with Raw(server, kind=kind, token=False) as one:
        one.socket.sendall(garbage)
        assert one.ended()
    assert answers(server)


@pytest.mark.parametrize("frame_kind", [0, 1, 5, 99, 127, 128, 128 + 5, 255])
def test_a_kind_that_there_is_not_ends_the_connection(server, frame_kind):
    with Raw(server).in_() as one:
        one.send(frame_kind, b"")
        assert one.ended()
    assert answers(server)


def closed_at(stage):
    """Go as far as ``stage`` and leave."""

    def go(server, handler):
        one = Raw(server, token=False)
        with one:
            if stage == "connected":
                return
            hello = b"".join(bytes(b) for b in frames.encode(frames.HELLO, offer_of(server).token))
            if stage == "half a hello":
                one.socket.sendall(hello[:25])
                return
            one.socket.sendall(hello)
            if stage == "hello":
                return
            one.in_()
            if stage == "idle":
                return
            request = PullRequest(dense=pack(np.zeros(1 << 20, np.float32))).SerializeToString()
            whole = b"".join(bytes(b) for b in frames.encode(frames.PULL, request))
            if stage == "half a head":
                one.socket.sendall(whole[:7])
            elif stage == "half a frame":
                one.socket.sendall(whole[: len(whole) // 2])
            elif stage == "asked":
                one.socket.sendall(whole)
            else:
                one.socket.sendall(whole)
                # The reply has begun to come.
                one.socket.recv(1)

    return go


@pytest.mark.parametrize(
    "stage", ["connected", "half a hello", "hello", "idle", "half a head", "half a frame", "asked", "answered"]
)
def test_a_connection_that_leaves_at_any_time(server, handler, stage):
    closed_at(stage)(server, handler)
    assert answers(server)
    server.stop(0)
    assert server.open_calls()["frames"] == 0


def test_failures_are_answers_and_the_connection_goes_on(server):
    with Raw(server).in_() as one:
        one.send(frames.PULL, b"\xff" * 20)
        assert type(from_failure(PullReply.FromString(one.receiver.receive().message).failure)) is Malformed
        one.pull(number=7)
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert (type(got), got.details) == (StalePlacement, {"block": 3})
        one.pull(6)
        assert PullReply.FromString(one.receiver.receive().message).pushes == 6


def test_an_answer_over_the_limit_is_a_failure_and_the_connection_goes_on(server):
    """The handler's parts are three times half the limit."""
    with Raw(server).in_() as one:
        one.send(frames.PULL | frames.BESIDE, PullRequest(number=8).SerializeToString())
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert type(got) is OutOfMemory
        one.pull(6)
        assert PullReply.FromString(one.receiver.receive().message).pushes == 6


@pytest.mark.parametrize("beside", [0, frames.BESIDE])
def test_parts_that_do_not_fit_their_message(server, beside):
    values = np.ones(300, np.float32)
    good = PullRequest(dense=Array(dtype=3, shape=[300], part=1))
    cases = [
        (PullRequest(dense=Array(dtype=3, shape=[300], part=2)), [values]),
        (PullRequest(dense=Array(dtype=3, shape=[300], part=(1 << 32) - 1)), [values]),
        (good, []),
        (good, [values[:-1]]),
        (good, [np.ones(301, np.float32)]),
    ]
    if beside:
        cases.append((PullRequest(dense=Array(dtype=3, shape=[300], part=1, data=b"x" * 1200)), [values]))
    with Raw(server).in_() as one:
        for request, parts in cases:
            one.send(frames.PULL | beside, request.SerializeToString(), parts)
            failure = PullReply.FromString(one.receiver.receive().message).failure
            assert type(from_failure(failure)) is Malformed
        one.send(frames.PULL | beside, good.SerializeToString(), [values])
        assert not PullReply.FromString(one.receiver.receive().message).HasField("failure")


def test_one_part_for_many_arrays_is_refused(server):
    """Else a message of 100 bytes and one part would stand for gigabytes."""
    part = np.zeros(1 << 16, np.float32)
    table = {"keys": Array(dtype=3, shape=[1 << 16], part=1)}
    request = PullRequest(tables=[table] * 2)
    with Raw(server).in_() as one:
        one.send(frames.PULL, request.SerializeToString(), [part])
        got = from_failure(PullReply.FromString(one.receiver.receive().message).failure)
        assert type(got) is Malformed
        assert got.message == "two arrays are said to be part 1"
    assert answers(server)


def test_parts_are_read_once_and_counted_any_number_of_times():
    parts = Parts([b"ab", b"cde"])
    assert (len(parts), Bulk(None, parts).nbytes, list(parts)) == (2, 5, [b"ab", b"cde"])
    assert parts[1] == b"cde"
    with pytest.raises(Malformed, match="two arrays are said to be part 2"):
        parts[1]
    assert parts[0:1] == [b"ab"]
    with pytest.raises(IndexError):
        parts[2]
    with pytest.raises(Malformed, match="part 3 of 2"):
        inlined(Bulk(PullRequest(dense=Array(part=3)), Parts([b"a", b"b"])))
