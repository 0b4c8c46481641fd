# SPDX-License-Identifier: Apache-2.0
"""Schedules of jobs whose shards come and go: with copies of blocks, moves, promotions, cuts and restores together.

Invariant: as in faults.py a seed says everything. What the modes' own seeds say stays as it was. Pure.
"""

import random
from dataclasses import replace

from oarlock.cluster.moving import HAND_SECONDS
from oarlock.simulation.faults import (
    AIMED,
    ECHO,
    HANDED_OVER,
    HYBRID,
    KILL_SHARD,
    LEASE_SECONDS,
    LEAST_EVENTS,
    MODES,
    SCALE,
    SYNC,
    WIRE,
    Fault,
    Schedule,
    draw,
)

# Which schedules a campaign draws: those of this file.
ELASTIC = "elastic"
# Messages about copies, those most often that there are most of.
METHODS = (
    *("Shard.Replicate",) * 4,
    *("Coordinator.Report",) * 3,
    *("Shard.Adopt",) * 2,
    *("Shard.Copy",) * 2,
    *("Shard.HandOver",) * 2,
    "Shard.Reopen",
    "Shard.Held",
    "Shard.Push",
    "Coordinator.Placement",
)
# Of the jobs, those whose shards die.
DEATHS_SHARE = 0.6
# Of all jobs: those in which faults aim at who hands over, who is deposed and who does not know it.
AIMED_SHARE = 0.5
# Of these: those in which an owner is deposed whose last operations are on their way.
DEPOSED_SHARE = 0.3
# Those in which full copies come once more after they have changed.
ECHO_SHARE = 0.2
# And those in which a hand-over is given up and begun again, while word of the first try is on its way.
GIVEN_UP_SHARE = 0.4
# Words of that. Of the first there are many; of the others few, and what matters is often the first.
AIMED_METHODS = (
    *("Shard.Replicate",) * 4,
    *("Shard.HandOver",) * 3,
    *("Coordinator.Report",) * 3,
    *("Shard.Reopen",) * 3,
    *("Shard.Adopt",) * 2,
    "Shard.Copy",
)
MANY = {"Shard.Replicate": 60, "Coordinator.Report": 24, "Shard.Adopt": 16, "Shard.Reopen": 4}


def draw_elastic(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    rng = random.Random(f"moves of {seed}")
    schedule = draw(seed, (rng.choice((*MODES, *MODES, SYNC, HYBRID)),))
    replicas = rng.choice((0, 1, 1, 1, 2))
    faults = [*schedule.faults, *_messages(rng), *_scaling(rng)]
    aimed = [*schedule.at_cuts]
    if rng.random() < DEATHS_SHARE:
        for _ in range(rng.choice((1, 1, 2, 3))):
            who, seconds = rng.randrange(12), rng.random() * rng.choice((0.2, 2.0, 2 * LEASE_SECONDS))
            if rng.random() < 0.5:
                faults.append(Fault(rng.randint(0, LEAST_EVENTS * 3), KILL_SHARD, who, seconds))
            else:
                method = rng.choice(METHODS)
                at = rng.randint(1, 40 if method in ("Shard.Replicate", "Shard.Push") else 8)
                aimed.append(Fault(at, KILL_SHARD, who, seconds, method))
    if rng.random() < 0.3:
        # Longer than its lease: it is replaced, and does not know.
        at = rng.randint(0, LEAST_EVENTS * 2)
        faults.append(Fault(at, "pause_shard", rng.randrange(6), LEASE_SECONDS * (1 + rng.random())))
    more, least = _aimed(seed)
    if more:
        # Moves there are where shards come and go; who is deposed matters where there are others.
        faults += _scaling(random.Random(f"scaling of {seed}"))
        replicas = max(replicas, least)
    return replace(
        schedule,
        shards=max(schedule.shards, 1 + replicas),
        replicas=replicas,
        elastic=True,
        faults=tuple(sorted(faults, key=lambda f: f.at)),
        at_cuts=(*aimed, *more),
        cuts_before=rng.choice((0, schedule.cuts_before)),
    )


def _aimed(seed: int) -> tuple[list[Fault], int]:
    """Return faults that strike at single words about copies: their sender, who gets them, or just them; and how many copies
    they need at least."""
    rng = random.Random(f"aimed at moves of {seed}")
    if rng.random() > AIMED_SHARE:
        return [], 0
    out = []
    for _ in range(rng.choice((1, 2, 3, 5))):
        method = rng.choice(AIMED_METHODS)
        kind = rng.choice((*AIMED, *AIMED, "kill_coordinator", "pause_coordinator"))
        # Odd: before it is handled; afterwards there is nothing left of it to be held.
        who = 2 * rng.randrange(6) + (kind in AIMED or rng.random() < 0.5)
        # What is late comes in the next step of a move, after the move, or when its sender has been replaced.
        seconds = rng.choice((0.5, 2.0, 7.0, 2 * LEASE_SECONDS)) * rng.random()
        if kind in ("freeze", "stun") and rng.random() < 0.5:
            seconds = LEASE_SECONDS * (1 + rng.random())
        out.append(Fault(rng.randint(1, MANY.get(method, 8)), kind, who, seconds, method))
    which = rng.random()
    if which > 1 - GIVEN_UP_SHARE:
        return out + _given_up(rng), 1
    if which > DEPOSED_SHARE + ECHO_SHARE:
        return out, 1
    if which > DEPOSED_SHARE:
        echoes = [Fault(at, ECHO, 0, 0.5 + 6 * rng.random(), "Shard.Copy") for at in rng.sample(range(1, 13), 5)]
        return out + echoes, 1
    # What an owner did last comes to none of its copies before another one is the owner; then it comes to those that follow that.
    at, seconds = rng.randint(1, MANY["Shard.Replicate"]), LEASE_SECONDS * (1.5 + rng.random())
    out.append(Fault(at, "freeze", 1, seconds, "Shard.Replicate"))
    out += [Fault(at + n, "hold", 1, seconds * (0.7 + rng.random() / 2), "Shard.Replicate") for n in (1, 2)]
    return out, 2


def _given_up(rng: random.Random) -> list[Fault]:
    """Return faults by which a block stays closed for too long, and what is then said of it comes in the next try."""
    out = []
    for at in rng.sample(range(1, 7), 3):
        out.append(Fault(at, "hold", 1, HAND_SECONDS * (1 + rng.random() / 2), HANDED_OVER))
    for at in (1, 2, 3):
        out.append(Fault(at, rng.choice(("again", "hold")), 1, 0.2 + 2.5 * rng.random(), "Shard.Reopen"))
    return out


def _messages(rng: random.Random) -> list[Fault]:
    """Return faults of messages about copies."""
    kinds = rng.sample(WIRE, rng.randint(1, 3))
    favourites = rng.sample(sorted(set(METHODS)), rng.randint(1, 3))
    out = []
    for _ in range(rng.choice((0, 2, 6, 12))):
        at, who = rng.randint(0, LEAST_EVENTS * 3), rng.randrange(6)
        seconds = rng.choice((0.3, 1.0, 3.0, 8.0)) * rng.random()
        out.append(Fault(at, rng.choice(kinds), who, seconds, rng.choice(favourites)))
    return out


def _scaling(rng: random.Random) -> list[Fault]:
    """Return the moments at which another number of shards is wanted."""
    count = rng.choice((0, 1, 2, 4))
    return [Fault(rng.randint(20, LEAST_EVENTS * 3), SCALE, rng.randrange(12), rng.random() * 2) for _ in range(count)]
