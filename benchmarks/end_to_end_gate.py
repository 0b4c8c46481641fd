# SPDX-License-Identifier: Apache-2.0
"""The gate: a coordinator's service that hands out splits by windows, and times them.

While no window is open a worker's question for splits is kept unanswered, so that it waits without using a processor. A window
hands out a fixed number of splits to the members it names, and ends when all of them are closed: every push was acknowledged
then. Invariant: apart from when splits are handed out, everything is the coordinator's own. Called from many threads.
"""

import threading
import time
from collections.abc import Collection
from concurrent.futures import Future

from oarlock.client.job import TRAINING
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.coordinator_pb2 import TRAIN, WAIT, CloseSplitRequest, LeaseReply, LeaseRequest
from oarlock.proto.errors import InvalidArgument

# How long a question is kept, below what the caller waits for an answer; and when one that still has work asks again.
KEEP_SECONDS, ASK_AGAIN_SECONDS = 5.0, 0.01


class Gate(CoordinatorService):
    """Answers as the coordinator does, but leases splits only while a window is open."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator)
        self._job = coordinator
        self._changed = threading.Condition()
        self._members: Collection[int] | None = None
        self._splits = 0
        self._granted: set[int] = set()
        self._closed: set[int] = set()
        self._end: Future[tuple[float, int]] = Future()
        self._shut = False
        self._samples = 0
        # (samples, mean loss) of every split in the order of closing.
        self.losses: list[tuple[int, float]] = []

    def open(self, splits: int, members: Collection[int] | None = None) -> "Future[tuple[float, int]]":
        """Open a window of ``splits`` for the members of these incarnations (None: all); its end: (seconds, samples)."""
        with self._changed:
            if len(self._closed) < self._splits:
                raise InvalidArgument("a window is open: wait for its end before the next one")
            self._members, self._splits, self._samples = members, splits, 0
            self._granted, self._closed, self._end = set(), set(), Future()
            self._begun = time.perf_counter()
            self._changed.notify_all()
            return self._end

    def rest(self) -> None:
        """Hand out no more splits of the window that is open: it ends with those that are under way."""
        with self._changed:
            self._splits = len(self._granted)
            if len(self._closed) == self._splits and not self._end.done():
                self._end.set_result((time.perf_counter() - self._begun, self._samples))

    def shut(self) -> None:
        """Answer all questions that are kept, for the end of the job."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()

    def _has_work(self, sender: int) -> bool:
        mine = self._members is None or sender in self._members
        return mine and len(self._granted) < self._splits

    def lease(self, request: LeaseRequest) -> LeaseReply:
        sender = request.header.sender
        with self._changed:
            if not request.held and not self._shut:
                self._changed.wait_for(lambda: self._has_work(sender) or self._shut, KEEP_SECONDS)
            if self._has_work(sender) and self._job.phase == TRAINING:
                left = self._splits - len(self._granted)
                asked = LeaseRequest()
                asked.CopyFrom(request)
                asked.wanted = max(1, min(request.wanted, left))
                reply = super().lease(asked)
                if reply.work == TRAIN:
                    self._granted.update(reply.splits)
                return reply
        return LeaseReply(work=WAIT, retry_seconds=ASK_AGAIN_SECONDS)

    def close_split(self, request: CloseSplitRequest) -> Empty:
        reply = super().close_split(request)
        now = time.perf_counter()
        with self._changed:
            if request.split in self._granted and request.split not in self._closed:
                self._closed.add(request.split)
                self._samples += request.samples
                if request.samples:
                    self.losses.append((request.samples, request.loss_sum / request.samples))
                if len(self._closed) == self._splits:
                    self._end.set_result((now - self._begun, self._samples))
        # An epoch that is over is followed by the next one at once, not when the coordinator looks at its clock.
        self._job.tick()
        return reply
