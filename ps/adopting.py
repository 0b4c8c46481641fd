# SPDX-License-Identifier: Apache-2.0
"""Adopting: records of blocks, as the coordinator tells them, become what this shard is to those blocks.

    the record's owner is    this shard                           another one, with a copy here      another one, without
    nothing here             made, if nobody has it; else told    the same                           nothing to do
    a copy                   opened                               goes on, under the new record      let go
    owned                    goes on, with these members          a copy from now on                 let go

Invariant: a record that is not newer than what is known of its block changes nothing, so they may be told twice and in any order.
An order that fails leaves the shard as it was, ready for the same order again. Orders come from the coordinator, any thread; the
push lock is held throughout.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import ClosedSet
from oarlock.client.router import Changes
from oarlock.proto.coordinator_pb2 import LACKING
from oarlock.proto.errors import InvalidArgument
from oarlock.ps.blocks import create_all, drop
from oarlock.ps.closing import give
from oarlock.ps.holdings import Numbers
from oarlock.ps.shard import Shard

logger = logging.getLogger(__name__)


def adopt(
    shard: Shard,
    me: int,
    told: Changes,
    closed: ClosedSet,
    restore: str = "",
    *,
    create: Numbers | None = None,
    complete: bool = True,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Be to each block what its record says shard ``me`` is.

    ``create``: blocks that no shard has; those that are wanted here are made, from the checkpoint ``restore``, or with what the
    job's warm start takes over, or with first values. None: all that are new here. ``complete``: no record newer than
    ``told.since`` is missing. ``options``: of the checkpoint's file system.
    """
    holdings = shard.holdings
    with shard.push_lock:
        if told.whole and told.generation < shard.generation:
            raise InvalidArgument(f"generation {told.generation} is older than this shard's {shard.generation}")
        first = not shard.generation
        newer = told.only(told.generations > holdings.generations[told.blocks])
        numbers = newer.blocks
        mine, member = newer.owners == me, (newer.members == me).any(axis=1)
        wanted, here = mine | member, holdings.here[numbers]
        made = wanted & ~here
        if create is not None:
            made &= np.isin(numbers, create)
        create_all(shard, numbers[made].tolist(), restore, options)
        if restore and first:
            # A restore replaces the closed set: splits closed in the abandoned history are open again.
            shard.closed = ClosedSet()
        shard.closed.merge(closed)
        shard.marks.drop_closed(shard.closed)
        holdings.shards = {**holdings.shards, **told.shards}
        holdings.generations[numbers] = newer.generations
        holdings.owners[numbers] = newer.owners
        holdings.here[numbers[made]] = True
        here = here | made
        _lead(shard, me, newer.only(mine & here))
        _leave(shard, numbers[~mine], numbers[~wanted & here])
        shard.hush()
        lacking = numbers[wanted & ~here]
        shard.reports.add(LACKING, lacking, holdings.generations[lacking])
        if complete and told.since <= shard.generation:
            shard.generation = max(shard.generation, told.generation)
        if first:
            shard.unbroken = shard.generation
        owned = int(holdings.owned.sum())
        kept = shard.closing.ended()
    give(kept)
    shard.leading.wake()
    logger.info(
        "event=adopted generation=%d told=%d newer=%d made=%d blocks=%d",
        told.generation,
        len(told.blocks),
        len(numbers),
        int(made.sum()),
        owned,
    )


def _lead(shard: Shard, me: int, records: Changes) -> None:
    """Own blocks whose content is here, with the members that their records name."""
    holdings, numbers = shard.holdings, records.blocks
    shard.feed.opened(numbers[~holdings.leads[numbers]])
    for number in [n for n in numbers.tolist() if n in holdings.closed]:
        del holdings.closed[number]
    if not len(numbers):
        return
    found = {}
    for other in np.setdiff1d(records.members, np.array([-1, me], np.int32)).tolist():
        if other in holdings.shards:
            found[other] = (holdings.shards[other], numbers[(records.members == other).any(axis=1)])
    if found:
        shard.tell()
    shard.leading.lead(found, numbers)
    holdings.owned[numbers] = True


def _leave(shard: Shard, others: Numbers, gone: NDArray[np.int32]) -> None:
    """Own ``others`` no more, and let go the content of ``gone``."""
    holdings = shard.holdings
    if len(others):
        shard.feed.left(others)
        holdings.owned[others] = False
        for number in [n for n in others.tolist() if n in holdings.closed]:
            del holdings.closed[number]
        shard.leading.let_go(others)
    for number in gone.tolist():
        drop(shard, number)
    holdings.here[gone] = False
