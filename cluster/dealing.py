# SPDX-License-Identifier: Apache-2.0
"""Dealing: how many blocks of a table each shard should hold, and which shard takes which block. Pure array functions.

Shards are positions here, 0 to n - 1, those of one host side by side. Invariant: ``deal`` gives no shard more than it has room
for, and no block to a host that holds it already; equal arguments give equal answers.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# Rounds in which blocks that did not fit are offered other places.
ROUNDS = 16


def quota(held: Ints, total: int, least: int, most: int, level: NDArray[np.float64]) -> Ints:
    """Return int64[n], of sum ``total`` if that can be, each from ``least`` to ``most``: as near to ``held`` as that allows.

    Whoever holds most gives first and whoever holds least takes first; of equals that with the lower ``level`` takes.
    """
    found = np.clip(held, least, most)
    lack = total - int(found.sum())
    if lack == 0:
        return found
    low, high = least, most
    if lack > 0:
        # The highest floor under all that the total allows, then one more for as many as it takes.
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(np.maximum(found, middle).sum()) <= total else (low, middle - 1)
        found = np.maximum(found, low)
        who = np.flatnonzero((found == low) & (found < most))
        who = who[np.argsort(level[who], kind="stable")][: total - int(found.sum())]
        found[who] += 1
        return found
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(np.minimum(found, middle).sum()) >= total else (middle + 1, high)
    found = np.minimum(found, low)
    who = np.flatnonzero((found == low) & (found > least))
    who = who[np.argsort(-level[who], kind="stable")][: int(found.sum()) - total]
    found[who] -= 1
    return found


def turns_of(values: Ints) -> Ints:
    """Return int64[m]: how many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.repeat(first, np.diff(np.r_[first, len(ranked)]))
    return found


def partners(owners: Ints, turns: Ints, host: Ints) -> Ints:
    """Return int64[m]: a shard of another host for the ``turns``-th block of each owner, every one of them in turn.

    Where hosts are equal, the same turns of all owners meet every shard once: all get as many, and the blocks of one owner lie on
    as many shards as can be, among which its load is shared out should it die.
    """
    n = len(host)
    begin = np.searchsorted(host, host, "left")
    end = np.searchsorted(host, host, "right")
    others = np.maximum(n - (end - begin), 1)
    found: Ints = (end[owners] + (owners - begin[owners] + turns) % others[owners]) % n
    return found


def apart(beside: Ints, chosen: Ints, host: Ints) -> NDArray[np.bool_]:
    """Return bool[m]: that ``chosen`` is on another host than all of ``beside`` int64[m, k], in which -1 is nobody."""
    found: NDArray[np.bool_] = ~((host[beside] == host[chosen][:, None]) & (beside >= 0)).any(axis=1)
    return found


def deal(beside: Ints, room: Ints, host: Ints, proposed: Ints) -> Ints:
    """Return int64[m]: a shard for each block, on another host than those ``beside`` it; -1 where none was found.

    ``room`` int64[n]: how many each may take. ``proposed``: which one is asked first.
    """
    found = np.full(len(proposed), -1, np.int64)
    left = room.copy()
    fits = np.flatnonzero(apart(beside, proposed, host) & (left[proposed] > 0))
    fits = fits[turns_of(proposed[fits]) < left[proposed[fits]]]
    found[fits] = proposed[fits]
    left -= np.bincount(proposed[fits], minlength=len(host))
    rest = np.flatnonzero(found < 0)
    for round_number in range(ROUNDS):
        # One place after the other of all that have room, so that nobody's run out by chance.
        places = np.repeat(np.arange(len(host)), left)
        if not len(rest) or not len(places):
            break
        places = places[np.argsort(turns_of(places), kind="stable")]
        places = np.roll(places, round_number * (len(places) // 3 + 1))
        asked = np.roll(rest, round_number)[: len(places)]
        chosen = places[: len(asked)]
        fit = apart(beside[asked], chosen, host)
        found[asked[fit]] = chosen[fit]
        left -= np.bincount(chosen[fit], minlength=len(host))
        rest = rest[found[rest] < 0]
    return found


def deal_anywhere(beside: Ints, host: Ints, level: NDArray[np.float64]) -> Ints:
    """Return int64[m]: a shard for each block whatever room there is, on another host if any is left, else on another shard."""
    n = len(host)
    found = np.full(len(beside), -1, np.int64)
    order = np.argsort(level, kind="stable")
    for of in (host, np.arange(n)):
        for turn in range(n):
            rest = np.flatnonzero(found < 0)
            if not len(rest):
                return found
            chosen = order[(rest + turn) % n]
            fit = apart(beside[rest], chosen, of)
            found[rest[fit]] = chosen[fit]
    return found
