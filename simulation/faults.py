# SPDX-License-Identifier: Apache-2.0
"""Schedules: what job is run, and what goes wrong when, all of it drawn from one seed and written down as a list.

Invariant: a Schedule says everything, so leaving faults out of it gives another Schedule that can be run: that is how a
failing one is shrunk. Pure.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace

from oarlock.client.job import CACHED
from oarlock.simulation.rough import FORMS

# What happens to messages. "lose": it never arrives; "deaf": its answer does not; "late": it arrives a second time, later;
# "slow": it takes long; "slow_reply": its answer does.
WIRE = ("lose", "deaf", "late", "slow", "slow_reply")
# What happens to processes and links. "tear" kills the coordinator in the middle of a transaction; "cut" separates two
# processes; "refuse" has a shard run out of memory in the middle of a push; "join" and "leave": a worker comes or goes.
WORLD = (
    "kill_worker",
    "pause_worker",
    "kill_coordinator",
    "tear",
    "pause_coordinator",
    "pause_shard",
    "cut",
    "refuse",
    "join",
    "leave",
)
# Ends the job, which then goes on from its newest cut; where blocks have copies, another shard comes in its place.
KILL_SHARD = "kill_shard"
KINDS = (*WIRE, *WORLD, KILL_SHARD)
# Other numbers of shards are wanted.
SCALE = "scale"
# What happens to just the message that is aimed at, and to those between whom it goes. "hold": it arrives later; "again": once
# more, later; "freeze": its sender stands still, and in the midst of that it arrives; "stun": who gets it stands still.
AIMED = ("hold", "again", "freeze", "stun")
# Strikes when a copy has been ordered: the next operations that an owner tells of, with it most often, come once more, later.
ECHO = "echo"
# The name by which such reports are counted apart from the others.
HANDED_OVER = "Coordinator.Report of what was handed over"
MODES = ("async", "ssp", "geo")
# Its jobs are of another recipe, and checked by other rules: drawn alone, so that the other modes' seeds say what they said.
SYNC = "sync"
# Its rows count as those of the other modes, its dense values take a course as those of sync.
HYBRID = "hybrid"
# A message fault waits for the next message of its method. Pushes matter most.
METHODS = (
    *("Shard.Push",) * 6,
    *("Shard.Pull",) * 2,
    *("Coordinator.Lease",) * 2,
    *("Coordinator.CloseSplit",) * 2,
    "Shard.Marks",
    "Shard.Close",
    "Shard.Adopt",
    "Coordinator.Join",
    "Coordinator.Heartbeat",
    "Coordinator.Release",
    "Coordinator.Placement",
)
LEASE_SECONDS = 6.0
# A schedule has at least so many events.
LEAST_EVENTS = 200
# Rows of the training files.
TRAIN_ROWS = 36
HEARTBEAT_SECONDS = 2.0
GATE_SECONDS = 2.0
# Messages of a cut, and what may happen to processes in the middle of one.
CUT_METHODS = ("Coordinator.Gate", "Coordinator.Heartbeat", "Shard.Cut", "Shard.Write", "Shard.Abort")
CUT_WORLD = ("kill_worker", "pause_worker", "kill_coordinator", "tear", "pause_coordinator", "cut")
CUTS_SHARE = 0.5
# Of all jobs: those that lose shards, at a word of these messages, or whenever.
LOSSES_SHARE = 0.25
LOSS_METHODS = (
    *("Shard.Cut",) * 3,
    *("Shard.Write",) * 3,
    *("Coordinator.Gate",) * 2,
    "Shard.Abort",
    "Shard.Ranks",
    "Shard.Adopt",
    "Shard.Push",
)
# Of the jobs of modes in which something may be kept from group to group.
ROUGH_SHARE = 0.4


@dataclass(frozen=True)
class Fault:
    """``kind`` strikes when event number ``at`` has happened. ``who`` chooses among processes, ``method`` among messages."""

    at: int
    kind: str
    who: int = 0
    seconds: float = 0.0
    method: str = ""


@dataclass(frozen=True)
class Schedule:
    """A small job and its faults. ``latency`` is the longest time of a message on its way, in seconds.

    ``accumulate``: batches of a group; the k of geo(k). ``cache_rows``: rows of the counting table that a worker keeps, 0: none;
    ``cache_adaptive``: each worker finds its bound, up to ``cache_bound``.
    ``push``: how the rough rows travel, and with ``push_dense`` all dense parameters, ``zstd`` or not; empty: there are none.
    ``compute_threads``: groups that a worker computes at once, each for at most ``latency``.
    ``checkpoint_seconds``: between two cuts, 0: there is one at the end alone. ``at_gates``: faults that strike when
    the ``at``-th word of a worker that stands at a gate was heard, or, under hybrid, a shard was asked to begin a view.
    ``at_cuts``: faults that strike when the ``at``-th message of their method was handled, or, if ``who`` is odd, is about to be,
    counted once ``cuts_before`` cuts are committed.
    ``ranks``: of sync and hybrid; ``checkpoint_steps``: groups from one cut to the next, while they train, 0: none before the
    end. ``replicas``: copies of each block beside its owner's. ``elastic``: other shards come in place of those that die, and as
    many as are wanted.
    """

    seed: int
    shards: int
    workers: int
    open_splits: int
    prefetch: int
    epochs: int
    rows_per_split: int
    batch_rows: int
    mode: str
    staleness: int
    latency: float
    faults: tuple[Fault, ...]
    accumulate: int = 1
    cache_rows: int = 0
    cache_bound: int = 0
    cache_adaptive: bool = False
    push: str = ""
    push_dense: str = ""
    zstd: bool = False
    compute_threads: int = 1
    checkpoint_seconds: float = 0.0
    at_gates: tuple[Fault, ...] = ()
    at_cuts: tuple[Fault, ...] = ()
    cuts_before: int = 0
    ranks: int = 0
    checkpoint_steps: int = 0
    replicas: int = 0
    elastic: bool = False

    def without(self, leave_out: set[int]) -> "Schedule":
        """Return the schedule without the faults of these positions."""
        return replace(self, faults=tuple(f for i, f in enumerate(self.faults) if i not in leave_out))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Schedule":
        values = json.loads(text)
        for name in ("faults", "at_gates", "at_cuts"):
            values[name] = tuple(Fault(**f) for f in values.get(name, ()))
        return Schedule(**values)


def draw(seed: int, modes: tuple[str, ...] = MODES) -> Schedule:
    """Return the schedule of a seed."""
    return _losing(_draw_cuts(_draw_training(random.Random(seed), seed, modes)))


def _draw_cuts(schedule: Schedule) -> Schedule:
    """Return a schedule with what its seed has of cuts."""
    rng = random.Random(f"cuts of {schedule.seed}")
    if rng.random() > CUTS_SHARE:
        return schedule
    kinds, favourites = rng.sample(WIRE, 2), rng.sample(CUT_METHODS, 2)
    more = [_fault(rng, rng.choice(kinds), rng.choice(favourites)) for _ in range(rng.choice((0, 2, 6)))]
    # Some while the gate of an earlier attempt stands.
    more += [_fault(rng, rng.choice(CUT_WORLD), "") for _ in range(rng.choice((0, 0, 1, 3)))]
    faults = tuple(sorted((*schedule.faults, *more), key=lambda f: f.at))
    aimed = tuple(fault for _ in range(rng.choice((0, 1, 1, 2))) for fault in _aimed(rng))
    return replace(schedule, checkpoint_seconds=rng.choice((0.5, 2.0, 6.0)), faults=faults, at_gates=aimed)


def _aimed(rng: random.Random) -> list[Fault]:
    """Return what has a worker push across a cut: it opens its gate by itself, or it is struck off and does not know."""
    at, who = rng.randint(1, 30), rng.randrange(6)
    late = Fault(at, rng.choice(("slow", "lose")), who, rng.random() * 3, "Shard.Cut")
    if rng.random() < 0.5:
        # Longer than it waits: when the coordinator is back, all have come and the views begin.
        return [Fault(at, "pause_coordinator", who, 2 * GATE_SECONDS + rng.random() * 2), late]
    return [Fault(at, "cut", 4, LEASE_SECONDS * (1 + rng.random() / 2)), late]


def _losing(schedule: Schedule) -> Schedule:
    """Return a schedule with the shards that die by its seed: in the midst of cuts, most of them."""
    rng = random.Random(f"shards of {schedule.seed}")
    if rng.random() > LOSSES_SHARE:
        return schedule
    aimed, faults = list[Fault](), list(schedule.faults)
    for _ in range(rng.choice((1, 1, 2, 3))):
        who, seconds = rng.randrange(12), rng.random() * rng.choice((0.2, 2.0))
        if rng.random() < 0.25:
            faults.append(Fault(rng.randint(0, LEAST_EVENTS * 2), KILL_SHARD, who, seconds))
            continue
        method = rng.choice(LOSS_METHODS)
        # Of pushes there are many.
        at = rng.randint(1, 60 if method == "Shard.Push" else 12)
        aimed.append(Fault(at, KILL_SHARD, who, seconds, method))
    # Jobs that never make a cut begin anew, which is soon seen.
    often = schedule.checkpoint_seconds or rng.choice((0.0, 0.5, 0.5, 2.0))
    return replace(
        schedule,
        faults=tuple(sorted(faults, key=lambda f: f.at)),
        at_cuts=tuple(aimed),
        cuts_before=rng.choice((0, 1, 1, 2)),
        checkpoint_seconds=often,
    )


def loses(schedule: Schedule) -> bool:
    """Whether a shard is to die."""
    return bool(schedule.at_cuts) or any(fault.kind == KILL_SHARD for fault in schedule.faults)


def _draw_training(rng: random.Random, seed: int, modes: tuple[str, ...]) -> Schedule:
    # Every seed has its favourites, so that some kinds come in crowds and others not at all.
    kinds = [*rng.sample(WIRE, rng.randint(0, 3)), *rng.sample(WORLD, rng.randint(0, 4))] or ["late"]
    favourites = rng.sample(METHODS, rng.randint(1, 4))
    faults: list[Fault] = []
    for _ in range(rng.choice((2, 4, 8, 16))):
        fault = _fault(rng, rng.choice(kinds), rng.choice(favourites))
        # Three such errors with one split end the job, as they should.
        if fault.kind != "refuse" or sum(f.kind == "refuse" for f in faults) < 2:
            faults.append(fault)
    mode = rng.choice(modes)
    shards, rows_per_split, batch_rows = rng.randint(1, 3), rng.choice((6, 9)), rng.choice((2, 3, 4, 5))
    accumulate = rng.choice((1, 1, 2, 3))
    # Every group is pulled and pushed at every shard, each with an answer; every split is leased and closed.
    splits = TRAIN_ROWS // rows_per_split
    batches = -(-rows_per_split // batch_rows)
    groups = -(-batches // accumulate)
    events = 4 * shards * splits * groups + 4 * splits
    schedule = Schedule(
        seed=seed,
        shards=shards,
        workers=rng.randint(1, 3),
        open_splits=rng.randint(1, 3),
        prefetch=rng.randint(1, 3),
        epochs=max(rng.choice((1, 1, 2)), -(-LEAST_EVENTS * 2 // (3 * events))),
        rows_per_split=rows_per_split,
        batch_rows=batch_rows,
        mode=mode,
        staleness=rng.randint(0, 4) if mode == "ssp" else 0,
        latency=rng.choice((0.01, 0.1, 0.4)),
        faults=tuple(sorted(faults, key=lambda f: f.at)),
        accumulate=accumulate,
        # Some rows give their places to others, or all have one.
        cache_rows=rng.choice((0, 5, 100)) if mode in CACHED else 0,
        cache_bound=rng.choice((0, 1, 3)),
        cache_adaptive=rng.choice((False, False, True)),
    )
    if mode in (SYNC, HYBRID):
        return _ranked(schedule, rng)
    if mode == "geo" or rng.random() > ROUGH_SHARE:
        return schedule
    return replace(
        schedule,
        push=rng.choice(FORMS),
        push_dense=rng.choice(FORMS),
        zstd=rng.random() < 0.25,
        compute_threads=rng.choice((1, 2, 3)),
    )


def _ranked(schedule: Schedule, rng: random.Random) -> Schedule:
    """Return a schedule with what only jobs with ranks have, and without what they have not."""
    faults = tuple(replace(f, method=f.method.replace("Shard.Marks", "Shard.Ranks")) for f in schedule.faults)
    return replace(
        schedule,
        faults=faults,
        prefetch=1 if schedule.mode == SYNC else schedule.prefetch,
        compute_threads=rng.choice((1, 2)),
        ranks=rng.randint(1, 4),
        checkpoint_steps=rng.choice((0, 0, 4, 9)),
    )


def _fault(rng: random.Random, kind: str, method: str) -> Fault:
    at, who = rng.randint(0, LEAST_EVENTS * 2), rng.randrange(6)
    if kind in WIRE:
        # Short delays reorder; long ones outlive leases, splits, coordinators, and the patience of who waits for an answer.
        return Fault(at, kind, who, rng.choice((0.3, 1.0, 3.0, 8.0, 30.0)) * rng.random(), method)
    if kind == "pause_shard" or (kind == "cut" and who % 2):
        # A shard that is away for a lease is gone, and the job with it.
        return Fault(at, kind, who, rng.random() * LEASE_SECONDS * 0.4)
    if kind in ("kill_worker", "kill_coordinator", "tear", "leave"):
        return Fault(at, kind, who, rng.random() * rng.choice((0.5, 3.0)))
    return Fault(at, kind, who, rng.random() * rng.choice((0.5, 1.0, 2.5)) * LEASE_SECONDS)


@dataclass
class Outcome:
    """What became of a schedule: the invariant that broke (empty: none), the number of events, what happened how often."""

    violation: str
    events: int
    seconds: float
    counts: Counter[str]
