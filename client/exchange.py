# SPDX-License-Identifier: Apache-2.0
"""Exchange: send messages to the owners of blocks until every block was answered for.

Invariant: a block counts as answered only when its owner said so; the rest is cut anew by the newest placement and sent again.
Blocks that moved are sent again at once where they are known to be, else after a few milliseconds; those of a shard that does not
answer after a pause that grows to a second, or once something newer is known of the placement.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

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


# How soon blocks on their way from one shard to another are asked for again: that takes a drain, a record and a message.
FIRST_SECONDS = 0.005
MOST_SECONDS = 0.05
# How long the coordinator's answer is waited for: it may be away, and a shard may know, too.
PATIENCE_SECONDS = 0.25


def _mendable(error: PSError) -> bool:
    return error.retryable or isinstance(error, WrongIncarnation)


class _Pause:
    """Seconds to wait, which double from ``first`` to ``most`` and are drawn from the upper half."""

    def __init__(self, rng: random.Random, first: float, most: float) -> None:
        self._rng = rng
        self._next = first
        self._most = most

    def draw(self) -> float:
        drawn = self._next * (0.5 + self._rng.random() / 2)
        self._next = min(self._most, self._next * 2)
        return drawn


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
    await _Exchange(member, messages, send, recut).run()


class _Exchange(Generic[M]):
    """One exchange, round by round; who does not answer holds up only what goes to itself."""

    def __init__(
        self,
        member: Membership,
        messages: list[M],
        send: Callable[[M, float], Awaitable[_Blocks]],
        recut: Callable[[Routes, list[tuple[M, _Blocks]]], list[M]],
    ) -> None:
        self._member = member
        self._messages = messages
        self._send = send
        self._recut = recut
        self._clock = asyncio.get_running_loop().time
        self._end = self._clock() + member.retry.deadline_seconds
        # Blocks that were not answered for, of which message, and when they are sent again.
        self._left: list[tuple[float, M, _Blocks]] = []
        self._moving = _Pause(member.rng, FIRST_SECONDS, MOST_SECONDS)
        self._silent = _Pause(member.rng, member.retry.first_seconds, member.retry.most_seconds)
        self._failed: PSError = StalePlacement("blocks kept moving")

    async def run(self) -> None:
        retry = self._member.retry
        while True:
            timeout = max(0.001, min(retry.call_seconds, self._end - self._clock()))
            answers = await _all([self._ask(m, timeout) for m in self._messages])
            self._judge(answers)
            if not self._left:
                return
            await self._wait()
            self._messages = self._recut(self._routes(), self._ready())

    async def _ask(self, message: M, timeout: float) -> _Blocks:
        if message.shard is NOBODY:
            named = f"block {int(message.numbers[0])} belongs" if len(message.numbers) else "some blocks belong"
            raise Unavailable(f"{named} to no shard yet")
        return await self._send(message, timeout)

    def _judge(self, answers: list[_Blocks | BaseException]) -> None:
        """Note what has to be sent again, and when; or raise what nothing can mend."""
        now = self._clock()
        moving: float | None = None
        silent: float | None = None
        for message, answer in zip(self._messages, answers, strict=True):
            if isinstance(answer, BaseException) and not (isinstance(answer, PSError) and _mendable(answer)):
                raise answer
            if isinstance(answer, PSError) and not isinstance(answer, StalePlacement):
                self._failed = answer
                silent = self._silent.draw() if silent is None else silent
                self._left.append((now + silent, message, message.numbers))
                continue
            if isinstance(answer, BaseException):
                self._failed, blocks = answer, message.numbers
            else:
                blocks = answer
                if not len(blocks):
                    continue
            known = self._elsewhere(message, blocks)
            if known.any() and isinstance(answer, BaseException):
                # The others may be where they were: nothing was said of them.
                known[:] = True
            if known.any():
                self._left.append((now, message, blocks[known]))
            if not len(blocks) or not known.all():
                moving = self._moving.draw() if moving is None else moving
                self._left.append((now + moving, message, blocks[~known]))

    async def _wait(self) -> None:
        """Wait until something is to be sent again, and ask for the placement by which; or give up."""
        due = min(due for due, _, _ in self._left)
        if due <= self._clock():
            return
        if due >= self._end:
            failed, seconds = self._failed, self._member.retry.deadline_seconds
            raise type(failed)(f"{failed} (given up after {seconds:g} s)", **failed.details) from failed
        while self._clock() < due and not any(self._elsewhere(*each[1:]).any() for each in self._left):
            await self._member.placement_changed(due - self._clock())
        if self._clock() >= due:
            await self._member.refresh(PATIENCE_SECONDS)

    def _ready(self) -> list[tuple[M, _Blocks]]:
        """Return what is to be sent now: what is due, and what is known to be elsewhere by now."""
        ready, left = [], []
        for due, message, blocks in self._left:
            if due <= self._clock():
                ready.append((message, blocks))
                continue
            known = self._elsewhere(message, blocks)
            if known.any():
                ready.append((message, blocks[known]))
            if not len(blocks) or not known.all():
                left.append((due, message, blocks[~known]))
        self._left = left
        return ready

    def _routes(self) -> Routes:
        assert self._member.routes is not None, "the messages were cut by a placement, and a placement only gets newer"
        return self._member.routes

    def _elsewhere(self, message: M, blocks: _Blocks) -> NDArray[np.bool_]:
        """Return bool[m]: which of the blocks are known to be with another shard than the one that was asked."""
        routes = self._routes()
        if routes.shards.get(message.shard.id, NOBODY) != message.shard:
            return np.ones(len(blocks), np.bool_)
        found: NDArray[np.bool_] = routes.owners[blocks] != message.shard.id
        return found
