# SPDX-License-Identifier: Apache-2.0
"""Schedules of jobs whose shards come and go: with copies of blocks, moves, promotions, cuts and restores together.

Invariant: as in faults.py a seed says everything. What the modes' own seeds say stays as it was. Pure.
"""

import random
from dataclasses import replace

from oarlock.simulation.faults import (
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
    return replace(
        schedule,
        shards=max(schedule.shards, 1 + replicas),
        replicas=replicas,
        elastic=True,
        faults=tuple(sorted(faults, key=lambda f: f.at)),
        at_cuts=tuple(aimed),
        cuts_before=rng.choice((0, schedule.cuts_before)),
    )


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
