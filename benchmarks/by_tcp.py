# SPDX-License-Identifier: Apache-2.0
"""Frames by TCP, though both sides are on one machine: as between two of them, where TLS is for.

Invariant: what connects within `as_from_another_machine` goes by TCP, and stays so; all else is left as it was. One caller at
a time.
"""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

from oarlock.proto.rpc import sockets


@contextlib.contextmanager
def as_from_another_machine() -> Iterator[None]:
    """Have connections of frames made by TCP: to a process of another machine the names of this one's sockets lead nowhere."""
    connect = sockets.connect

    def by_tcp(address: str, *called: Any) -> socket.socket:
        if address.startswith(sockets.ABSTRACT):
            raise ConnectionRefusedError("of this machine alone")
        return connect(address, *called)

    with mock.patch.object(sockets, "connect", by_tcp):
        yield
