# SPDX-License-Identifier: Apache-2.0
"""Where a client's frames travel: which of the offered sockets it reaches, and gRPC where it reaches none."""

import asyncio
import socket

import pytest
from client_rig import by_frames, pull, run
from frame_rig import serve

from oarlock.proto.errors import Malformed
from oarlock.proto.rpc import GrpcTransport, connection, sockets
from oarlock.proto.rpc.sockets import ABSTRACT, connect


class Offering(GrpcTransport):
    """Changes what is offered."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    async def call(self, address, method, request, **options):
        reply = await super().call(address, method, request, **options)
        if method == "Wire.Sockets":
            found = self._change(list(reply.addresses))
            del reply.addresses[:]
            reply.addresses.extend(found)
        return reply


def offered(server, change):
    async def inside():
        transport = Offering(change)
        try:
            await asyncio.gather(*(pull(transport, server.address, n, values=1000) for n in range(1, 10)))
            return by_frames(server)
        finally:
            await transport.close()

    return asyncio.run(inside())


def test_tcp_where_the_abstract_one_cannot_be_reached(server):
    """As from another host or network namespace."""
    connections, streams = offered(server, lambda found: [ABSTRACT + "elsewhere", found[1]])
    assert (connections >= 1, streams) == (True, 0)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [ABSTRACT + "elsewhere", ":1"],
        [ABSTRACT, ABSTRACT + "x" * 200, ABSTRACT + "\0" * 10],
        ["", ":", ":99999", ":x", "unix:/x", ":\u0665\u00b2", "[::1]:1", "no such host:1"],
    ],
    ids=["none", "refused", "odd names", "odd addresses"],
)
def test_grpc_where_no_socket_can_be_reached(server, found):
    assert offered(server, lambda _: found) == (0, 1)


def test_few_addresses_are_tried(server, monkeypatch):
    """A server that offers a million keeps nobody busy."""
    tried = []

    def refuse(address, *called):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(sockets, "connect", refuse)
    assert offered(server, lambda _: [f":{n}" for n in range(1, 1000)]) == (0, 1)
    assert len(tried) == connection.MAX_ADDRESSES


def test_a_server_without_frames_is_called_by_grpc(handler):
    server = serve(handler, frames=False)
    try:
        assert offered(server, lambda found: found) == (0, 1)
    finally:
        server.stop(0)


def test_a_client_without_frames_calls_by_grpc(server):
    async def body(transport):
        await pull(transport, server.address, values=1000)
        return by_frames(server)

    assert run(body, frames=False) == (0, 1)


@pytest.mark.parametrize(
    ("address", "called", "host"),
    [
        (":5", "10.0.0.1:7", "10.0.0.1"),
        (":5", "[::1]:7", "::1"),
        (":5", "unixbox.example:7", "unixbox.example"),
        (":65535", "unix:7", None),
        (":5", "unix:/tmp/a:b", None),
        (":65536", "h:7", None),
        (":-1", "h:7", None),
        ("", "h:7", None),
    ],
)
def test_where_an_offer_leads(monkeypatch, address, called, host):
    asked = []

    def create(where, timeout):
        asked.append((where[0], timeout))
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(Malformed if host is None else ConnectionRefusedError):
        connect(address, called)
    assert asked == ([] if host is None else [(host, sockets.CONNECT_SECONDS)])


@pytest.fixture
def ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.usefixtures("ipv6")
def test_ipv6(handler):
    server = serve(handler, "[::1]:0")
    try:
        assert offered(server, lambda found: [a for a in found if not a.startswith(ABSTRACT)])[1] == 0
    finally:
        server.stop(0)
