# SPDX-License-Identifier: Apache-2.0
"""Recoveries: what was done about shards that died, how long it took, and what was lost. People read it in status.

Invariant: those that are over are on disk, in the order of their ends, the newest ``MOST``; those that go on, too, so that the
next life of the coordinator ends them; it takes up a roll-back of the job by itself (going_back.py). The coordinator's lock
covers it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from oarlock.cluster.store import Store

FACT, OPEN = "recoveries", "recoveries_open"
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
    # Acknowledged pushes that are lost, as far as they are counted, and whether there were more.
    pushes: int | None = None
    more: bool = False
    # By the calendar, for a life that knows nothing of this one's clock.
    began: float = field(default_factory=lambda: datetime.now(UTC).timestamp())


class Recoveries:
    """``all``: those that are over, oldest first. ``over``: by kind, what says that one is."""

    def __init__(self, over: Mapping[str, Callable[[], bool]]) -> None:
        self._over = over
        self.all: list[dict[str, Any]] = []
        self.open: list[Open] = []
        self._changed = False

    def take_up(self, store: Store, run: int, now: float) -> None:
        """Load what was recorded; of those that go on those of ``run``."""
        self.all = store.fact(FACT, [])
        for told in store.fact(OPEN, []):
            if told.pop("run") == run:
                passed = max(0.0, datetime.now(UTC).timestamp() - told["began"])
                self.open.append(Open(**told, since=now - passed, over=self._over[told["kind"]]))

    def begin(
        self,
        kind: str,
        shard: int,
        blocks: int,
        now: float,
        over: Callable[[], bool] | None = None,
        *,
        lost: str = "",
        cut: int | None = None,
    ) -> None:
        """Note a recovery from the death of ``shard``; the same one again is the same one with more blocks."""
        over = over or self._over[kind]
        self._changed = True
        for known in self.open:
            if (known.kind, known.shard) == (kind, shard):
                known.blocks, known.over = max(known.blocks, blocks), over
                return
        self.open.append(Open(kind, shard, blocks, lost, now, over, cut))

    def count(self, kind: str, shard: int, pushes: int, more: bool) -> None:
        """Add acknowledged pushes that the newest recovery from the death of ``shard`` lost; ``more``: there were others."""
        for each in self.open:
            if (each.kind, each.shard) == (kind, shard):
                each.pushes, each.more = (each.pushes or 0) + pushes, each.more or more
                self._changed = True
                return
        for number in reversed(range(len(self.all))):
            known = self.all[number]
            if (known["kind"], known["shard"]) == (kind, shard):
                counted = {"pushes": known.get("pushes", 0) + pushes, "more": known.get("more", False) or more}
                self.all = [*self.all[:number], {**known, **counted}, *self.all[number + 1 :]]
                self._changed = True
                return

    def look(self, store: Store, run: int, now: float) -> None:
        """Record those that are over by now, and those that are new."""
        ended = [each for each in self.open if each.over()]
        if not ended and not self._changed:
            return
        self.open = [each for each in self.open if each not in ended]
        for each in ended:
            self._note(each, run, now - each.since)
        names = ("kind", "shard", "blocks", "lost", "began", "pushes", "more")
        kept = [each for each in self.open if each.kind != ROLLBACK]
        with store:
            store.set_fact(FACT, self.all)
            store.set_fact(OPEN, [{name: getattr(each, name) for name in names} | {"run": run} for each in kept])
        self._changed = False

    def _note(self, each: Open, run: int, seconds: float) -> None:
        entry = {
            "kind": each.kind,
            "shard": each.shard,
            "blocks": each.blocks,
            "lost": each.lost,
            **({} if each.cut is None else {"cut": each.cut}),
            **_counted(each),
            "seconds": round(seconds, 3),
            "run": run,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.all = [*self.all, entry][-MOST:]

    def told(self) -> list[dict[str, Any]]:
        """Return all, those that go on at the end, without the seconds that they will have taken."""
        names = ("kind", "shard", "blocks", "lost")
        return [*self.all, *({name: getattr(each, name) for name in names} | _counted(each) for each in self.open)]


def _counted(each: Open) -> dict[str, Any]:
    return {} if each.pushes is None else {"pushes": each.pushes, "more": each.more}
