# SPDX-License-Identifier: Apache-2.0
"""The other side of `oarlock.benchmarks.rpc`: answers pulls and pushes with prepared messages, and TCP with bytes.

Invariant: it ends when its standard input closes; for every line on it, it prints the processor seconds that it has used.
"""

import json
import socket
import sys
import threading
import time

import numpy as np

from oarlock.proto.arrays import pack
from oarlock.proto.rpc import GrpcServer
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushReply, PushRequest

# Values in a row: NCF's.
ROW = 40


class Handler:
    """Knows nothing of parameters: what is left is the cost of the wire."""

    def __init__(self) -> None:
        self._values = np.ones((1 << 15, ROW), np.float32)

    def pull(self, request: PullRequest) -> PullReply:
        rows = [pack(self._values[: keys.keys.shape[0]]) for keys in request.tables]
        return PullReply(rows=rows, pushes=1)

    def push(self, request: PushRequest) -> PushReply:
        return PushReply(applied=len(request.tables))


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill ``into`` from the connection; return False if the other side has closed it."""
    at = 0
    while at < len(into):
        got = connection.recv_into(into[at:])
        if not got:
            return False
        at += got
    return True


def serve_tcp(listening: socket.socket) -> None:
    """Answer one connection: 16 bytes name two sizes, so many bytes come, so many go back."""
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = bytearray(16)
    buffer = memoryview(bytearray(4 << 20))
    with connection:
        while receive(connection, memoryview(head)):
            size, back = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
            if not receive(connection, buffer[:size]):
                return
            connection.sendall(buffer[:back])


def main() -> int:
    """Serve until standard input closes."""
    server = GrpcServer(Handler(), "Shard", listen="127.0.0.1:0")
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_tcp, args=(listening,), daemon=True).start()
    try:
        print(json.dumps([server.start(), listening.getsockname()[1]]), flush=True)
        for _ in sys.stdin:
            print(time.process_time(), flush=True)
    finally:
        listening.close()
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
