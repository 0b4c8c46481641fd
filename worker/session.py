# SPDX-License-Identifier: Apache-2.0
"""Session: what a worker's training and its evaluation share, and the two steps that both take with a batch.

Invariant: encoding, reading and the sorter's scratch memory belong to the one thread of ``executor``; the program to the event
loop's thread.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.data.reader import Reader
from oarlock.nn import Program
from oarlock.worker.prepare import Prepared, Preparer
from oarlock.worker.recipe import Example, Workload

T = TypeVar("T")


class Session:
    """A member of a job with its recipe's workload, bound program, client and reader."""

    def __init__(
        self,
        workload: Workload,
        program: Program,
        client: Client,
        member: Membership,
        reader: Reader,
        executor: Executor,
    ) -> None:
        self.workload = workload
        self.program = program
        self.client = client
        self.member = member
        self.reader = reader
        self._executor = executor
        self._preparer = Preparer(workload.model, member.layout)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return ``function(*arguments)``, called in the reading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def encode(self, encode: Callable[[], Example]) -> Prepared:
        """Return the batch that ``encode`` makes, ready to be pulled."""
        routes = self.client.routes
        return await self.in_thread(lambda: self._preparer.prepare(encode(), routes))

    async def pull(self, prepared: Prepared, number: int = 0) -> Prepared:
        """Fill the batch with its rows and dense values. ``number``: of the group on the wire, under ssp."""
        prepared.seen = await self.client.pull(prepared.keys, prepared.rows, dense=prepared.dense, number=number)
        return prepared

    def load(self, prepared: Prepared) -> dict[str, Any]:
        """Put a batch's dense values into the program and return its feeds."""
        self.program.flat_parameters[:] = prepared.dense
        feeds: dict[str, Any] = dict(prepared.feeds)
        for lookup in self.workload.model.lookups:
            feeds[lookup.name] = (prepared.rows[lookup.table], prepared.inverse[lookup.name])
        return feeds
