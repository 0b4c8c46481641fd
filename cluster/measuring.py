# SPDX-License-Identifier: Apache-2.0
"""Measuring: from what members tell with their heartbeats to a Look of the scaler.

Members tell counts that only grow, and by which clock of their own. What they grew by is added up over the time in which nothing
was under way; an evaluation or a cut in between is left out, since what is counted in it is not the usual. Invariant: only
what one incarnation told twice within such a time is compared; whoever told too little is not in the look. Pure: time comes in
as ``now``. The coordinator's lock covers it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oarlock.client.autoscale import MOST_BYTES, Autoscale
from oarlock.cluster.members import Member
from oarlock.cluster.scaler import Look, ShardLook

_OF = {"shard": ("cpu_seconds", "pushing_seconds", "pushes_seconds"), "worker": ("samples",)}
# Of a look's time a member has to have told so much.
LEAST_PART = 0.25


@dataclass
class _Sum:
    """What a member's counts grew by in ``seconds`` of its clock; ``last``: (when it told, clock, counts), None: to be told.

    ``told``: the newest that it told besides; what it tells now may be of another form.
    """

    seconds: float = 0.0
    grown: list[float] = field(default_factory=list)
    last: tuple[float, float, list[float]] | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


class Measuring:
    """``seconds``: so much of a look is measured."""

    def __init__(self, policy: Autoscale) -> None:
        self._policy = policy
        self._sums: dict[int, _Sum] = {}
        # When what is told began to be of usual work, and when it was heard of last.
        self._since = self._heard = 0.0
        # When a worker was first heard of that has trained nothing.
        self._idle: dict[int, float] = {}
        self.seconds = 0.0

    def begin(self, now: float) -> None:
        """Begin a look; all that was measured is forgotten."""
        self._sums, self.seconds = {}, 0.0
        self.pause(now)

    def pause(self, now: float) -> None:
        """Leave out the time since what was heard last: it is compared with nothing that is told before ``now``."""
        self._since = self._heard = now
        for each in self._sums.values():
            each.last = None

    def hear(self, members: Sequence[Member], now: float) -> None:
        """Take in what members have told by now."""
        self.seconds += now - self._heard
        self._heard = now
        for member in members:
            if member.told > self._since and self._counts(member, now):
                self._add(member)
        known = {member.incarnation for member in members}
        self._idle = {i: at for i, at in self._idle.items() if i in known}

    def _counts(self, member: Member, now: float) -> bool:
        """Whether what a member tells is of its work: a worker that has just come compiles, and has no split yet."""
        if member.role != "worker" or _number(member.stats.get("samples")) != 0:
            return True
        # One for which there is nothing to do counts as what it is.
        return now - self._idle.setdefault(member.incarnation, now) >= self._policy.looks * self._policy.look_seconds

    def _add(self, member: Member) -> None:
        told = member.stats.get("load") if member.role == "shard" else member.stats
        if not isinstance(told, dict):
            return
        clock, counts = _number(member.stats.get("clock")), [_number(told.get(name)) for name in _OF[member.role]]
        each = self._sums.setdefault(member.incarnation, _Sum(grown=[0.0] * len(counts)))
        if each.last is not None and member.told > each.last[0]:
            each.seconds += clock - each.last[1]
            each.grown = [grown + now - was for grown, now, was in zip(each.grown, counts, each.last[2], strict=True)]
        if each.last is None or member.told > each.last[0]:
            each.last, each.told = (member.told, clock, counts), told

    def look(
        self, shards: Sequence[Member], workers: Sequence[Member], numbers: tuple[int, int], now: float, *, moving: bool
    ) -> Look:
        """Return the look at members of whom so many ``numbers`` are wanted, (servers, workers)."""
        of_shards = {m.incarnation: self._sums[m.incarnation] for m in shards if self._measured(m)}
        of_workers = {m.incarnation: self._sums[m.incarnation] for m in workers if self._measured(m)}
        told = [m.told for m in (*shards, *workers) if m.incarnation in of_shards or m.incarnation in of_workers]
        return Look(
            at=min(told, default=now),
            servers=numbers[0],
            workers=numbers[1],
            shards=tuple(self._shard(m, of_shards[m.incarnation]) for m in shards if m.incarnation in of_shards),
            working=len(of_workers),
            samples_per_second=sum(each.grown[0] / each.seconds for each in of_workers.values()),
            moving=moving,
        )

    def _measured(self, member: Member) -> bool:
        each = self._sums.get(member.incarnation)
        # A count that is no number is measured all the same, and the scaler says so.
        return each is not None and each.seconds > 0 and not each.seconds < LEAST_PART * self._policy.look_seconds

    def _shard(self, member: Member, each: _Sum) -> ShardLook:
        told = each.told
        cpu, pushing, pushes = (grown / each.seconds for grown in each.grown)
        processors = _number(told.get("processors"))
        held = _sum(member.stats.get(name, 0) for name in ("bytes", "marks_bytes", "staged_bytes"))
        limit = float(self._policy.server_bytes)
        if not limit:
            # What the process needs besides is needed however little it holds.
            besides = max(_number(told.get("resident_bytes")) - held, 0.0)
            limit = max(_number(told.get("limit_bytes")) - besides, 0.0)
        known = math.isfinite(held) and math.isfinite(limit)
        # What fell, or is no number, is nothing that others could make up for.
        counted = processors > 0 and all(math.isfinite(x) and x >= 0 for x in (cpu, pushing, pushes))
        return ShardLook(
            memory_bytes=int(held) if known else 0,
            limit_bytes=int(limit) if known else 0,
            # One push is applied at a time, and whatever is done takes processors.
            busy=max(pushing, cpu / processors) if counted else math.nan,
            waiting=max(pushes - pushing, 0.0) if counted else math.nan,
        )


def _number(value: object) -> float:
    """Return what a member said as a number, not a number if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_BYTES:
        return math.nan
    return float(value)


def _sum(values: Iterable[object]) -> float:
    return math.fsum(_number(value) for value in values)
