# SPDX-License-Identifier: Apache-2.0
"""The scaler: from what is measured to the numbers of servers and workers that are wanted, with reasons. Pure functions.

Invariant: nothing changes on measurements that are old, incomplete or of a moment at which something moves; one of the two
numbers changes at a time, at most to its double or half, within its limits, and then none until the cool-down is over.
"""

import math
from dataclasses import dataclass, field, replace

from oarlock.client.autoscale import Autoscale


@dataclass(frozen=True)
class ShardLook:
    """One shard over the last interval: memory used and allowed (0: nobody said), share of time in which it worked, mean
    number of pushes that waited for it.
    """

    memory_bytes: int
    limit_bytes: int
    busy: float
    waiting: float = 0.0


@dataclass(frozen=True)
class Look:
    """What was measured at ``at`` (seconds): of all shards and workers that answered. ``samples_per_second``: of all workers.

    ``servers`` and ``workers`` are wanted; ``working``: workers that trained; ``moving``: blocks move, a set is incomplete, a cut
    or an evaluation is under way, so that what is measured is not the usual.
    """

    at: float
    servers: int
    workers: int
    shards: tuple[ShardLook, ...]
    working: int
    samples_per_second: float
    moving: bool = False


@dataclass(frozen=True)
class State:
    """What the scaler remembers. ``speeds``: mean samples/s and looks by number of workers, since servers were added last.

    ``ceiling``: so many workers were not worth it, 0: not found. ``judged``: the number of workers that was found good.
    """

    changed_at: float = -math.inf
    toward: tuple[int, int] = (0, 0)
    agreed: int = 0
    speeds: dict[int, tuple[float, int]] = field(default_factory=dict)
    ceiling: int = 0
    judged: int = 0


@dataclass(frozen=True)
class Decision:
    """What is wanted from now on, what it was, and why."""

    servers: int
    workers: int
    before: tuple[int, int]
    reasons: tuple[str, ...]

    @property
    def changed(self) -> bool:
        return (self.servers, self.workers) != self.before

    def explain(self) -> str:
        """Return it for people: what changes, then a reason a line."""
        parts = [
            f"{was} -> {now} {what}" if now != was else f"{now} {what}"
            for what, was, now in zip(("servers", "workers"), self.before, (self.servers, self.workers), strict=True)
        ]
        return "\n".join([", ".join(parts), *(f"  {reason}" for reason in self.reasons)])


def decide(policy: Autoscale, state: State, look: Look, now: float) -> tuple[State, Decision]:
    """Return what to remember, and the decision. Called once for each look, in their order."""
    before = (look.servers, look.workers)
    if why := _unfit(policy, look, now):
        return replace(state, agreed=0), Decision(*before, before, (f"nothing is decided: {why}",))
    rest = state.changed_at + policy.cool_down_seconds - now
    if rest > 0:
        return replace(state, agreed=0), Decision(*before, before, (f"cool-down: another {rest:.0f} s",))
    state = _measured(policy, state, look)
    servers, reasons = _servers(policy, look)
    workers = look.workers
    if servers == look.servers:
        workers, more = _workers(policy, state, look)
        reasons += more
    wanted = (servers, workers)
    if wanted == before:
        judged = look.workers if state.speeds.get(look.workers, (0.0, 0))[1] >= policy.looks else state.judged
        return replace(state, agreed=0, judged=judged), Decision(*before, before, tuple(reasons))
    # The same way again: how far is decided by the last look.
    toward = (_sign(servers - before[0]), _sign(workers - before[1]))
    agreed = state.agreed + 1 if toward == state.toward else 1
    if agreed < policy.looks:
        reasons.append(f"{_asked(wanted)} wanted by {agreed} of {policy.looks} looks in a row")
        return replace(state, toward=toward, agreed=agreed), Decision(*before, before, tuple(reasons))
    after = replace(state, changed_at=now, agreed=0, toward=(0, 0))
    if servers > before[0]:
        # What held the workers back may be gone.
        after = replace(after, speeds={}, ceiling=0, judged=0)
    elif workers < before[1] and look.workers <= policy.workers_most:
        after = replace(after, ceiling=look.workers, judged=workers)
    elif workers > before[1]:
        after = replace(after, judged=look.workers, speeds={look.workers: state.speeds[look.workers]})
    return after, Decision(servers, workers, before, tuple(reasons))


def _unfit(policy: Autoscale, look: Look, now: float) -> str:
    """Return why a look decides nothing, empty if it may."""
    if now - look.at > policy.stale_seconds:
        return f"the measurements are {now - look.at:.0f} s old, at most {policy.stale_seconds:g} s are trusted"
    if look.moving:
        return "something is under way that changes what is measured"
    if len(look.shards) != look.servers:
        return f"{len(look.shards)} of {look.servers} servers were measured"
    if look.working != look.workers:
        return f"{look.working} of {look.workers} workers were measured"
    numbers = [look.samples_per_second, *(x for s in look.shards for x in (s.busy, s.waiting))]
    if not all(math.isfinite(x) and x >= 0 for x in numbers):
        return "a measurement is no number"
    return ""


def _measured(policy: Autoscale, state: State, look: Look) -> State:
    """Return the state with the look's speed: the mean of the first looks, then one that follows slowly."""
    mean, count = state.speeds.get(look.workers, (0.0, 0))
    weight = 1 / min(count + 1, 4 * policy.looks)
    mean += (look.samples_per_second - mean) * weight
    return replace(state, speeds={**state.speeds, look.workers: (mean, count + 1)})


def _servers(policy: Autoscale, look: Look) -> tuple[int, list[str]]:
    """Return the number of servers that memory, busy time and queues ask for, with reasons."""
    n = look.servers
    if not policy.servers_most:
        return n, []
    known = [s.memory_bytes / s.limit_bytes for s in look.shards if s.limit_bytes > 0]
    # Memory ends a process, so the fullest counts; busy time is evened out by moving blocks.
    memory = max(known) if len(known) == n else 0.0
    busy = sum(s.busy for s in look.shards) / n
    waiting = sum(s.waiting for s in look.shards) / n
    asked, reasons = [], []
    for share, bound, text in (
        (memory, policy.memory_share, "the fullest server uses {:.0%} of its memory, the bound is {:.0%}"),
        (busy, policy.busy_share, "servers are busy {:.0%} of the time, the bound is {:.0%}"),
    ):
        if share > bound:
            asked.append(math.ceil(n * share / bound))
            reasons.append(text.format(share, bound))
    if waiting > policy.waiting_pushes:
        asked.append(n + max(1, n // 4))
        reasons.append(f"{waiting:.1f} pushes wait for a server, the bound is {policy.waiting_pushes:g}")
    # A number outside of its limits comes back into them, whatever is measured.
    wanted = max(asked, default=n)
    if not asked:
        few = max(
            math.ceil(n * share / (bound * policy.spare_share))
            for share, bound in ((memory, policy.memory_share), (busy, policy.busy_share))
        )
        if len(known) != n:
            reasons.append("memory limits are not known: servers are not made fewer")
        elif waiting < policy.waiting_pushes / 2 and few < n:
            wanted = max(few, 1)
            reasons.append(
                f"{max(wanted, -(-n // 2))} servers would do: memory {memory:.0%} and busy {busy:.0%} of {n}, "
                f"with {1 - policy.spare_share:.0%} to spare below the bounds"
            )
    limited = min(max(wanted, policy.servers_least), policy.servers_most, 2 * n)
    limited = max(limited, -(-n // 2))
    if limited == n and wanted > n:
        reasons.append(f"servers_most = {policy.servers_most} allows no more servers")
    return limited, reasons


def _workers(policy: Autoscale, state: State, look: Look) -> tuple[int, list[str]]:
    """Return the number of workers by the marginal speed of the last ones added, with reasons."""
    w = look.workers
    if not policy.workers_most:
        return w, []
    if not policy.workers_least <= w <= policy.workers_most:
        inside = max(min(max(w, policy.workers_least), policy.workers_most, 2 * w), -(-w // 2))
        return inside, [f"workers are to be {policy.workers_least} to {policy.workers_most}"]
    speed, looks = state.speeds[w]
    if looks < policy.looks:
        return w, [f"the speed of {w} workers is known from {looks} of {policy.looks} looks"]
    reasons: list[str] = []
    fewer = max((k for k in state.speeds if k < w), default=0)
    if fewer and state.judged != w:
        slower = state.speeds[fewer][0]
        gain, mean = (speed - slower) / (w - fewer), slower / fewer
        said = f"{fewer} -> {w} workers: each added {gain:.0f} samples/s, {gain / mean:.0%} of the {mean:.0f} of each before"
        if not mean > 0:
            return w, ["nothing is trained: no speed to compare with"]
        if gain < policy.gain_share * mean:
            back = max(fewer, policy.workers_least, -(-w // 2))
            return back, [f"{said}; the bound is {policy.gain_share:.0%}"] if back < w else [
                f"{said}; no fewer are allowed"
            ]
        reasons.append(said)
    if w >= policy.workers_most:
        return w, [*reasons, f"workers_most = {policy.workers_most}"]
    if state.ceiling and w + 1 >= state.ceiling:
        return w, [*reasons, f"{state.ceiling} workers were not worth it"]
    busy = sum(s.busy for s in look.shards) / look.servers
    waiting = sum(s.waiting for s in look.shards) / look.servers
    if busy > policy.busy_share or waiting > policy.waiting_pushes:
        return w, [*reasons, f"servers are busy {busy:.0%} and {waiting:.1f} pushes wait: more workers would wait, too"]
    if not speed > 0:
        return w, [*reasons, "nothing is trained: more workers would not, either"]
    most = (w + state.ceiling) // 2 if state.ceiling else 2 * w
    more = min(most, policy.workers_most)
    return more, [*reasons, f"{w} workers train {speed:.0f} samples/s: whether {more} are worth it is tried"]


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def _asked(wanted: tuple[int, int]) -> str:
    return f"{wanted[0]} servers and {wanted[1]} workers are"
