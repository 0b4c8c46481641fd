# SPDX-License-Identifier: Apache-2.0
"""The other side of `oarlock.benchmarks.wire`: a shard whose table work is one copy, and raw sockets that do the same.

Invariant: it ends when its standard input closes; for every line on it, it prints the processor seconds that it has used. What
an exchange moves beside the rows (keys there, for a push a word back) is of the same size on both.
"""

import json
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import Part, pack, unpack, view_of
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.rpc.sockets import BUFFER_BYTES
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest

# 4 MiB of rows.
KEYS, DIM = 1 << 14, 64
# A raw request: its verb, and how many keys follow.
HEAD = struct.Struct("<II")
PULL, PUSH, PING = 0, 1, 2
# In flight at a time, each on a raw socket of its own.
FLIGHT = 4


class Handler:
    """Answers pulls and pushes of one table with one copy each: out of one array, or into it."""

    def __init__(self) -> None:
        self._table = np.ones((KEYS, DIM), np.float32)
        self._answers = Buffers(2 * FLIGHT)

    def pull(self, sent: PullRequest | Bulk) -> PullReply | Bulk:
        request, parts = opened(sent)
        beside: list[Part] | None = [] if isinstance(sent, Bulk) else None
        keys = unpack(request.tables[0].keys, np.uint64, "keys", parts=parts)
        rows = self._answers.copy(self._table[: len(keys)])
        reply = PullReply(rows=[pack(rows, beside)], pushes=1)
        return reply if beside is None else Bulk(reply, beside)

    def push(self, sent: PushRequest | Bulk) -> PushReply:
        request, parts = opened(sent)
        for table in request.tables:
            gradients = unpack(table.gradients, np.float32, "gradients", dims=2, columns=DIM, parts=parts)
            np.copyto(self._table[: len(gradients)], gradients)
        return PushReply(applied=len(request.tables))


def prepare(connection: socket.socket) -> None:
    """Set a raw socket up as one of ours is."""
    if connection.family == socket.AF_UNIX:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    else:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill ``into`` from the connection; return False if the other side has closed it."""
    at = 0
    while at < into.nbytes:
        got = connection.recv_into(into[at:], into.nbytes - at, socket.MSG_WAITALL)
        if not got:
            return False
        at += got
    return True


def send(connection: socket.socket, *buffers: memoryview) -> None:
    """Send them all in one call of the system, or more if it takes less."""
    left = list(buffers)
    while left:
        sent = connection.sendmsg(left)
        while left and sent >= left[0].nbytes:
            sent -= left.pop(0).nbytes
        if sent:
            left[0] = left[0][sent:]


def view(array: NDArray[Any]) -> memoryview:
    """Return an array's bytes."""
    return view_of(array)


def serve_raw(connection: socket.socket, table: NDArray[np.float32]) -> None:
    """Answer one raw connection until it closes."""
    prepare(connection)
    head = bytearray(HEAD.size)
    keys = np.empty(KEYS, np.uint64)
    rows = np.empty((KEYS, DIM), np.float32)
    with connection:
        while receive(connection, memoryview(head)):
            verb, count = HEAD.unpack(head)
            receive(connection, view(keys[:count]))
            if verb == PULL:
                np.copyto(rows[:count], table[:count])
                send(connection, memoryview(head), view(rows[:count]))
            elif verb == PUSH:
                receive(connection, view(rows[:count]))
                np.copyto(table[:count], rows[:count])
                send(connection, memoryview(head))
            else:
                send(connection, memoryview(head))


def accept(listening: socket.socket, table: NDArray[np.float32]) -> None:
    """Serve whoever connects, until the socket closes."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=serve_raw, args=(connection, table), daemon=True).start()


def main() -> int:
    """Serve until standard input closes."""
    server = GrpcServer(Handler(), "Shard", listen="127.0.0.1:0")
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    # The system chooses a name without a file.
    unix.bind("")
    unix.listen()
    table = np.ones((KEYS, DIM), np.float32)
    for listening in (tcp, unix):
        threading.Thread(target=accept, args=(listening, table), daemon=True).start()
    try:
        print(json.dumps([server.start(), tcp.getsockname()[1], unix.getsockname().decode("latin-1")]), flush=True)
        for _ in sys.stdin:
            print(time.process_time(), flush=True)
    finally:
        tcp.close()
        unix.close()
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
