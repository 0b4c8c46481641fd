# SPDX-License-Identifier: Apache-2.0
"""The transport seam: one method, `call`. Here its in-process form; the gRPC form is in rpc.py.

Invariant: a handler sees one whole message and answers with one whole message or raises a PSError, at once or (a Pending) later;
a transport delivers exactly that to the caller. Handlers are called from many threads at once.
"""

import asyncio
import contextlib
from concurrent.futures import Executor
from threading import Lock
from typing import Any, Protocol

from google.protobuf.message import Message

from oarlock.proto.bulk import Bulk
from oarlock.proto.errors import DeadlineExceeded, Internal, NotFound, OutOfMemory, PSError, Unavailable
from oarlock.proto.methods import METHODS
from oarlock.proto.pending import Pending


class Transport(Protocol):
    """How a request reaches the process at an address."""

    async def call(self, address: str, method: str, request: Message | Bulk, *, timeout_seconds: float) -> Any:
        """Return the reply, or raise the PSError that the handler raised; DeadlineExceeded after the timeout."""

    async def close(self) -> None:
        """Give back connections; idempotent."""


def dispatch(handler: object, method: str, request: Message | Bulk) -> Message | Bulk | Pending:
    """Answer ``request`` by the handler's function of the method's name; any other exception becomes Internal.

    A Pending is passed on as it is: who delivers the answer waits for it.
    """
    answer = getattr(handler, METHODS[method].attribute, None) if method in METHODS else None
    if answer is None:
        raise NotFound(f"this process does not answer {method}", method=method)
    try:
        reply: Message | Bulk | Pending = answer(request)
    except PSError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{method}: this process is out of memory") from error
    except Exception as error:
        raise Internal(f"{method} failed: {type(error).__name__}: {error}", method=method) from error
    return reply


class InProcess:
    """Calls handlers of this process directly: no bytes are made, messages are passed as they are.

    A message is not changed after it was sent, and an answer not after it was returned. What takes long is answered in a
    thread of ``executor``, if there is one, and by the caller otherwise.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._handlers: dict[str, object] = {}
        self._executor = executor
        self._lock = Lock()

    def serve(self, handler: object, address: str) -> str:
        with self._lock:
            self._handlers[address] = handler
        return address

    def stop(self, address: str) -> None:
        with self._lock:
            self._handlers.pop(address, None)

    async def call(self, address: str, method: str, request: Message | Bulk, *, timeout_seconds: float) -> Any:
        handler = self._handlers.get(address)
        if handler is None:
            raise Unavailable(f"nothing answers at {address}", address=address)
        if self._executor is not None and METHODS[method].slow:
            loop = asyncio.get_running_loop()
            reply = await loop.run_in_executor(self._executor, dispatch, handler, method, request)
        else:
            reply = dispatch(handler, method, request)
        if isinstance(reply, Pending):
            return await _awaited(reply, f"{method} at {address}", timeout_seconds)
        return reply

    async def close(self) -> None:
        self._handlers.clear()


async def _awaited(pending: Pending, named: str, seconds: float) -> Any:
    """Return the answer once it is there, whatever thread gives it; DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    there = asyncio.Event()

    def tell() -> None:
        # The loop may be over: then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(there.set)

    pending.add_done_callback(tell)
    try:
        async with asyncio.timeout(seconds):
            await there.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"{named}: no answer in time") from None
    finally:
        pending.remove_done_callback(tell)
    return pending.result()
