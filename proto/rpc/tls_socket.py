# SPDX-License-Identifier: Apache-2.0
"""Sockets of frames over TLS: what frames ask of a socket, from one whose bytes are encrypted on the way.

Invariant: nothing leaves or is taken in the clear, also when another thread ends the socket meanwhile: `shutdown` is the bare
socket's, and TLS stays. Who does not wait gets BlockingIOError, which changes nothing: the same bytes are then sent again. There
is one handshake, so a read never waits until something can be written, nor the other way about. One thread at a time, but for
`shutdown`, `getsockopt` and bare peeks.
"""

import math
import socket
import ssl
import time
from typing import Any

# One record of TLS; less than that goes together with what follows, since each has a head, a seal and calls of the system.
RECORD_BYTES = 1 << 14
# Bytes that are taken in before the loop's others have their turn.
TURN_BYTES = 1 << 20
_OTHER_WAY = "the other side wants another handshake"


class TlsSocket(ssl.SSLSocket):
    """Made by `wrapped`; its handshake is its user's to make."""

    def sendmsg(self, buffers: Any, *_: Any) -> int:  # type: ignore[override]
        """Send some of the buffers' bytes; return how many. OSError."""
        try:
            return int(self.write(_gathered(buffers)) or 0)
        except ssl.SSLWantWriteError:
            raise BlockingIOError from None
        except ssl.SSLWantReadError:
            raise ConnectionAbortedError(_OTHER_WAY) from None
        except ValueError as error:
            raise ConnectionAbortedError(f"the connection was ended: {error}") from None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Take in some bytes (with MSG_WAITALL: as many as there is room for, or as come in time); 0: no more come. OSError."""
        view = memoryview(buffer)[: nbytes or None]
        seconds = self.gettimeout()
        until = math.inf if seconds is None else time.monotonic() + seconds
        got = self._some(view)
        while got and flags & socket.MSG_WAITALL and got < view.nbytes and time.monotonic() < until:
            more = self._some(view[got:])
            if not more:
                break
            got += more
        return got

    def recvmsg_into(self, buffers: Any, *_: Any) -> Any:  # type: ignore[override]
        """Take in what is there, TURN_BYTES at most; return how many bytes came, first. OSError."""
        total = 0
        for view in buffers:
            at = 0
            while at < view.nbytes and total < TURN_BYTES:
                try:
                    got = self._some(view[at:])
                except BlockingIOError:
                    if not total:
                        raise
                    got = 0
                if not got:
                    return total, [], 0, None
                at += got
                total += got
        return total, [], 0, None

    def _some(self, view: memoryview) -> int:
        try:
            return self.read(view.nbytes, view)  # type: ignore[return-value]
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            raise ConnectionAbortedError(_OTHER_WAY) from None
        except ValueError as error:
            raise ConnectionAbortedError(f"the connection was ended: {error}") from None

    def shutdown(self, how: int) -> None:
        """End one way or both. The base class would go on without TLS."""
        socket.socket.shutdown(self, how)


def _gathered(buffers: Any) -> memoryview:
    """Return what one call is to encrypt: a long buffer as it is, short ones as one record."""
    first: memoryview = buffers[0]
    if first.nbytes >= RECORD_BYTES or len(buffers) == 1:
        return first
    out = bytearray()
    for view in buffers:
        out += view[: RECORD_BYTES - len(out)]
        if len(out) == RECORD_BYTES:
            break
    return memoryview(out)


def wrapped(connection: socket.socket, context: ssl.SSLContext, *, name: str | None = None) -> TlsSocket:
    """Return ``connection`` with TLS, whose handshake is still to be made: a client's if it gives the server's ``name``. OSError;
    ``connection`` is closed or taken over in any case."""
    context.sslsocket_class = TlsSocket
    made = context.wrap_socket(
        connection, server_side=name is None, do_handshake_on_connect=False, server_hostname=name
    )
    assert isinstance(made, TlsSocket), "of the context's class"
    return made


def ahead(connection: socket.socket) -> int:
    """Return how many bytes have come already that the system does not tell of."""
    return connection.pending() if isinstance(connection, TlsSocket) else 0
