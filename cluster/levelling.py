# SPDX-License-Identifier: Apache-2.0
"""Levelling: who of a block's members owns it, and which blocks go from burdened shards to idle ones. Pure array functions.

Invariant: what is changed makes the sum of squares smaller and keeps every table's numbers of blocks within its range, so
that levelling ends, and what is level is left alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.dealing import Ints, apart, turns_of

Floats = NDArray[np.float64]
ROUNDS = 64
LEVEL_ROUNDS = 512
FAR = 1 << 30
# Hand-overs one after the other for one that counts; of few shards as many as it takes.
LONGEST, FEW = 3, 64


@dataclass(frozen=True)
class Ranges:
    """For the blocks of each table: how few and how many a shard may have. ``table`` int64[b]; the others int64[tables]."""

    table: Ints
    least: Ints
    most: Ints


def even_owners(held: Ints, owner: Ints, ranges: Ranges, shards: int) -> Ints:
    """Return the owners int64[b] after hand-overs among members that bring each table's numbers into its range.

    ``held`` int64[b, k]: positions of all members. Nothing has to be copied for it.
    """
    owner = owner.copy()
    base = ranges.table * shards
    most = np.repeat(ranges.most, shards)
    least = np.repeat(ranges.least, shards)
    rows = np.repeat(np.arange(len(owner)), held.shape[1])
    others = held.reshape(-1)
    rows, others = rows[others >= 0], others[others >= 0]
    to = base[rows] + others
    for _ in range(ROUNDS):
        count = np.bincount(base + owner, minlength=len(most))
        gives, takes = np.maximum(count - most, 0), np.maximum(most - count, 0)
        if not gives.any():
            gives, takes = np.maximum(count - least, 0), np.maximum(least - count, 0)
            if not takes.any():
                break
        source = base[rows] + owner[rows]
        useful = np.flatnonzero((gives[source] > 0) & (takes[to] > 0) & (source != to))
        if not len(useful):
            useful, takes = _towards(source, to, gives, takes, shards if shards <= FEW else LONGEST)
            if not len(useful):
                break
        # Not the first blocks first: what is handed over comes from everywhere.
        useful = useful[np.argsort((rows[useful] * 2654435761) & 0xFFFFFFFF, kind="stable")]
        useful = useful[turns_of(rows[useful]) == 0]
        useful = useful[turns_of(source[useful]) < gives[source[useful]]]
        useful = useful[turns_of(to[useful]) < takes[to[useful]]]
        owner[rows[useful]] = others[useful]
    return owner


def _towards(source: Ints, to: Ints, gives: Ints, takes: Ints, longest: int) -> tuple[Ints, Ints]:
    """Return the edges that bring the surplus nearest to a taker one step nearer, and how many each node takes of it."""
    far = np.where(takes > 0, 0, FAR)
    for steps in range(longest):
        reached = source[far[to] == steps]
        far[reached[far[reached] == FAR]] = steps + 1
        if steps and (gives[reached] > 0).any():
            break
    reach = np.flatnonzero((gives[source] > 0) & (far[source] < FAR) & (far[to] == far[source] - 1))
    if not len(reach):
        return reach, takes
    reach = reach[far[source[reach]] == far[source[reach]].min()]
    # As many as are wanted at all, and one for each on the way.
    reach = reach[np.argsort((source[reach] * 2654435761) & 0xFFFFFFFF, kind="stable")]
    return reach[: int(takes.sum())], np.ones_like(takes)


@dataclass(frozen=True)
class Bounds:
    """When is a burden uneven? ``starts``: above that share over the mean; ``aims``: what is then brought about."""

    starts: float
    aims: float


def level_owners(held: Ints, owner: Ints, weight: Floats, ranges: Ranges, shards: int, bounds: Bounds) -> Ints:
    """Return the owners int64[b] after hand-overs among members that even out the sums of ``weight`` of what shards own."""
    owner = owner.copy()
    burden = np.bincount(owner, weight, shards)
    mean = float(burden.mean())
    if mean <= 0 or burden.max() <= mean * (1 + bounds.starts):
        return owner
    count = np.bincount(ranges.table * shards + owner, minlength=len(ranges.most) * shards)
    for _ in range(LEVEL_ROUNDS):
        high = burden > mean * (1 + bounds.aims)
        rows = np.flatnonzero(high[owner] & (weight > 0))
        if not len(rows):
            break
        rows = np.repeat(rows, held.shape[1])
        to = held[rows[:: held.shape[1]]].reshape(-1) if len(rows) else rows
        rows, to = rows[to >= 0], to[to >= 0]
        source = owner[rows]
        w = weight[rows]
        gain = w * (burden[source] - burden[to] - w)
        t = ranges.table[rows]
        may = (count[t * shards + source] > ranges.least[t]) & (count[t * shards + to] < ranges.most[t])
        chosen = _best(np.flatnonzero(may & (gain > bounds.aims * mean * w / 2)), gain, source, to)
        if not len(chosen):
            break
        rows, to, source, w, t = rows[chosen], to[chosen], source[chosen], w[chosen], t[chosen]
        owner[rows] = to
        burden += np.bincount(to, w, shards) - np.bincount(source, w, shards)
        count[t * shards + to] += 1
        count[t * shards + source] -= 1
    return owner


@dataclass(frozen=True)
class Limits:
    """``sizes`` float64[b] of blocks in bytes; ``room`` and ``spare`` float64[n]: what may come to each shard, and leave it."""

    sizes: Floats
    room: Floats
    spare: Floats


def level_held(
    held: Ints, weight: Floats, ranges: Ranges, host: Ints, bounds: Bounds, limits: Limits, *, both: bool
) -> Ints:
    """Return ``held`` int64[b, k] after moves that even out the sums of ``weight`` of what shards hold.

    ``both``: shards far below the mean are filled, too.
    """
    held = held.copy()
    shards, k = len(host), held.shape[1]
    flat = held.reshape(-1)
    heavy = np.repeat(weight, k)
    burden = np.bincount(flat[flat >= 0], heavy[flat >= 0], shards)
    mean = float(burden.mean())
    low_enough = not both or burden.min() >= mean * (1 - bounds.starts)
    if mean <= 0 or (burden.max() <= mean * (1 + bounds.starts) and low_enough):
        return held
    room, spare = limits.room.copy(), limits.spare.copy()
    table = np.repeat(ranges.table, k)
    large = np.repeat(limits.sizes, k)
    count = np.bincount(table[flat >= 0] * shards + flat[flat >= 0], minlength=len(ranges.most) * shards)
    missed = 0
    for _ in range(LEVEL_ROUNDS):
        by = np.argsort(-burden, kind="stable")
        pairs = min(int((burden > mean).sum()), int((burden < mean).sum()))
        partner = np.full(shards, -1, np.int64)
        # Who found nothing for its partner is given another one.
        partner[by[:pairs]] = np.roll(by[::-1][:pairs], missed)
        uneven = burden[by[:pairs]] > mean * (1 + bounds.aims)
        if both:
            uneven |= burden[partner[by[:pairs]]] < mean * (1 - bounds.aims)
        partner[by[:pairs][~uneven]] = -1
        at = np.flatnonzero((flat >= 0) & (partner[flat] >= 0) & (heavy > 0))
        source, to, w, t = flat[at], partner[flat[at]], heavy[at], table[at]
        gain = w * (burden[source] - burden[to] - w)
        may = (count[t * shards + source] > ranges.least[t]) & (count[t * shards + to] < ranges.most[t])
        good = np.flatnonzero(
            may & (gain > bounds.aims * mean * w / 2) & (large[at] <= np.minimum(room[to], spare[source]))
        )
        beside = held[at[good] // k]
        beside = np.where(beside == source[good][:, None], -1, beside)
        good = good[apart(beside, to[good], host)]
        chosen = _best(good, gain, source, to)
        # Not twice the same block.
        chosen = chosen[turns_of(at[chosen] // k) == 0]
        if not len(chosen):
            missed += 1
            if missed > min(pairs, 8):
                break
            continue
        missed = 0
        at, source, to, w, t = at[chosen], source[chosen], to[chosen], w[chosen], t[chosen]
        flat[at] = to
        burden += np.bincount(to, w, shards) - np.bincount(source, w, shards)
        came = np.bincount(to, large[at], shards) - np.bincount(source, large[at], shards)
        room, spare = room - came, spare + came
        count[t * shards + to] += 1
        count[t * shards + source] -= 1
    return held


def _best(among: Ints, gain: Floats, source: Ints, to: Ints) -> Ints:
    """Return those of ``among`` with the highest gain, one for each source and each target."""
    among = among[np.argsort(-gain[among], kind="stable")]
    among = among[turns_of(source[among]) == 0]
    found: Ints = among[turns_of(to[among]) == 0]
    return found
