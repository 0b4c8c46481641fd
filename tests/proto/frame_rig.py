# SPDX-License-Identifier: Apache-2.0
"""What the tests of the server's frames share: a handler that can be held, and connections made by hand.

A conftest loads it as ``frame_rig``.
"""

import asyncio
import contextlib
import threading

import numpy as np

from oarlock.proto import frames
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header, SocketsRequest
from oarlock.proto.errors import StalePlacement
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.rpc.sockets import ABSTRACT, connect
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply

SECONDS = 30


class Handler:
    """Answers a pull with its run and twice its dense array; all of them, or those that are held, wait for ``gate`` in the midst,
    and ``entered`` says so."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.held = None

    def hold(self, *runs):
        """Hold these runs, and no others, until somebody sets the gate."""
        self.held = set(runs)
        self.entered = threading.Semaphore(0)
        self.gate.clear()

    def pull(self, sent):
        request, parts = opened(sent)
        if self.held is None or request.header.run in self.held:
            self.entered.release()
            assert self.gate.wait(SECONDS)
        if request.number == 7:
            raise StalePlacement("moved", block=3)
        if request.number == 8:
            return Bulk(PullReply(), [np.zeros(MAX_MESSAGE_BYTES // 2, np.uint8)] * 3)
        beside = [] if isinstance(sent, Bulk) else None
        values = unpack(request.dense, np.float32, "dense", parts=parts)
        reply = PullReply(dense=pack(values * 2, beside), pushes=request.header.run)
        return reply if beside is None else Bulk(reply, beside)

    def push(self, sent):
        return PushReply(applied=opened(sent)[0].group)


def serve(handler, listen="127.0.0.1:0", **options):
    server = GrpcServer(handler, "Shard", listen=listen, **options)
    server.start()
    return server


def call(server, body):
    async def inside():
        transport = GrpcTransport()
        try:
            return await body(transport)
        finally:
            await transport.close()

    return asyncio.run(inside())


def offer_of(server):
    """Return what the server offers, asked once."""
    if server not in OFFERS:
        OFFERS.clear()
        OFFERS[server] = _ask(server)
    return OFFERS[server]


OFFERS = {}


def _ask(server):
    async def body(transport):
        request = SocketsRequest(protocol=PROTOCOL)
        return await transport.call(server.address, "Wire.Sockets", request, timeout_seconds=SECONDS)

    return call(server, body)


def answers(server):
    """A good client is served, over frames."""

    async def body(transport):
        values, beside = np.arange(3000, dtype=np.float32), []
        request = PullRequest(header=Header(run=5), dense=pack(values, beside))
        sent = Bulk(request, beside)
        reply, parts = opened(await transport.call(server.address, "Shard.Pull", sent, timeout_seconds=SECONDS))
        return len(parts) == 1 and np.array_equal(unpack(reply.dense, np.float32, "dense", parts=parts), values * 2)

    return call(server, body)


class Raw:
    """A connection made by hand."""

    def __init__(self, server, *, kind=ABSTRACT, token=None):
        offer = offer_of(server)
        (address,) = [a for a in offer.addresses if a.startswith(ABSTRACT) == (kind == ABSTRACT)]
        self.socket = connect(address, server.address)
        self.socket.settimeout(SECONDS)
        self.receiver = frames.Receiver(self.socket)
        if token is not False:
            # It may be sent away already.
            with contextlib.suppress(ConnectionError):
                self.send(frames.HELLO, offer.token if token is None else token)

    def send(self, kind, message=b"", parts=()):
        frames.send(self.socket, frames.encode(kind, message, parts))

    def in_(self):
        assert self.receiver.receive() == (frames.REPLY, b"", [])
        return self

    def pull(self, run=5, **fields):
        self.send(frames.PULL, PullRequest(header=Header(run=run), **fields).SerializeToString())

    def ended(self):
        """Whether the other side has closed it, and said nothing more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def let_in(server):
    """Return a connection; come again while the places are held by those that have not stalled for long enough."""
    while True:
        one = Raw(server)
        try:
            return one.in_()
        except (OSError, frames.Closed):
            one.socket.close()
