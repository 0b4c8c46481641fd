# SPDX-License-Identifier: Apache-2.0
"""A rank of a hybrid job: its rows travel as under async, pulled ahead and applied as they come; its dense part as under sync.

    pull of rows           of the groups that come, ``prefetch`` of them between it and the push; caches are asked, nobody waits
    pull of dense values   of step t + 1 is the commit of step t, and waits until all ranks have committed that
    push of step t + 1     rows as (split, group), applied at once; dense blocks as (step, rank), staged

Invariant: step t is committed only once every block acknowledged both its rows and its dense part. So what any shard knows as
committed says that all rows up to it are applied everywhere, and a successor has one group to repeat, whatever was applied of
that. One event loop.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from oarlock.client.client import Pushing
from oarlock.client.stage import Commit
from oarlock.data.ranks import Unit
from oarlock.proto.coordinator_pb2 import TRAIN
from oarlock.worker.blame import Blame
from oarlock.worker.prepare import Prepared
from oarlock.worker.rank import AHEAD, Group, Groups, Opening, Rank
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit


class PulledGroups(Groups):
    """As Groups, with the rows of ``depth`` groups, from the one that was taken last on, pulled or on their way."""

    def __init__(
        self,
        session: Session,
        blame: Blame,
        units: Sequence[Unit | None],
        opening: Opening,
        depth: int,
        turn: Callable[[], int],
        observe: Callable[[float], None],
    ) -> None:
        super().__init__(session, blame, units, opening, max(AHEAD, depth))
        self._turn = turn
        self._observe = observe
        # Those who wait for it are served in the order in which they came.
        self._room = asyncio.Semaphore(depth - 1)
        self._pulling: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *arguments: object) -> None:
        # All are told before any of them is waited for: whoever waits here may be cancelled once more.
        pulling = list(self._pulling)
        for task in (self._task, *pulling):
            task.cancel()
        await super().__aexit__(*arguments)
        await asyncio.gather(*pulling, return_exceptions=True)

    async def next(self) -> Group:
        """As Groups.next: the one before it was pushed."""
        self._room.release()
        return await super().next()

    def _made(self, split: OpenSplit, number: int, prepared: Prepared) -> Group:
        pulling = asyncio.ensure_future(self._blame.of(TRAIN, split.id, self._pull(split, number, prepared)))
        self._pulling.add(pulling)
        pulling.add_done_callback(self._pulled)
        return Group(split, number, prepared, pulling)

    def _pulled(self, task: "asyncio.Task[None]") -> None:
        self._pulling.discard(task)
        if not task.cancelled():
            # Whoever waits for it has it; if its rank has ended before, it is no news.
            task.exception()

    async def _pull(self, split: OpenSplit, number: int, prepared: Prepared) -> None:
        await self._room.acquire()
        prepared.probe = self._session.probing.probe(self._turn())
        begun = time.perf_counter()
        about = {"split": split.id, "group": number}
        await self._session.pull(prepared, lossless=False, cached=True, dense=False, **about)
        self._observe(time.perf_counter() - begun)


class HybridRank(Rank):
    """Rank ``number`` of a hybrid job; ``turn()`` numbers the groups of all ranks of this worker."""

    _sums_rows = False

    def __init__(self, *arguments: Any, turn: Callable[[], int]) -> None:
        super().__init__(*arguments)
        self._turn = turn

    def _groups(self, units: Sequence[Unit | None]) -> Groups:
        depth, observe = self._spec.prefetch, self._progress.pull_seconds.observe
        return PulledGroups(self._session, self._blame, units, self._opening, depth, self._turn, observe)

    async def _pull_with(self, commit: Commit, group: Group) -> None:
        assert group.pulling is not None, "its rows are pulled since it was encoded"
        about = {"split": group.split.id, "group": group.number}
        await self._session.client.pull({}, {}, dense=group.prepared.dense, lossless=False, about=about, commit=commit)
        await group.pulling

    def _train(self, program: Any, group: Group, step: int) -> tuple[float, Pushing]:
        if group.prepared.probe is not None:
            group.prepared.excess = self._session.probing.excess(program, group.prepared)
        return super()._train(program, group, step)

    async def _computed(self, group: Group, step: int) -> tuple[float, Pushing]:
        found = await super()._computed(group, step)
        if group.prepared.probe is not None:
            self._session.probing.learn(group.prepared.probe, group.prepared.excess)
        return found
