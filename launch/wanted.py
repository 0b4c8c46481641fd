# SPDX-License-Identifier: Apache-2.0
"""Wanted: how many shards and workers of a job are to be there, as the coordinator says, and whom nobody comes after.

Invariant: what went by itself, or may not be started again, is not replaced until somebody asks for another number. Pure state;
one event loop.
"""

from collections import Counter
from typing import Any

from oarlock.client.job import JobSpec

ROLES = {"shard": "servers", "worker": "workers"}


class Wanted:
    """``numbers``: by role, as many as are wanted."""

    def __init__(self, spec: JobSpec) -> None:
        self.numbers = {"shard": spec.servers, "worker": spec.workers}
        self._without: Counter[str] = Counter()
        # Whoever was ever seen to be told to leave: (role, pid).
        self._told: set[tuple[str, int]] = set()
        # Roles of which another number is wanted than when it was asked before.
        self._changed: set[str] = set()

    def hear(self, status: dict[str, Any]) -> None:
        """Take over what the coordinator says."""
        scale = status.get("scale")
        self._changed.clear()
        if scale is None:
            return
        for role, name in ROLES.items():
            if scale[name] != self.numbers[role]:
                self.numbers[role] = scale[name]
                self._without[role] = 0
                self._changed.add(role)
        self._told |= leaving(status)

    def went(self, role: str, pid: int) -> bool:
        """Note that a process left in good order; return whether it did so by itself, and is not to be replaced."""
        if role in self._changed or (role, pid) in self._told:
            return False
        self._without[role] += 1
        return True

    def goes_without(self, role: str) -> None:
        """Note that a process is not started again."""
        self._without[role] += 1

    def lacks(self, role: str, there: int) -> bool:
        """Whether fewer are there than are wanted, and stay so, as some are not replaced."""
        return self._without[role] > 0 and there < self.numbers[role]

    def missing(self, role: str, there: int) -> int:
        """Return how many more are to be started where ``there`` are that stay."""
        return max(0, self.numbers[role] - self._without[role] - there)


def leaving(status: dict[str, Any]) -> set[tuple[str, int]]:
    """Return the (role, pid) of members that are to leave."""
    told = status.get("scale", {}).get("leaving", {})
    return {(m["role"], m["pid"]) for m in status["members"] if m["id"] in told.get(m["role"], ())} if told else set()


def settled(status: dict[str, Any]) -> bool:
    """Whether a job has as many shards and workers as are wanted, and nothing of it moves or is to move."""
    scale, there = status["scale"], [m["role"] for m in status["members"]]
    return bool(
        status["moving"]["at_rest"]
        and not status["incomplete"]
        and not any(scale["leaving"].values())
        and len(status["blocks"]) == there.count("shard") == scale["servers"]
        and there.count("worker") == scale["workers"]
    )
