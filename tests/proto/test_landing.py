# SPDX-License-Identifier: Apache-2.0
"""Parts of an answer that are received where its caller wants them: whole, in the right place, and never after the call."""

import asyncio
import threading

import numpy as np
import pytest
from client_rig import SECONDS, failure, pull, run, until
from scripted_rig import scripted

from oarlock.proto import frames
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import DeadlineExceeded, Malformed, StalePlacement, Unavailable
from oarlock.proto.shard_pb2 import PullReply, PullRequest


def joined(buffers):
    return b"".join(bytes(b) for b in buffers)


def taken_in(data, steps, landing, *, first):
    """Return the frame of ``data``: ``first`` bytes with the head, then as many at a time as ``steps`` says."""
    head = frames.read_head(data[: frames.HEAD_BYTES])
    body = frames.Body(head, memoryview(data)[frames.HEAD_BYTES : first], Buffers(2), landing)
    at = first
    while room := body.room:
        count = min(next(steps), sum(view.nbytes for view in room), len(data) - at)
        left = memoryview(data)[at : at + count]
        for view in room:
            view[: min(len(left), view.nbytes)] = left[: view.nbytes]
            left = left[view.nbytes :]
        body.took(count)
        at += count
    assert at == len(data)
    return body.frame()


@pytest.mark.parametrize("told", [(), (0,), (1,), (3,), (0, 2, 3), (0, 1, 2, 3)])
def test_parts_land_where_they_are_told_to_wherever_the_bytes_are_cut(told, rng):
    parts = [bytes(rng.integers(0, 256, n, np.uint8)) for n in (70, 5, 0, 64, 1)]
    data = joined(frames.encode(frames.REPLY, b"message", parts))

    def some():
        while True:
            yield int(rng.integers(1, 90))

    for first in range(frames.HEAD_BYTES, len(data) + 1):
        targets = {n: bytearray(len(parts[n])) for n in told}

        def landing(message, lengths, targets=targets):
            assert (message, lengths) == (b"message", tuple(map(len, parts)))
            return [memoryview(targets[n]) if n in targets else None for n in range(len(lengths))]

        frame = taken_in(data, some(), landing, first=first)
        assert frame.message == b"message"
        assert [bytes(p) for p in frame.parts] == parts
        assert all(bytes(target) == parts[n] for n, target in targets.items())
        assert all(frame.parts[n].obj is target for n, target in targets.items())


def test_room_of_another_length_is_not_used():
    target = bytearray(9)
    data = joined(frames.encode(frames.REPLY, b"", [b"x" * 10]))
    frame = taken_in(data, iter([1000] * 9), lambda message, lengths: [memoryview(target)], first=20)
    assert (bytes(frame.parts[0]), bytes(target)) == (b"x" * 10, bytes(9))


def test_a_frame_that_contradicts_itself_lands_nowhere():
    data = bytearray(joined(frames.encode(frames.REPLY, b"", [b"x" * 10])))
    data[20] = 9

    def landing(message, lengths):
        raise AssertionError("asked")

    with pytest.raises(Malformed, match="whose parts end at"):
        taken_in(bytes(data), iter([1000] * 9), landing, first=30)


def asking(values, target, **fields):
    beside = []
    request = PullRequest(header=Header(run=5), dense=pack(np.full(values, 5, np.float32), beside), **fields)
    return Bulk(request, beside, lambda reply, lengths: [memoryview(target).cast("B")] if reply.dense.part else [])


@pytest.mark.parametrize("values", [300, 5000, 400_000])
def test_an_answer_is_received_where_its_caller_wants_it(server, values):
    target = np.zeros(values, np.float32)

    async def body(transport):
        answer = await transport.call(server.address, "Shard.Pull", asking(values, target), timeout_seconds=SECONDS)
        reply, parts = opened(answer)
        found = unpack(reply.dense, np.float32, "dense", parts=parts)
        assert np.shares_memory(found, target)
        assert (target == 10).all()
        # What is refused has no parts to land.
        error = await failure(
            transport.call(server.address, "Shard.Pull", asking(values, target, number=7), timeout_seconds=SECONDS)
        )
        assert type(error) is StalePlacement

    run(body)


def test_a_transport_that_knows_of_no_landing_answers_as_ever(server):
    target = np.zeros(5000, np.float32)

    async def body(transport):
        answer = await transport.call(server.address, "Shard.Pull", asking(5000, target), timeout_seconds=SECONDS)
        reply, parts = opened(answer)
        assert (unpack(reply.dense, np.float32, "dense", parts=parts) == 10).all()
        assert not target.any()

    run(body, frames=False)


HALF = 100_000


@pytest.mark.parametrize("how", ["cancelled", "late", "broken off"])
def test_nothing_lands_once_the_call_is_over(how):
    """The other side has sent half of a part by then, and sends the rest of it afterwards."""
    over = threading.Event()
    target = np.zeros(2 * HALF, np.uint8)

    def script(connection, reader):
        reader.receive()
        data = joined(frames.encode(frames.REPLY, PullReply().SerializeToString(), [np.ones(2 * HALF, np.uint8)]))
        connection.sendall(data[: len(data) - HALF])
        if how == "broken off":
            return
        over.wait(SECONDS)
        connection.sendall(data[len(data) - HALF :])

    async def body():
        peer = server.peer()
        try:
            asked = frames.encode(frames.PULL, b"question")
            seconds = 0.05 if how == "late" else SECONDS
            calling = asyncio.ensure_future(peer.call(asked, "m", seconds, lambda *_: [memoryview(target)]))
            if how == "cancelled":
                await until(lambda: target[HALF - 1])
                calling.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await calling
            else:
                error = await failure(calling)
                assert type(error) is (DeadlineExceeded if how == "late" else Unavailable)
            seen = target.copy()
            assert not seen[HALF:].any()
            over.set()
            await asyncio.wait_for(asyncio.to_thread(server.wait), SECONDS)
            assert np.array_equal(target, seen)
        finally:
            over.set()
            await peer.close()

    with scripted(script) as server:
        asyncio.run(body())


def test_room_that_cannot_be_made_fails_the_call_alone(server):
    def landing(reply, lengths):
        raise ZeroDivisionError

    async def body(transport):
        sent = asking(5000, np.zeros(5000, np.float32))
        with pytest.raises(ZeroDivisionError):
            await transport.call(
                server.address, "Shard.Pull", Bulk(sent.message, sent.parts, landing), timeout_seconds=SECONDS
            )
        assert await pull(transport, server.address, 9, values=2000) == 9

    run(body)


def test_what_comes_unasked_ends_the_connection():
    """Behind an answer, with it, or while nobody waits: it would be taken for the next answer."""
    told = threading.Event()

    def script(connection, reader):
        while True:
            asked = reader.receive().message
            answer = joined(frames.encode(frames.REPLY, asked))
            connection.sendall(answer + (answer if asked == b"1" else b""))
            if asked == b"2":
                told.wait(SECONDS)
                connection.sendall(answer)

    async def body():
        peer = server.peer()
        try:
            asked = {n: frames.encode(frames.PULL, b"%d" % n) for n in range(4)}
            assert (await peer.call(asked[0], "m", SECONDS)).message == b"0"
            error = await failure(peer.call(asked[1], "m", SECONDS))
            assert type(error) is Malformed
            assert "more came" in error.message
            assert (await peer.call(asked[2], "m", SECONDS)).message == b"2"
            (idle,) = peer._idle
            told.set()
            await until(lambda: idle.ended)
            assert (await peer.call(asked[3], "m", SECONDS)).message == b"3"
            assert len(server.connections) == 3
        finally:
            told.set()
            await peer.close()

    with scripted(script) as server:
        asyncio.run(body())


def test_what_comes_with_the_answer_to_hello_lets_nobody_in():
    def script(connection, reader):
        reader.receive()
        frames.send(connection, 2 * frames.encode(frames.REPLY, b""))
        reader.receive()

    async def body():
        peer = server.peer()
        try:
            assert await peer.call(frames.encode(frames.PULL, b"question"), "m", SECONDS) is None
            assert peer.absent
        finally:
            await peer.close()

    with scripted(script, hello=False) as server:
        asyncio.run(body())


def test_a_connection_that_ended_while_idle_fails_no_call():
    """The other side has sent it away, to make room for others: the loop sees that before anybody asks."""

    def script(connection, reader):
        frames.send(connection, frames.encode(frames.REPLY, reader.receive().message))

    async def body():
        peer = server.peer()
        try:
            for n in range(5):
                frame = await peer.call(frames.encode(frames.PULL, b"%d" % n), "m", SECONDS)
                assert frame.message == b"%d" % n
                await until(lambda: all(each.ended for each in peer._idle))
            assert len(server.connections) == 5
        finally:
            await peer.close()

    with scripted(script) as server:
        asyncio.run(body())
