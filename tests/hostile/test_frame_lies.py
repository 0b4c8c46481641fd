# SPDX-License-Identifier: Apache-2.0
"""Frames that lie, connections that stop half way, and crowds of them: a clear error or a closed connection for each, bounded
threads, files and memory, and others are served meanwhile."""

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading

import mutate
import numpy as np
import ports
import pytest
from ports import beside, joined
from scripted_rig import scripted

from oarlock.proto import frames
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, unpack
from oarlock.proto.errors import Internal, Malformed, OutOfMemory, PSError, Unavailable
from oarlock.proto.rpc.status import from_failure
from oarlock.proto.shard_pb2 import PullReply

TURNS = 12


@pytest.fixture
def port():
    made = ports.Port()
    yield made
    made.stop()


@pytest.fixture
def dial(port):
    made = ports.Dialer(port)
    yield made
    made.close()


def pull_frame(port, kind=frames.PULL | frames.BESIDE):
    message = port.pull_request()
    parts = beside(message)
    return joined(frames.encode(kind, message.SerializeToString(), parts))


class Good:
    """A connection that always gets its answers, whatever others do."""

    def __init__(self, port, dial):
        self._connection, self._frame = dial(), pull_frame(port)
        self._receiver = frames.Receiver(self._connection)
        assert self._receiver.receive().kind == frames.REPLY

    def served(self):
        self._connection.sendall(self._frame)
        frame = self._receiver.receive()
        reply = PullReply.FromString(frame.message)
        rows = unpack(reply.rows[0], np.float32, "rows", dims=2, parts=frame.parts)
        return not reply.HasField("failure") and rows.shape == (40, 2) and not rows.any()


def answers_of(connection):
    """Return all answers until the other side closes: each an error, or None for a good one."""
    receiver, found = frames.Receiver(connection), []
    with contextlib.suppress(OSError, frames.Closed):
        while True:
            frame = receiver.receive()
            assert frame.kind == frames.REPLY
            reply = PullReply.FromString(frame.message)
            found.append(from_failure(reply.failure) if reply.HasField("failure") else None)
    return found


@pytest.mark.parametrize("lie", mutate.FRAME_LIES)
def test_a_frame_that_lies_between_two_good_ones(port, dial, lie, seed):
    """What comes before it is answered; of itself there is a clear answer, or the end; nobody else sees anything of it."""
    rng, good, whole = random.Random(seed), Good(port, dial), pull_frame(port)
    refused = ended = 0
    for turn in range(TURNS):
        data = mutate.frame_of(rng, pull_frame(port, frames.PULL | rng.choice((0, frames.BESIDE))), lie)
        one = dial(unix=bool(turn % 2))
        with contextlib.suppress(ConnectionError):
            one.sendall(whole + data + whole)
            # It may wait for more than there is.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_WR)
        assert good.served()
        # The hello, the frame before it, perhaps the lie, and, where all of that had its length, the frame behind.
        hello, *found = answers_of(one) or [None]
        assert hello is None
        errors = [error for error in found if error is not None]
        assert not any(isinstance(error, Internal) for error in errors), errors
        assert len(found) <= 3
        assert all(error.message for error in errors)
        refused += bool(errors)
        ended += len(found) < 3
    if lie in ("magic", "version", "garbage before", "cut"):
        assert ended == TURNS
    assert refused + ended > TURNS // 3
    assert port.trains(2)


@pytest.mark.parametrize("hello", [b"", b"OARF", b"\0" * 64, "version", "length", "token", "kind"])
def test_who_does_not_begin_as_agreed_hears_nothing(port, dial, hello):
    token = dial.offer.token
    right = bytearray(joined(frames.encode(frames.HELLO, token)))
    if hello == "token":
        right[-1] ^= 1
    elif hello == "version":
        right[4] += 1
    elif hello == "kind":
        right[5] = frames.PULL
    elif hello == "length":
        struct.pack_into("<II", right, 8, 1 << 20, 1 << 20)
    data = bytes(right) if isinstance(hello, str) else hello
    good = Good(port, dial)
    for unix in (True, False):
        one = dial(unix=unix, hello=False)
        with contextlib.suppress(OSError):
            one.sendall(data + pull_frame(port))
            one.shutdown(socket.SHUT_WR)
        assert answers_of(one) == []
        assert good.served()


def reset(connection):
    """End it as a machine does that lost power, once it is back: without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("unix", [True, False])
def test_half_open_connections_give_everything_back(port, dial, unix, seed):
    """They close one direction, or are reset: at a hello, in a head, in a body, while their answer is made or sent."""
    rng, good, whole = random.Random(seed), Good(port, dial), pull_frame(port)
    for turn in range(60):
        one = dial(unix=unix, hello=turn % 5 > 0)
        with contextlib.suppress(OSError):
            one.sendall(whole[: rng.choice((0, 7, 20, 60, len(whole) - 1, len(whole)))])
            if turn % 3 == 0:
                reset(one)
            else:
                one.shutdown(socket.SHUT_WR if turn % 3 == 1 else socket.SHUT_RD)
        assert good.served()
    dial.made[0], others = dial.made[0], dial.made[1:]
    for one in others:
        one.close()
    wait_until(lambda: port.server.open_calls()["frames"] == 1)
    assert good.served()
    assert not port.server.memory.nbytes["received"]


def test_a_request_whose_sender_says_nothing_more_is_answered(port, dial):
    one = dial()
    one.sendall(pull_frame(port) * 3)
    one.shutdown(socket.SHUT_WR)
    assert answers_of(one) == [None] * 4


def wait_until(condition, seconds=30):
    """Wait for what other threads do."""

    async def body():
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.001)

    asyncio.run(body())


def test_who_writes_byte_by_byte_keeps_nobody_out():
    """Thirty of them, on a server of twelve places, each in the midst of the largest frame that there can be."""
    port = ports.Port(threads=16, stall_seconds=0.05)
    dial = ports.Dialer(port)
    try:
        before, most = ports.resident(), 0
        head = frames._HEAD.pack(b"OARF", 1, frames.PUSH, 0, 1000, MAX_MESSAGE_BYTES, 0)
        slow = [dial(unix=bool(i % 2)) for i in range(30)]
        for turn in range(40):
            for one in slow:
                with contextlib.suppress(OSError):
                    one.sendall(head[turn : turn + 1] or b"x")
            most = max(most, port.server.memory.nbytes["received"])
            if turn % 8 == 0:
                assert port.trains(1)
        assert most <= port.server.memory.received.limit
        assert ports.resident() - before < 100 << 20
        assert port.trains(2)
    finally:
        dial.close()
        port.stop()


def open_files():
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def open_files_beside_a_loop():
    return open_files()


def serving():
    """Return how many threads there are for frames."""
    return sum(thread.name == "oarlock-frames" for thread in threading.enumerate())


def test_a_crowd_that_comes_and_goes_takes_no_more_threads_than_places(seed):
    port = ports.Port(threads=16, stall_seconds=0.02)
    dial = ports.Dialer(port)
    rng, most = random.Random(seed), 0
    try:
        assert port.trains(1)
        files = asyncio.run(open_files_beside_a_loop())
        for turn in range(600):
            with contextlib.suppress(OSError):
                one = dial(unix=bool(turn % 2), hello=rng.random() < 0.5)
                if rng.random() < 0.3:
                    one.sendall(b"OARF" + rng.randbytes(rng.randrange(30)))
            if rng.random() < 0.5 and dial.made:
                dial.made.pop(rng.randrange(len(dial.made))).close()
            if turn % 100 == 0:
                most = max(most, serving())
                assert port.trains(1)
        dial.close()
        wait_until(lambda: port.server.open_calls()["frames"] == 0)
        # One of them lets newcomers in; another one may be about to end.
        assert most <= 16 + 2
        wait_until(lambda: open_files() <= files)
        assert port.trains(2)
    finally:
        dial.close()
        port.stop()


QUESTION = [memoryview(b) for b in frames.encode(frames.PULL, b"question")]
ANSWER = joined(frames.encode(frames.REPLY, b"answer", [b"a" * 1000, b"b" * 500, b""]))


def test_a_server_whose_answers_lie_is_believed_in_nothing(seed):
    """A clear error, or a frame of which every byte had come; the next call is made on another connection and is good."""
    rng = random.Random(seed)
    scripts = []

    def script(connection, receiver):
        while True:
            receiver.receive()
            data, last = scripts.pop(0)
            connection.sendall(data)
            if last:
                return

    async def body():
        peer = server.peer()
        failed = []
        try:
            for lie in mutate.FRAME_LIES * 12:
                data = mutate.frame_of(rng, ANSWER, lie)
                scripts[:] = [(data, True)]
                try:
                    frame = await peer.call(QUESTION, "m", 30)
                    # Its parts end where it said that it does.
                    again = joined(frames.encode(frame.kind, frame.message, frame.parts))
                    assert again[12:16] == data[12:16]
                except PSError as error:
                    failed.append(error)
                scripts[:] = [(ANSWER, False), (ANSWER, True)]
                # What came behind an answer that was whole is the next one's loss: that connection is over.
                frame = await called(peer)
                assert (frame.message, [len(p) for p in frame.parts]) == (b"answer", [1000, 500, 0])
        finally:
            await peer.close()
        return failed

    async def called(peer):
        try:
            return await peer.call(QUESTION, "m", 30)
        except (Unavailable, Malformed):
            scripts[:] = [(ANSWER, True)]
            return await peer.call(QUESTION, "m", 30)

    with scripted(script) as server:
        failed = asyncio.run(body())
    assert len(failed) > 60
    assert all(error.message for error in failed)
    assert {type(error) for error in failed} <= {Malformed, Unavailable, OutOfMemory}
