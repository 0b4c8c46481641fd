# SPDX-License-Identifier: Apache-2.0
"""Recoveries: what was done about shards that died, how long it took, and what was lost. People read it in status.

Invariant: one that is over is on disk, in the order of their ends, the newest ``MOST``; one that goes on is known to this life
of the coordinator alone. The coordinator's lock covers it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from oarlock.cluster.store import Store

FACT = "recoveries"
MOST = 1000
PROMOTION, RELOAD, ROLLBACK, REPLICATION = "promotion", "reload", "rollback", "re-replication"


@dataclass
class Open:
    """A recovery that goes on: ``over`` says whether it is done."""

    kind: str
    shard: int
    blocks: int
    lost: str
    since: float
    over: Callable[[], bool]
    # To which the job went back; None where it did not.
    cut: int | None = None


class Recoveries:
    """``all``: those that are over, oldest first."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self.open: list[Open] = []

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.all = store.fact(FACT, [])

    def begin(
        self,
        kind: str,
        shard: int,
        blocks: int,
        now: float,
        over: Callable[[], bool],
        *,
        lost: str = "",
        cut: int | None = None,
    ) -> None:
        """Note a recovery from the death of ``shard``; the same one again is the same one with more blocks."""
        for known in self.open:
            if (known.kind, known.shard) == (kind, shard):
                known.blocks, known.over = max(known.blocks, blocks), over
                return
        self.open.append(Open(kind, shard, blocks, lost, now, over, cut))

    def look(self, store: Store, run: int, now: float) -> None:
        """Record those that are over by now."""
        ended = [each for each in self.open if each.over()]
        if not ended:
            return
        self.open = [each for each in self.open if each not in ended]
        for each in ended:
            self._note(each, run, now - each.since)
        with store:
            store.set_fact(FACT, self.all)

    def _note(self, each: Open, run: int, seconds: float) -> None:
        entry = {
            "kind": each.kind,
            "shard": each.shard,
            "blocks": each.blocks,
            "lost": each.lost,
            **({} if each.cut is None else {"cut": each.cut}),
            "seconds": round(seconds, 3),
            "run": run,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.all = [*self.all, entry][-MOST:]

    def told(self) -> list[dict[str, Any]]:
        """Return all, those that go on at the end, without the seconds that they will have taken."""
        names = ("kind", "shard", "blocks", "lost")
        return [*self.all, *({name: getattr(each, name) for name in names} for each in self.open)]
