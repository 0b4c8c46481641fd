# SPDX-License-Identifier: Apache-2.0
"""Exchange: send messages to the owners of blocks until every block was answered for.

Invariant: a block counts as answered only when its owner said so; the rest is cut anew by the newest placement and sent again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from oarlock.client.membership import Membership
from oarlock.client.router import Routes, ShardAddress
from oarlock.proto.errors import PSError, StalePlacement, Unavailable, WrongIncarnation


class Message(Protocol):
    """What goes to one shard in one request; ``numbers`` int32[m] are the blocks in it."""

    @property
    def shard(self) -> ShardAddress: ...

    @property
    def numbers(self) -> NDArray[np.int32]: ...


M = TypeVar("M", bound=Message)
T = TypeVar("T")
# Worked out once: annotations of a function within a function are at every call.
_Blocks = NDArray[np.int32]


# Owner of the blocks that a placement in the making gives to nobody yet.
NOBODY = ShardAddress(-1, "", 0)


def shard_of(routes: Routes, shard: int) -> ShardAddress:
    """Return where shard ``shard`` listens; NOBODY for the blocks without an owner, whose messages wait for a newer placement."""
    return routes.shards.get(shard, NOBODY)


def _mendable(error: PSError) -> bool:
    return error.retryable or isinstance(error, WrongIncarnation)


async def _all(asking: list[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    """Return all results, errors included. One alone, as in a job of one shard, needs no task of its own."""
    if len(asking) != 1:
        return await asyncio.gather(*asking, return_exceptions=True)
    try:
        return [await asking[0]]
    except Exception as error:
        return [error]


async def exchange(
    member: Membership,
    messages: list[M],
    send: Callable[[M, float], Awaitable[NDArray[np.int32]]],
    recut: Callable[[Routes, list[tuple[M, NDArray[np.int32]]]], list[M]],
) -> None:
    """Send ``messages``; ``send`` answers with the blocks that live elsewhere (none: done).

    ``recut(routes, left)`` makes new messages of the blocks left over from each message. The first error that neither a
    pause nor a newer placement can mend is raised, after all answers of the round came in.
    """
    retry = member.retry
    clock = asyncio.get_running_loop().time

    async def ask(message: M, timeout: float) -> _Blocks:
        if message.shard is NOBODY:
            raise Unavailable(f"block {int(message.numbers[0])} belongs to no shard yet", block=int(message.numbers[0]))
        return await send(message, timeout)

    end = clock() + retry.deadline_seconds
    pause = retry.first_seconds
    while True:
        timeout = max(0.001, min(retry.call_seconds, end - clock()))
        answers = await _all([ask(m, timeout) for m in messages])
        failed: PSError = StalePlacement("blocks kept moving")
        left = []
        for message, answer in zip(messages, answers, strict=True):
            if not isinstance(answer, BaseException):
                if len(answer):
                    left.append((message, answer))
            elif isinstance(answer, PSError) and _mendable(answer):
                failed = answer
                left.append((message, message.numbers))
            else:
                raise answer
        if not left:
            return
        if clock() + pause >= end:
            raise type(failed)(f"{failed} (given up after {retry.deadline_seconds:g} s)", **failed.details) from failed
        await asyncio.sleep(pause * (0.5 + member.rng.random() / 2))
        pause = min(retry.most_seconds, pause * 2)
        await member.refresh()
        assert member.routes is not None, "the messages were cut by a placement, and a placement only gets newer"
        messages = recut(member.routes, left)
