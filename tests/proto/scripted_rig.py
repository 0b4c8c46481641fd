# SPDX-License-Identifier: Apache-2.0
"""What the tests of the client's frames share: servers made by hand.

A conftest loads it as ``scripted_rig``.
"""

import contextlib
import socket
import threading

from oarlock.proto import frames
from oarlock.proto.common_pb2 import SocketsReply
from oarlock.proto.rpc.frame_client import FramePeer
from oarlock.proto.rpc.sockets import ABSTRACT


class Scripted:
    """A server by hand: does ``script(connection)`` with every connection that said hello."""

    def __init__(self, script, *, hello=True):
        self._script = script
        self._hello = hello
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind("")
        self.listening.listen()
        self.offer = SocketsReply(addresses=[ABSTRACT + self.listening.getsockname()[1:].decode()], token=b"x")
        self.connections = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, frames.Closed), connection:
            reader = frames.Receiver(connection)
            if self._hello:
                reader.receive()
                frames.send(connection, frames.encode(frames.REPLY, b""))
            self._script(connection, reader)

    def peer(self):
        async def ask():
            return self.offer

        return FramePeer("scripted:1", ask)

    def wait(self):
        """Wait until the scripts of all connections are through."""
        for thread in self._threads[1:]:
            thread.join()

    def close(self):
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self._threads[0].join()
        for each in self.connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def scripted(script, **options):
    made = Scripted(script, **options)
    try:
        yield made
    finally:
        made.close()
