# SPDX-License-Identifier: Apache-2.0
"""The servers behind one client: which part of the model each has, and which of them is asked next.

    asked for itself    what part it has (Describe): at first, and once the pause of one that failed is over
    ready               it has said so, and it fits the others

Invariant: what is not ready is not asked for rows. The first answers say what the model is: they have to agree on its job,
tables and number of parts, and all parts have to be there; whoever says otherwise later is left out, and ``problem`` says why.
Decides, and does nothing itself: calls are made elsewhere. Any thread.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from oarlock.embedding.spec import MAX_DIM
from oarlock.proto.errors import InvalidArgument, Malformed, PSError, Unavailable
from oarlock.proto.serving_pb2 import ModelReply
from oarlock.serving.hedging import Hedging
from oarlock.serving.part import MAX_PARTS

logger = logging.getLogger(__name__)

MAX_SERVERS = 4096
# How long a server that failed is not asked, at first and at most; drawn from half of it to all of it.
PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 5.0
MAX_BLOCKS = 1 << 31
# A server whose last answer came too late is as good as one with so many more requests under way.
LATE_COUNTS = 2


@dataclass
class Counts:
    """What a client of several servers had to do. Hedges: requests that were sent to a second server since the first was slow,
    and those that it answered first; failovers: sent to another server since one failed; asked_again: answers whose parts were of
    several versions at first."""

    hedges: int = 0
    hedges_won: int = 0
    failovers: int = 0
    asked_again: int = 0


class TableForm(NamedTuple):
    """What has to be known of a table to split its keys by part."""

    dim: int
    blocks: int
    salt: int


class ServedModel(NamedTuple):
    """What all servers serve together."""

    job: str
    parts: int
    tables: dict[str, TableForm]


class Replica:
    """One server; all of it is the fleet's."""

    def __init__(self, address: str, place: int) -> None:
        self.address = address
        # Of servers that are as good the first is asked; another one in each client.
        self.place = place
        self.part = -1
        self.told: ServedModel | None = None
        self.ready = False
        # Whether it has been asked what it has, or is being asked; and when it is to be asked again.
        self.asked = False
        self.asking = False
        self.due = 0.0
        self.learnt = 0.0
        self.pause = PAUSE_SECONDS
        self.in_flight = 0
        # Answers that another server had to give in its place since its last one.
        self.late = 0
        self.problem = ""


class Fleet:
    """The servers at ``addresses``, in any order. ``hedge_share``: of requests that may go to two servers."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        hedge_share: float,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if isinstance(addresses, str | bytes) or not isinstance(addresses, Sequence):
            raise InvalidArgument("give an address, host:port, or a sequence of addresses")
        if not 1 <= len(addresses) <= MAX_SERVERS:
            raise InvalidArgument(f"{len(addresses)} addresses: give from 1 to {MAX_SERVERS}")
        for each in addresses:
            if not isinstance(each, str) or not _is_address(each):
                raise InvalidArgument(f"{str(each)[:80]!r} is no address: give host:port")
        self._rng = rng or random.Random()
        self._clock = clock
        self._lock = Lock()
        distinct = list(dict.fromkeys(addresses))
        places = self._rng.sample(range(len(distinct)), len(distinct))
        self.replicas = [Replica(address, place) for address, place in zip(distinct, places, strict=True)]
        self._by_part: dict[int, list[Replica]] = {}
        self._ready = 0
        self._model: ServedModel | None = None
        self._hedging = Hedging(hedge_share)
        self.counts = Counts()

    @property
    def addresses(self) -> list[str]:
        return [each.address for each in self.replicas]

    # What each has

    def due(self) -> list[Replica]:
        """Return the servers that are to be asked now what they have; each is told back by ``learn`` or ``silent``."""
        with self._lock:
            now = self._clock()
            found = [each for each in self.replicas if not each.ready and not each.asking and each.due <= now]
            for each in found:
                each.asking = True
            return found

    @property
    def unsettled(self) -> bool:
        """Whether there is a server that is not ready; a look without the lock."""
        return self._ready != len(self.replicas)

    def seconds_to_due(self) -> float | None:
        """Return in how many seconds one is to be asked what it has; None: none is, as far as is known."""
        with self._lock:
            times = [each.due for each in self.replicas if not each.ready and not each.asking]
            return max(0.0, min(times) - self._clock()) if times else None

    def learn(self, replica: Replica, reply: ModelReply) -> None:
        """Take note of what a server says that it has."""
        try:
            told, part = read_model(reply)
        except PSError as error:
            self.silent(replica, error)
            return
        with self._lock:
            replica.asking, replica.asked = False, True
            if self._model is not None and (wrong := differs(told, self._model)):
                if not replica.problem:
                    logger.warning("event=server_left_out address=%s problem=%r", replica.address, wrong)
                replica.problem = f"{replica.address}: {wrong}"
                self._set_aside(replica)
                return
            replica.told, replica.part, replica.ready, replica.learnt = told, part, True, self._clock()
            replica.problem, replica.late = "", 0
            self._sort()

    def silent(self, replica: Replica, error: PSError) -> None:
        """Take note of a server that did not say what it has."""
        with self._lock:
            replica.asking, replica.asked, replica.told = False, True, None
            replica.problem = f"{replica.address}: {error}"
            self._set_aside(replica)

    def _set_aside(self, replica: Replica) -> None:
        if replica.ready:
            replica.ready = False
            self._sort()
        replica.due = self._clock() + replica.pause * self._rng.uniform(0.5, 1.0)
        replica.pause = min(2 * replica.pause, MOST_PAUSE_SECONDS)

    def _sort(self) -> None:
        self._by_part = {}
        self._ready = sum(each.ready for each in self.replicas)
        for each in self.replicas:
            if each.ready:
                self._by_part.setdefault(each.part, []).append(each)

    def model(self) -> ServedModel:
        """Return what the servers serve together.

        InvalidArgument if they do not fit together, Unavailable while it is not known yet.
        """
        found = self._model
        if found is not None:
            return found
        with self._lock:
            if self._model is None:
                self._model = self._judged()
            return self._model

    def _judged(self) -> ServedModel:
        if waiting := [each.address for each in self.replicas if not each.asked]:
            raise Unavailable(f"{waiting[0]} has not said yet what it serves")
        told = [(each, each.told) for each in self.replicas if each.told is not None]
        quiet = "; ".join(each.problem for each in self.replicas if each.told is None)[:1000]
        if not told:
            raise Unavailable(f"no server has said what it serves: {quiet}")
        first, model = told[0]
        try:
            for each, other in told[1:]:
                if wrong := differs(other, model):
                    raise InvalidArgument(
                        f"{each.address} and {first.address} do not go together: {each.address} {wrong}"
                    )
            have = {each.part for each, _ in told}
            if lacking := [part for part in range(model.parts) if part not in have]:
                which = f"part {lacking[0]} of {model.parts}"
                if quiet:
                    raise Unavailable(f"nobody who answers has {which}: {quiet}")
                raise InvalidArgument(
                    f"none of {len(self.replicas)} servers has {which}: give the addresses of all parts"
                )
        except InvalidArgument:
            # Somebody may put it right: who is told of it has them asked again, once for however many are told meanwhile.
            for each in self.replicas:
                if each.ready:
                    self._set_aside(each)
            raise
        return model

    # Who is asked

    def choose(self, part: int, tried: Sequence[Replica]) -> Replica | None:
        """Return the server of a part that a request goes to, None if there is none beside those that were tried."""
        with self._lock:
            best: Replica | None = None
            for each in self._by_part.get(part, ()):
                if each not in tried and (best is None or _rank(each) < _rank(best)):
                    best = each
            if best is not None:
                best.in_flight += 1
            return best

    def others(self, part: int, tried: Sequence[Replica]) -> bool:
        """Tell whether a part has a server beside those that were tried."""
        with self._lock:
            return any(each not in tried for each in self._by_part.get(part, ()))

    def nobody(self, part: int) -> Unavailable:
        """Return the error that says why none of a part can be asked; those that may be are asked soon what they have."""
        with self._lock:
            now = self._clock()
            # Of parts that have several the one that was heard longest ago may be another's by now.
            doubtful = [min(each, key=lambda one: one.learnt) for each in self._by_part.values() if len(each) > 1]
            for each in doubtful:
                each.ready, each.due = False, now
            if doubtful:
                self._sort()
            for each in self.replicas:
                each.due = min(each.due, now + PAUSE_SECONDS)
        problems = "; ".join(each.problem for each in self.replicas if each.problem)[:1000]
        return Unavailable(f"no server of part {part} can be asked now{': ' if problems else ''}{problems}")

    def began(self, size: int) -> float:
        """Take note of a request of ``size`` keys; return how long to wait before another server is asked, too."""
        with self._lock:
            self._hedging.began()
            return self._hedging.seconds(size)

    def may_hedge(self) -> bool:
        """Tell whether a request may go to a second server; it is counted then."""
        with self._lock:
            if not self._hedging.spend():
                return False
            self.counts.hedges += 1
            return True

    def answered(self, replica: Replica, size: int, seconds: float, *, hedge: bool) -> None:
        """Take note of an answer."""
        with self._lock:
            replica.in_flight -= 1
            replica.late, replica.pause = 0, PAUSE_SECONDS
            self.counts.hedges_won += hedge
            self._hedging.answered(size, seconds)

    def dropped(self, replica: Replica, size: int, seconds: float, *, late: bool) -> None:
        """Take note of a question whose answer is not waited for any more; ``late``: another server gave it first."""
        with self._lock:
            replica.in_flight -= 1
            if late:
                replica.late += 1
                self._hedging.answered(size, seconds)

    def failed(self, replica: Replica, error: PSError, *, aside: bool) -> None:
        """Take note of a failure; ``aside``: the server is not asked again before it has said what it has."""
        with self._lock:
            replica.in_flight -= 1
            if aside and replica.ready:
                replica.problem = f"{replica.address}: {error}"
                self._set_aside(replica)

    def failed_over(self) -> None:
        with self._lock:
            self.counts.failovers += 1

    def asked_again(self) -> None:
        with self._lock:
            self.counts.asked_again += 1


def _rank(replica: Replica) -> tuple[int, int]:
    return (replica.in_flight + LATE_COUNTS * replica.late, replica.place)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if text.startswith("unix:"):
        return len(text) > len("unix:")
    return (
        bool(host)
        and "," not in host
        and port.isascii()
        and port.isdigit()
        and 0 < int(port[:6]) < 1 << 16
        and text.isprintable()
    )


def read_model(reply: ModelReply) -> tuple[ServedModel, int]:
    """Return what a server says that it is part of, and which part it has; Malformed."""
    parts = reply.parts or 1
    if parts > MAX_PARTS or reply.part >= parts:
        raise Malformed(f"it says that it has part {reply.part} of {parts}")
    tables = {}
    for each in reply.tables:
        # Servers from before there were parts do not say it, and need not.
        blocks = each.blocks or 1
        if (
            blocks > MAX_BLOCKS
            or blocks & (blocks - 1)
            or not 1 <= each.dim <= MAX_DIM
            or (parts > 1 and not each.blocks)
        ):
            raise Malformed(f"it says that table {each.name[:80]!r} has {each.blocks} blocks and {each.dim} columns")
        tables[each.name] = TableForm(each.dim, blocks, each.salt)
    return ServedModel(reply.job, parts, tables), reply.part


def differs(told: ServedModel, model: ServedModel) -> str:
    """Return in what a server differs from the others, empty if in nothing."""
    if told.job != model.job:
        return f"serves job {told.job[:64]}, not {model.job[:64]}"
    if told.parts != model.parts:
        return f"serves one of {told.parts} parts, not of {model.parts}"
    return "" if told.tables == model.tables else "serves other tables"
