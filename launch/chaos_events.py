# SPDX-License-Identifier: Apache-2.0
"""What chaos does to a job and when: events drawn from a seed, and whether a shard may be struck at this moment.

    kill ROLE     SIGKILL of one process
    stop ROLE     SIGSTOP for longer than the lease, then SIGCONT
    scale ROLE    other numbers of shards or workers are asked for
    cut           a checkpoint is asked for

Invariant: the events are a pure function of the plan; who is struck follows from an event's ``draw`` and who is there. A shard is
struck only while every block that it has is whole elsewhere, else what is lost would be lost by the rules; a worker only while
another one is there, or nobody could tell that a block goes on. Pure.
"""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from oarlock.client.job import RELOAD, TRAINING, JobSpec
from oarlock.proto.errors import InvalidArgument

KILL, STOP, SCALE = "kill", "stop", "scale"
CUT = "cut"
STRIKES = tuple(f"{how} {role}" for how in (KILL, STOP) for role in ("shard", "worker", "coordinator"))
KINDS = (*STRIKES, "scale shard", "scale worker", CUT)
# How often each kind comes among ten events.
USUAL = {
    "kill shard": 2,
    "kill worker": 2,
    "kill coordinator": 1,
    "stop shard": 1,
    "stop worker": 1,
    "scale shard": 1,
    "scale worker": 1,
    CUT: 1,
}
MOST_EVENTS = 100_000


@dataclass(frozen=True)
class Event:
    """``after`` so many seconds from the one before; ``draw`` in [0, 1) chooses among those that are there."""

    kind: str
    after: float
    draw: float


@dataclass(frozen=True)
class Plan:
    """``events`` in all, one every ``gap_seconds`` on the average, of kinds as often as ``mix`` says.

    ``shards``, ``workers``: the least and the most that are asked for. ``stopped``: how long a process stands still, in leases.
    """

    events: int
    gap_seconds: float
    seed: int = 0
    mix: Mapping[str, int] = field(default_factory=lambda: dict(USUAL))
    shards: tuple[int, int] = (2, 4)
    workers: tuple[int, int] = (2, 3)
    stopped: float = 1.5

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("events", self.events, 1, MOST_EVENTS),
            ("gap_seconds", self.gap_seconds, 0.05, 3600.0),
            ("stopped", self.stopped, 0.1, 100.0),
        ):
            if not low <= value <= high:
                raise InvalidArgument(f"{name} = {value}: give a number from {low} to {high}")
        unknown = [kind for kind in self.mix if kind not in KINDS]
        if unknown or not any(self.mix.values()) or min(self.mix.values()) < 0:
            raise InvalidArgument(f"mix = {dict(self.mix)}: give how often each comes, of {', '.join(KINDS)}")
        for name, (low, high) in (("shards", self.shards), ("workers", self.workers)):
            if not 1 <= low <= high:
                raise InvalidArgument(f"{name} = {low}, {high}: give the least, 1 or more, and the most")


def schedule(plan: Plan) -> list[Event]:
    """Return all events of a plan. Kinds are dealt like cards, so a few events have all of them."""
    rng = random.Random(plan.seed)
    kinds = _dealt(plan.mix, rng)
    # The mean is what is asked for; the moments are not in step with anything.
    return [Event(next(kinds), plan.gap_seconds * (0.5 + rng.random()), rng.random()) for _ in range(plan.events)]


def _dealt(mix: Mapping[str, int], rng: random.Random) -> Iterator[str]:
    while True:
        deck = [kind for kind in KINDS for _ in range(mix.get(kind, 0))]
        rng.shuffle(deck)
        yield from deck


def survivable(mix: Mapping[str, int], spec: JobSpec) -> dict[str, int]:
    """Return the kinds after which a job goes on where it was: without copies, and with a roll-back at a loss, it goes back when
    a shard dies.
    """
    return {
        kind: often
        for kind, often in mix.items()
        if spec.replicas or spec.on_loss == RELOAD or kind not in ("kill shard", "stop shard")
    }


def chosen(draw: float, among: list[Any]) -> Any:
    """Return the one that an event's draw means."""
    return among[int(draw * len(among))]


def scaled(draw: float, now: int, low: int, high: int) -> int:
    """Return another number than ``now`` from ``low`` to ``high``; ``now`` if there is none."""
    others = [n for n in range(low, high + 1) if n != now]
    return int(chosen(draw, others)) if others else now


def spared(role: str, status: dict[str, Any], running: Collection[int], left: int) -> str:
    """Return why no process of a role may be killed or stopped now; empty if one may.

    ``running``: the numbers of processes that run, and were not stopped. ``status`` is what the coordinator says now.
    ``left``: so many others of the role must be there.
    """
    if role == "coordinator":
        return ""
    if status.get("phase") != TRAINING or "note" in status:
        return "the coordinator does not say that the job trains"
    mine = [m for m in status["members"] if m["role"] == role]
    if any(m["pid"] not in running for m in mine):
        return f"a {role} that the coordinator counts on is dead or stopped"
    if len(mine) <= left:
        return f"another {role} is needed first"
    if role == "worker":
        return ""
    if not any(m["stats"].get("samples") and m["pid"] in running for m in status["members"] if m["role"] == "worker"):
        return "no worker trains"
    if status["ownerless"] or status["incomplete"]:
        return "sets of copies are not complete"
    return "" if status["moving"]["at_rest"] else "blocks move"
