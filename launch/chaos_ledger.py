# SPDX-License-Identifier: Apache-2.0
"""The ledger of chaos: what was done to whom and when, what followed, and how long training took to go on.

    at, waited     seconds since the job began; and how long the event waited until it might be
    recover_s      of a shard or a worker by the workers' notes (chaos_times.py); of the coordinator until it answers again
    parts, silent  the blocks, splits or ranks that were waited for; of them those that no push touched since
    followed       what the coordinator says that it did

Invariant: an entry is of an event that was carried out, or says why it was not. One event loop writes; after the end it is data.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.client.job import JobSpec
from oarlock.client.push_notes import read_notes
from oarlock.data.files import files_from_json
from oarlock.data.splits import plan_splits
from oarlock.launch.chaos_events import KILL, STOP
from oarlock.launch.chaos_times import Recovered, groups_acknowledged, shard_recovered, worker_recovered

# Of a shard of which the coordinator tells no recovery.
NOTHING = "no recovery is told: it came back in time, or the coordinator died before that was over"


@dataclass
class Entry:
    """An event that was carried out (``at``, seconds since the job began), or was not, since it could not be (``passed``).

    ``target`` is the process's number, ``member`` and ``incarnation`` what the coordinator calls it.
    """

    kind: str
    due: float
    # Of a change of numbers: from how many to how many.
    numbers: str = ""
    at: float = 0.0
    target: int | None = None
    member: int | None = None
    incarnation: int = 0
    passed: str = ""
    followed: str = ""
    recovered: Recovered | None = None
    # By time.monotonic; and what the status says once it is over.
    moment: float = 0.0
    over: Callable[[dict[str, Any]], str] | None = None

    @property
    def done(self) -> bool:
        return not self.passed

    def to_json(self) -> dict[str, Any]:
        seconds = self.recovered.seconds if self.recovered is not None else None
        out: dict[str, Any] = {
            "event": f"{self.kind} {self.numbers}".strip(),
            "at": round(self.at, 3),
            "waited": round(self.at - self.due, 3),
        }
        out |= {"target": self.target, "member": self.member} if self.target is not None else {}
        if self.recovered is not None:
            out["recover_s"] = None if seconds is None else round(seconds, 4)
            out |= {"parts": self.recovered.parts, "silent": self.recovered.silent}
        return (
            out
            | ({"passed": self.passed} if self.passed else {})
            | ({"followed": self.followed} if self.followed else {})
        )


@dataclass
class Ledger:
    """All entries of a run in their order; ``acknowledged``: groups of which a worker heard that they were applied."""

    entries: list[Entry] = field(default_factory=list)
    acknowledged: int = 0

    @property
    def done(self) -> list[Entry]:
        return [e for e in self.entries if e.done]

    def seconds(self, *kinds: str) -> list[float]:
        """Return the times to recover of some kinds of events, those that are known."""
        found = [e.recovered for e in self.done if e.kind in kinds and e.recovered is not None]
        return [r.seconds for r in found if r.seconds is not None and not r.silent]


def explain(ledger: Ledger, spec: JobSpec, blocks: int, notes: Path, status: dict[str, Any]) -> None:
    """Add to a ledger what only the end tells: times to recover, of the workers' notes, and what the coordinator did."""
    lines = read_notes(notes, blocks)
    ledger.acknowledged = groups_acknowledged(lines)
    for entry in ledger.done:
        how, _, role = entry.kind.partition(" ")
        if how not in (KILL, STOP) or role == "coordinator":
            continue
        if role == "worker":
            entry.recovered = worker_recovered(lines, entry.incarnation, entry.moment, ranked=bool(spec.ranks))
            continue
        entry.recovered = shard_recovered(lines, blocks, entry.incarnation, entry.moment, killed=how == KILL)
        found = [r for r in status.get("recoveries", ()) if r["shard"] == entry.member]
        entry.followed = "; ".join(_recovery(r) for r in found) or NOTHING


def _recovery(found: dict[str, Any]) -> str:
    took = f" in {found['seconds']:.2f} s" if "seconds" in found else ", not over"
    return f"{found['kind']} of {found['blocks']} blocks{took}{', lost ' + found['lost'] if found.get('lost') else ''}"


def summary(ledgers: Sequence[Ledger]) -> dict[str, Any]:
    """Return the figures of some runs together; None where nothing was measured.

    ``unmeasured``: shards that were struck of whose blocks some, or all, had no push since.
    """

    def seconds(kind: str) -> list[float]:
        return [s for ledger in ledgers for s in ledger.seconds(kind)]

    done = [e for ledger in ledgers for e in ledger.done]
    struck = [e.recovered for e in done if e.kind in ("kill shard", "stop shard")]
    kills = seconds("kill shard")
    return {
        "events": len(done),
        "kinds": dict(sorted(Counter(e.kind for e in done).items())),
        "passed_over": sum(len(ledger.entries) for ledger in ledgers) - len(done),
        "recover_s_p50": _rounded(statistics.median(kills) if kills else None),
        "recover_s_max": _rounded(max(kills, default=None)),
        "paused_recover_s_max": _rounded(max(seconds("stop shard"), default=None)),
        "worker_recover_s_max": _rounded(max(seconds("kill worker"), default=None)),
        "coordinator_recover_s_max": _rounded(max(seconds("kill coordinator"), default=None)),
        "unmeasured": sum(r is None or r.seconds is None or r.silent > 0 for r in struck),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def groups_of(spec: JobSpec) -> int:
    """Return how many groups a whole job has, by its files."""
    plans = plan_splits(files_from_json(list(spec.files)), spec.rows_per_split)
    return spec.epochs * sum(spec.groups(plan.rows) for plan in plans)
