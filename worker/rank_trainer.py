# SPDX-License-Identifier: Apache-2.0
"""The trainer of a job with ranks: hosts the ranks that the coordinator leases to this process, and evaluates between epochs.

Invariant: it hosts what it was last told to, and tells which ranks those are with every question and heartbeat; a rank that it
is to give up is left in the middle of whatever it did, which a successor does again: under sync to the bit. One event loop.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from oarlock.client.stage import News
from oarlock.data.ranks import RankPlan
from oarlock.proto.coordinator_pb2 import (
    EVALUATE,
    FINISHED,
    TRAIN,
    HeartbeatRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseRequest,
)
from oarlock.worker.hybrid import HybridRank
from oarlock.worker.rank import Rank, ended
from oarlock.worker.session import Session
from oarlock.worker.splits import OpenSplit
from oarlock.worker.trainer import Trainer

logger = logging.getLogger(__name__)


class RankTrainer(Trainer):
    """Trains the ranks that are leased to this worker, until the job needs no more."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        spec = self._spec
        self._steps = RankPlan(
            [split.rows for split in self._plan],
            seed=spec.seed,
            ranks=spec.ranks,
            epochs=spec.epochs,
            batch_rows=spec.batch_rows,
            accumulate=spec.accumulate,
        )
        self._news = News()
        turns = count()
        self._made: Callable[..., Rank] = (
            partial(HybridRank, turn=lambda: next(turns)) if spec.mode == "hybrid" else Rank
        )
        # By rank: the epoch that it trains, or has trained, here.
        self._hosted: dict[int, tuple[int, asyncio.Task[Exception | None]]] = {}

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "ranks": sorted(self._hosted)}

    async def _work(self) -> None:
        try:
            await self._host()
        finally:
            # All are told before any of them is waited for: whoever waits here may be cancelled once more.
            for _, task in self._hosted.values():
                task.cancel()
            # What they were about is done again by whoever hosts them next.
            await asyncio.gather(*(self._give_up(rank) for rank in list(self._hosted)))
        if self._evaluations:
            await self._member.call("Coordinator.Release", ReleaseRequest(evaluations=self._evaluations))

    async def _host(self) -> None:
        while not self._member.stopping.is_set():
            reply = await self._lease(1)
            if reply.work == TRAIN:
                await self._take(reply)
                await self._until_one_ends(reply.retry_seconds)
            elif reply.work == EVALUATE:
                await self._evaluate(reply)
            elif reply.work == FINISHED:
                break
            else:
                await self._pause(reply.retry_seconds)

    def _about(self, request: HeartbeatRequest | LeaseRequest) -> None:
        super()._about(request)
        # Ranks are held, and not the splits that they are about.
        del request.held[:]
        request.clock.active = False
        request.ranks.extend(sorted(self._hosted))

    async def _take(self, reply: LeaseReply) -> None:
        """Host the ranks of an answer, and no others."""
        wanted, epoch = set(reply.ranks), int(reply.epoch)
        for rank in [r for r in self._hosted if r not in wanted]:
            await self._give_up(rank)
        for rank in sorted(wanted):
            known = self._hosted.get(rank)
            if known is not None and (known[0] >= epoch or not known[1].done()):
                continue
            if known is not None:
                _raise(known[1])
            self._hosted[rank] = epoch, asyncio.ensure_future(self._train(rank, epoch))

    async def _train(self, rank: int, epoch: int) -> Exception | None:
        """Return the error that a rank met, if any: of several that end at once the first is raised, and no other is asked."""
        opened: list[OpenSplit] = []

        async def opening(split: int) -> OpenSplit:
            opened.append(await self._open_split(split, True))
            return opened[-1]

        made = self._made(
            rank, self._session, self._steps, self._blame, self.progress, self._news, opening, self._report
        )
        try:
            await made.train(epoch)
        except Exception as error:
            return error
        finally:
            for split in opened:
                self._open.pop(split.id, None)
        return None

    async def _report(self, split: OpenSplit) -> None:
        # Another rank's split that was opened here and given up may have had this one's place.
        self._open[split.id] = split
        await self._close(split)

    async def _give_up(self, rank: int) -> None:
        _, task = self._hosted.pop(rank)
        await ended(task)
        if not task.cancelled() and task.result() is not None:
            logger.info("event=rank_given_up rank=%d error=%s", rank, task.result())

    async def _until_one_ends(self, retry_seconds: float) -> None:
        """Wait until a rank has trained its epoch, or there may be something new to be told; raise what a rank met."""
        for _, task in self._hosted.values():
            _raise(task)
        running = [task for _, task in self._hosted.values() if not task.done()]
        stopping = asyncio.ensure_future(self._member.stopping.wait())
        # Its ranks are asked about now and then; without any, or once all are done, it waits for others.
        seconds = self._spec.heartbeat_seconds if running else retry_seconds
        try:
            await asyncio.wait([stopping, *running], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        for task in running:
            _raise(task)


def _raise(task: "asyncio.Task[Exception | None]") -> None:
    """Raise what a rank met, if it is over."""
    if task.done() and (error := task.result()) is not None:
        raise error
