# SPDX-License-Identifier: Apache-2.0
"""Together: orders that go to several shards at once. One event loop.

Invariant: whoever goes on has no order under way any more, also if one of them failed: what it does next is not overtaken.
"""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def all_done(asking: Iterable[Awaitable[T]]) -> list[T]:
    """Return all results in order; the first error is raised once all are done."""
    results = await asyncio.gather(*asking, return_exceptions=True)
    found: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
