# SPDX-License-Identifier: Apache-2.0
"""Members: who takes part, and until when. Pure: time comes in as ``now``, decisions go out as return values.

Invariant: an incarnation is given once and never again; a lease that ended is not renewed. The coordinator's lock covers it.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from oarlock.proto.errors import LeaseLost

# So many processes of one role take part at once, and so many that are gone are remembered.
MAX_ALIVE = 1024
MAX_GONE = 1024


@dataclass
class Member:
    """A process that joined. ``state``: alive, left (in good order) or dead (its lease ended, or its exit was seen)."""

    incarnation: int
    id: int
    role: str
    address: str
    nonce: int
    pid: int
    host: str
    reader: str
    run: int = 1
    state: str = "alive"
    # Why it is dead.
    error: str = ""
    expires: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    # When it told them.
    told: float = 0.0
    # Number of the newest Lease question, and its answer: the same question gets the same answer.
    asked: int = 0
    answer: Any = None

    def record(self) -> dict[str, Any]:
        """Return what is kept on disk: identity and state, not the lease and not the counters."""
        passing = ("expires", "stats", "told", "asked", "answer")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in passing}


class Members:
    """All members of a job, past and present, by incarnation."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.all: dict[int, Member] = {}

    def alive(self, role: str) -> list[Member]:
        return [m for m in self.all.values() if m.role == role and m.state == "alive"]

    def by_nonce(self, role: str, nonce: int) -> Member | None:
        """Return the living member that a repeated Join belongs to."""
        return next((m for m in self.alive(role) if m.nonce == nonce), None)

    def lost(self, first_run: int = 1) -> list[Member]:
        """Return members that died in run ``first_run`` or later, but for processes that came again in a later one."""
        newest: dict[tuple[str, int, str], int] = {}
        for m in self.all.values():
            who = (m.role, m.pid, m.host)
            newest[who] = max(newest.get(who, 0), m.run)
        dead = [m for m in self.all.values() if m.state == "dead" and m.run >= first_run]
        return [m for m in dead if m.run == newest[m.role, m.pid, m.host]]

    def next_id(self, role: str) -> int:
        """Return the lowest number of the role that nobody alive has."""
        taken = {m.id for m in self.alive(role)}
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def add(self, member: Member, now: float) -> None:
        member.expires = now + self._lease_seconds
        self.all[member.incarnation] = member

    def forget(self) -> list[int]:
        """Forget those gone that are too many, in the order in which they joined; return their incarnations."""
        gone = [m.incarnation for m in self.all.values() if m.state != "alive"]
        surplus = gone[: max(0, len(gone) - MAX_GONE)]
        for incarnation in surplus:
            del self.all[incarnation]
        return surplus

    def renew(self, incarnation: int, now: float) -> Member:
        """Extend the member's lease; LeaseLost if it has none any more."""
        member = self.all.get(incarnation)
        if member is None or member.state != "alive":
            raise LeaseLost(
                f"incarnation {incarnation} is not a member{'' if member is None else f' any more: {member.state}'}: join anew",
                incarnation=incarnation,
            )
        member.expires = now + self._lease_seconds
        return member

    def expired(self, now: float) -> list[Member]:
        """Return living members whose lease ended."""
        return [m for m in self.all.values() if m.state == "alive" and m.expires < now]

    def grant_full_term(self, now: float) -> None:
        """Give every lease a full term: after the coordinator itself was away, nobody is judged by the time it missed."""
        for member in self.all.values():
            member.expires = max(member.expires, now + self._lease_seconds)
