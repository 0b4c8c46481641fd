# SPDX-License-Identifier: Apache-2.0
"""Session: what a worker's training and its evaluation share, and the steps that both take with a batch.

Invariant: encoding, reading and the sorter's scratch memory belong to the one thread of ``executor``; a program to whoever
borrowed it, who computes with it in one of the compute threads, or, without any, on the event loop.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from oarlock.client.caches import Caches
from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.data.reader import Reader
from oarlock.nn import Program
from oarlock.worker.hop import Hop
from oarlock.worker.prepare import Prepared, Preparer
from oarlock.worker.probing import Probing
from oarlock.worker.recipe import Example, Workload

T = TypeVar("T")

# What takes less of the processor's time is done on the event loop: pulls and pushes wait for it, but less than it saves.
COMPUTE_HERE_SECONDS, ENCODE_HERE_SECONDS = 0.0015, 0.0003


class Session:
    """A member of a job with its recipe's workload, bound program, client and reader."""

    def __init__(
        self,
        workload: Workload,
        programs: Sequence[Program],
        client: Client,
        member: Membership,
        reader: Reader,
        executor: Executor,
        computing: Executor | None = None,
    ) -> None:
        self.workload = workload
        self._programs: asyncio.Queue[Program] = asyncio.Queue()
        for program in programs:
            self._programs.put_nowait(program)
        # Without threads to compute in, what happens must not hang on how long anything takes.
        threads = isinstance(computing, ThreadPoolExecutor)
        self._computing = Hop(computing, COMPUTE_HERE_SECONDS if threads else 0.0) if computing is not None else None
        self._encoding = Hop(executor, ENCODE_HERE_SECONDS if threads else 0.0)
        self.client = client
        self.member = member
        self.reader = reader
        self._executor = executor
        self._preparer = Preparer(workload.model, member.layout)
        # Rows that training keeps from batch to batch. What an evaluation finds does not depend on who keeps what.
        self.caches = Caches(member.layout.tables)
        self.probing = Probing(self.caches, workload.model.lookups)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return ``function(*arguments)``, called in the reading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def compute(self, function: Callable[[], T]) -> T:
        """Return ``function()``, called in a compute thread; on the event loop if there is none, or if it takes no time."""
        return function() if self._computing is None else await self._computing.call(function)

    async def borrow(self) -> Program:
        """Wait for a program that nobody uses; to be given back."""
        return await self._programs.get()

    def give_back(self, program: Program) -> None:
        self._programs.put_nowait(program)

    async def encode(self, encode: Callable[[], Sequence[Example]], **about: int) -> Prepared:
        """Return the group of the batches that ``encode`` makes, ready to be pulled. ``about``: which, as a trace shows it."""
        routes, stages = self.client.routes, self.client.stages

        def prepare() -> Prepared:
            with stages.time("encode", **about):
                examples = encode()
            with stages.time("dedup", **about):
                return self._preparer.prepare(examples, routes)

        return await self._encoding.call(prepare)

    async def pull(
        self,
        prepared: Prepared,
        number: int = 0,
        *,
        lossless: bool = True,
        cached: bool = False,
        dense: bool = True,
        **about: int,
    ) -> Prepared:
        """Fill the group with its rows, and its dense values if ``dense``, in the job's forms unless ``lossless``.

        ``number``: of the group on the wire, under ssp. ``cached``: rows that are kept and new enough need not come.
        """
        caches = (prepared.probe or self.caches) if cached and self.caches.of else None
        prepared.seen = await self.client.pull(
            prepared.keys,
            prepared.rows,
            dense=prepared.dense if dense else None,
            number=number,
            lossless=lossless,
            caches=caches,
            about=about,
        )
        return prepared
