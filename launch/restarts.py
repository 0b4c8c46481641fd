# SPDX-License-Identifier: Apache-2.0
"""Restarts: how often killed processes may be started again; and Notices: what a user is to hear of a job, in order.

Invariant: the limit holds for all processes of a job together; a warning is told once, although a coordinator that was started
again has forgotten what the one before it said. Pure state; one event loop.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from oarlock.launch.child import Child

logger = logging.getLogger(__name__)

MAX_NOTICES = 10_000
_OTHERS = {
    "worker": "; what it was to train goes to others",
    "shard": "; what others have copies of they take over",
}


@dataclass
class Notices:
    """Warnings of the coordinator's lives and of the launcher itself, in the order in which they came up."""

    told: list[str] = field(default_factory=list)
    _term: int = -1
    _heard: int = 0

    def say(self, text: str) -> None:
        logger.warning("event=warning text=%s", text)
        self._add(text)

    def hear(self, status: dict[str, Any]) -> None:
        """Take over what the coordinator said since it was asked last."""
        said = status.get("warnings", [])
        if status.get("term", 0) != self._term:
            self._term, self._heard = status.get("term", 0), 0
        for text in said[self._heard :]:
            self._add(text)
        self._heard = len(said)

    def _add(self, text: str) -> None:
        if len(self.told) < MAX_NOTICES:
            self.told.append(text)


@dataclass
class Restarts:
    """``most`` restarts for all processes together (0: none); ``used`` so far."""

    most: int
    notices: Notices
    used: int = 0

    @property
    def left(self) -> bool:
        """Whether anybody may be started again."""
        return self.used < self.most

    def take(self, child: Child) -> bool:
        """Count a restart of what was ``child``, and say so; return False if it may not be started again."""
        if self.left:
            self.used += 1
            self.notices.say(f"{child.what_happened()}; started again ({self.used} of {self.most})")
            return True
        why = f"not started again: all {self.most} restarts were used" if self.most else "it is not started again"
        others = _OTHERS.get(child.role, "")
        self.notices.say(f"{child.what_happened()}; {why}{others}")
        return False
