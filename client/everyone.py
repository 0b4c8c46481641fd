# SPDX-License-Identifier: Apache-2.0
"""Everyone: one question to all shards, while shards come, die, and hand blocks to each other.

Invariant: each shard of the newest placement has answered, and whoever got blocks of the ones before has done so since. A shard
that is in the placement no more is not waited for. One event loop.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from oarlock.client.exchange import exchange
from oarlock.client.membership import Membership
from oarlock.client.router import Routes, ShardAddress

T = TypeVar("T")
_NONE = np.empty(0, np.int32)
# Annotations of a function within a function are worked out at every call: names cost less there.
_Blocks = NDArray[np.int32]


@dataclass(frozen=True)
class _Question:
    shard: ShardAddress
    numbers: NDArray[np.int32] = field(default_factory=lambda: _NONE)


async def ask_everyone(
    member: Membership, routes: Routes, ask: Callable[[ShardAddress, float], Awaitable[T]]
) -> list[T]:
    """Return all answers that ``ask(shard, timeout_seconds)`` got; the first error that nothing can mend is raised."""
    answers: list[T] = []

    async def send(question: _Question, timeout: float) -> _Blocks:
        answers.append(await ask(question.shard, timeout))
        return _NONE

    def recut(newer: Routes, left: list[tuple[_Question, _Blocks]]) -> list[_Question]:
        return [question for question, _ in left if is_there(newer, question.shard)]

    asked: set[ShardAddress] = set()
    before = routes
    while True:
        got = set(np.unique(routes.owners[routes.owners != before.owners]).tolist())
        asking = [s for s in routes.shards.values() if s not in asked or s.id in got]
        if not asking:
            return answers
        await exchange(member, [_Question(shard) for shard in asking], send, recut)
        asked.update(asking)
        before, routes = routes, member.routes or routes


def is_there(routes: Routes, shard: ShardAddress) -> bool:
    """Tell whether a shard, in the life that is meant, is still one of the placement."""
    return routes.shards.get(shard.id) == shard
