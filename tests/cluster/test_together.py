# SPDX-License-Identifier: Apache-2.0
"""Orders to several shards: whoever gave them goes on once all have ended, also if one failed."""

import ast
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oarlock.cluster import together
from oarlock.cluster.live_digest import digest_now
from oarlock.cluster.ranks import hold_still
from oarlock.cluster.rollback import roll_back
from oarlock.cluster.together import all_done
from oarlock.proto.errors import Unavailable
from oarlock.proto.shard_pb2 import RanksReply


class Slow:
    """Shard 0 fails at once, every other one ends some turns later; ``ended`` says which have."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    async def order(self, shard: Any, order: str, request: Any, seconds: float) -> Any:
        if not shard.id:
            raise Unavailable("not now")
        for _ in range(10):
            await asyncio.sleep(0)
        self.ended.append(shard.id)
        return RanksReply()


async def nothing(*_: Any) -> Any:
    return None


async def held(c: Any, slow: Slow) -> None:
    with pytest.raises(Unavailable, match="not now"):
        await hold_still(c, 1, slow.order)


async def rolled_back(c: Any, slow: Slow) -> None:
    c.rollbacks.ask("user", "/somewhere/cut-000004")
    await roll_back(c, slow.order, nothing)
    assert c.rollbacks.told()["failed"]["error"] == "not now"


async def digested(c: Any, slow: Slow) -> None:
    await digest_now(c, slow.order, nothing, lambda gate: nothing(), nothing)
    assert c.live_digest.found["error"] == "not now"


@pytest.mark.parametrize("giving", [held, rolled_back, digested], ids=lambda f: f.__name__)
def test_no_order_is_under_way_once_one_of_them_is_given_up(
    make_cluster: Callable[..., Any], giving: Callable[[Any, Slow], Awaitable[None]]
) -> None:
    cluster = make_cluster(servers=3, **({"mode": "sync", "ranks": 2} if giving is held else {}))
    cluster.shards()
    slow = Slow()

    async def body() -> list[int]:
        await giving(cluster.coordinator, slow)
        return list(slow.ended)

    assert sorted(asyncio.run(body())) == [1, 2]


def test_results_come_in_order_and_the_first_error_after_all() -> None:
    slow = Slow()
    shards = [SimpleNamespace(id=number) for number in (3, 0, 2)]

    async def echo(value: int) -> int:
        return value

    async def body() -> None:
        assert await all_done(map(echo, (3, 1, 2))) == [3, 1, 2]
        with pytest.raises(Unavailable, match="not now"):
            await all_done(slow.order(shard, "", None, 0) for shard in shards)
        assert slow.ended == [3, 2]

    asyncio.run(body())


def test_nothing_else_in_the_coordinator_goes_on_before_its_orders_have_ended() -> None:
    found = []
    for path in sorted(Path(together.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "gather":
                found.append(path.name)
                assert any(k.arg == "return_exceptions" for k in node.keywords), f"{path.name}:{node.lineno}"
    assert "together.py" in found
