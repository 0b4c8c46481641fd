# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 spoken by hand, so that a test can stop in the middle of anything: RFC 9113 frames, RFC 7541 headers without a table.

Invariant: nothing is sent but what the test says. One thread.
"""

import contextlib
import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4


def frame(kind, flags, stream, payload=b"", *, length=None):
    """Return a frame; ``length`` is what it says of itself, by default the truth."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values):
    names = {"window": INITIAL_WINDOW_SIZE}
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", names[n], v) for n, v in values.items()))


def headers(stream, path, *, method="POST", kind="application/grpc", end=False):
    """Return the headers of a gRPC call."""
    pairs = {
        ":method": method,
        ":scheme": "http",
        ":path": path,
        ":authority": "x",
        "content-type": kind,
        "te": "trailers",
    }
    block = b""
    for name, value in pairs.items():
        # Literal, not indexed, new name, no Huffman code; each below 127 bytes.
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)


def message(data, *, length=None, compressed=0):
    """Return a gRPC message: flag, length, bytes."""
    return bytes([compressed]) + struct.pack(">I", len(data) if length is None else length) + data


class Connection:
    """A TCP connection to ``address`` on which ``window`` bytes of each answer are let through before it must wait."""

    def __init__(self, address, *, window=65535):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.send(PREFACE + settings(window=window))
        self._next = 1

    def send(self, data):
        # The other side may have closed it, which is its good right.
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def call(self, path, body=b"", *, end=False):
        """Begin a call and send the first bytes of its body; return the stream's number."""
        stream, self._next = self._next, self._next + 2
        # The frames that any peer takes, whatever it has told of itself.
        parts = [body[at : at + 16384] for at in range(0, len(body), 16384)] or ([b""] if end else [])
        frames = [frame(DATA, 0, stream, part) for part in parts[:-1]]
        frames += [frame(DATA, END_STREAM if end else 0, stream, part) for part in parts[-1:]]
        self.send(headers(stream, path) + b"".join(frames))
        return stream

    def read_all(self):
        """Return what comes until the other side closes."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := self.socket.recv(65536):
                found += part
        return found

    def frames(self, count):
        """Return the next ``count`` frames as (kind, flags, stream, payload)."""
        out = []
        while len(out) < count:
            head = self._exactly(9)
            out.append(
                (head[3], head[4], *struct.unpack(">I", head[5:]), self._exactly(int.from_bytes(head[:3], "big")))
            )
        return out

    def _exactly(self, size):
        found = b""
        while len(found) < size:
            part = self.socket.recv(size - len(found))
            if not part:
                raise ConnectionError("closed")
            found += part
        return found

    def settled(self):
        """Wait until the server has read all that was sent so far: it answers a ping in order."""
        self.send(frame(PING, 0, 0, b"12345678"))
        while True:
            ((kind, flags, _, payload),) = self.frames(1)
            if kind == PING and flags == ACK and payload == b"12345678":
                return

    def close(self):
        self.socket.close()
