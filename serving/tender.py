# SPDX-License-Identifier: Apache-2.0
"""Asks the servers of a fleet what they have, from a thread that is there only while there is one to be asked.

Invariant: one that is silent keeps nobody from asking another one; once it is closed nothing is under way. Any thread.
"""

import math
import select
import time
from threading import Condition, Lock, Thread
from typing import Any

from oarlock.proto.errors import DeadlineExceeded, PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.serving_pb2 import ModelRequest
from oarlock.serving.fleet import Fleet, Replica

DESCRIBE_SECONDS = 2.0
# While some are asked what they have: between two looks for others that are to be, and for the end.
LOOK_SECONDS = 0.1


class Tender:
    """Asks servers what they have, in a thread that is there only while there is one to be asked."""

    def __init__(self, fleet: Fleet, transport: BlockingTransport) -> None:
        self._fleet = fleet
        self._transport = transport
        lock = Lock()
        # For those who wait for servers, and for the thread.
        self._changed = Condition(lock)
        self._due = Condition(lock)
        self._sleeps_until = 0.0
        self._thread: Thread | None = None
        self._closed = False

    def wait(self, seconds: float) -> None:
        """Wait until something was learnt, or so long."""
        with self._changed:
            self._begin()
            self._changed.wait(seconds)

    def wake(self) -> None:
        """Have servers asked that are to be."""
        with self._changed:
            self._begin()

    def _begin(self) -> None:
        seconds = self._fleet.seconds_to_due()
        if seconds is None or self._closed:
            return
        if self._thread is None:
            self._thread = Thread(target=self._run, name="oarlock-servers", daemon=True)
            self._thread.start()
        elif time.monotonic() + seconds < self._sleeps_until:
            # Another one is to be asked before those that it waits for.
            self._due.notify()

    def _run(self) -> None:
        asked = _Described(self._fleet, self._transport)
        while True:
            with self._changed:
                seconds = self._fleet.seconds_to_due()
                if self._closed or (seconds is None and not asked):
                    self._thread = None
                    break
                if seconds and not asked:
                    self._sleeps_until = time.monotonic() + seconds
                    self._due.wait(seconds)
                    self._sleeps_until = 0.0
                    continue
            # One that is silent keeps nobody from asking another one.
            asked.ask(self._fleet.due())
            asked.hear(LOOK_SECONDS if seconds is None else min(LOOK_SECONDS, seconds))
            with self._changed:
                self._changed.notify_all()
        asked.drop()

    def close(self) -> None:
        """Ask no more; idempotent."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._due.notify()
            self._changed.notify_all()
        if thread is not None:
            thread.join()


class _Described:
    """Servers that are asked at this moment what they have. One thread."""

    def __init__(self, fleet: Fleet, transport: BlockingTransport) -> None:
        self._fleet = fleet
        self._transport = transport
        self._poll = select.poll()
        # By file number; until when an answer is waited for.
        self._asked: dict[int, tuple[Replica, Any, float]] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, replicas: list[Replica]) -> None:
        """Ask servers."""
        request = ModelRequest(protocol=PROTOCOL)
        for replica in replicas:
            try:
                sent = self._transport.begin(
                    replica.address, "Serving.Describe", request, timeout_seconds=DESCRIBE_SECONDS
                )
            except PSError as error:
                self._fleet.silent(replica, error)
                continue
            self._asked[sent.fileno()] = replica, sent, time.monotonic() + DESCRIBE_SECONDS
            self._poll.register(sent.fileno(), select.POLLIN)

    def hear(self, seconds: float) -> None:
        """Wait so long for an answer, and tell the fleet what came, and of whom nothing comes any more."""
        if self._asked:
            for number, _ in self._poll.poll(math.ceil(1000 * seconds)):
                replica, sent, _ = self._forget(number)
                try:
                    self._fleet.learn(replica, sent.take())
                except PSError as error:
                    self._fleet.silent(replica, error)
        now = time.monotonic()
        self._give_up([number for number, (_, _, until) in self._asked.items() if now >= until])

    def drop(self) -> None:
        """Wait for nobody any more."""
        self._give_up(list(self._asked))

    def _give_up(self, numbers: list[int]) -> None:
        for number in numbers:
            replica, sent, _ = self._forget(number)
            sent.drop()
            self._fleet.silent(replica, DeadlineExceeded(f"{replica.address} does not say in time what it serves"))

    def _forget(self, number: int) -> tuple[Replica, Any, float]:
        self._poll.unregister(number)
        return self._asked.pop(number)
