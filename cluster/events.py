# SPDX-License-Identifier: Apache-2.0
"""Events: what was done to a job that its result depends on, besides training: restores, and whatever else people asked for.

Invariant: an event is on disk in the transaction that does what it tells of, and is never changed or left out: the coordinator's
file has it, every later manifest, and status. The coordinator's lock covers it.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from oarlock.checkpoint.line import Restore, restores_in
from oarlock.cluster.store import Store

FACT = "events"


class Events:
    """The history of one job, oldest first; each is a JSON object with ``event``, ``run`` and ``created``."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def take_up(self, store: Store) -> None:
        """Load what was recorded."""
        self.all = list(store.fact(FACT, []))

    def adopt(self, events: Iterable[dict[str, Any]]) -> None:
        """Take over what manifests say, if the coordinator's own file was lost."""
        if not self.all:
            self.all = [dict(event) for event in events]

    def add(self, store: Store, event: str, run: int, **values: Any) -> None:
        """Note an event within the transaction of ``store``."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        # Whoever reads the list meanwhile has the one before.
        self.all = [*self.all, {"event": event, "run": run, "created": created, **values}]
        store.set_fact(FACT, self.all)

    @property
    def restores(self) -> list[Restore]:
        return restores_in(self.all)
