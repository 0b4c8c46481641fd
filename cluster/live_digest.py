# SPDX-License-Identifier: Apache-2.0
"""The digest of a job that trains: of all blocks at one moment, which is a cut that is begun and never written.

Invariant: as a cut, so under sync all blocks are at one step, and in other modes each group is in all blocks or in none, but for
what a cut excepts. Nothing is on disk but the number, which is used up. Training goes on while shards add up. One event loop.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from oarlock.cluster.gate import Gate
from oarlock.cluster.moment import Moment
from oarlock.cluster.together import all_done
from oarlock.proto.errors import Malformed, PSError, Unavailable
from oarlock.proto.shard_pb2 import DigestRequest

if TYPE_CHECKING:
    from oarlock.client.router import ShardAddress
    from oarlock.cluster.coordinator import Coordinator

logger = logging.getLogger(__name__)

READ_SECONDS = 600.0
DIGEST_BYTES = 16

Ordered = Callable[["ShardAddress", str, Any, float], Awaitable[Any]]


class LiveDigest:
    """Whether one is ``wanted``, and the newest one that was ``found``, or came to nothing."""

    def __init__(self) -> None:
        self.wanted = False
        self.found: dict[str, Any] = {}


async def digest_now(
    c: "Coordinator",
    ordered: Ordered,
    gathered: Callable[[Gate], Awaitable[None]],
    begun: Callable[[Gate], Awaitable[Moment]],
    abort: Callable[[int], Awaitable[None]],
) -> None:
    """Find the digest that is wanted; what fails is told, and changes nothing."""
    with c.lock:
        c.live_digest.wanted = False
        gate = c.cuts.stand()
    try:
        await gathered(gate)
        moment = await begun(gate)
        value, rows = await _added(c, gate.cut, ordered)
        found = {"digest": f"{value:032x}", "rows": rows, "run": moment.run, "epoch": moment.epoch, "step": moment.step}
        c.live_digest.found = {"number": gate.cut, **found}
    except PSError as error:
        with c.lock:
            if c.cuts.gate is gate:
                c.cuts.open()
        c.live_digest.found = {"number": gate.cut, "error": str(error)}
    logger.info("event=live_digest %s", " ".join(f"{n}={v}" for n, v in c.live_digest.found.items()))
    await abort(gate.cut)


async def _added(c: "Coordinator", cut: int, ordered: Ordered) -> tuple[int, int]:
    shards = list(c.shards.values())
    replies = await all_done(ordered(s, "Digest", DigestRequest(cut=cut), READ_SECONDS) for s in shards)
    total = rows = 0
    for shard, reply in zip(shards, replies, strict=True):
        if reply.torn:
            raise Unavailable(f"a worker pushed to shard {shard.id} without waiting for its gate to open: ask again")
        if len(reply.digest) != DIGEST_BYTES:
            raise Malformed(f"shard {shard.id} told a digest of {len(reply.digest)} bytes, not {DIGEST_BYTES}")
        total += int.from_bytes(reply.digest, "big")
        rows += reply.rows
    return total % (1 << 8 * DIGEST_BYTES), rows
