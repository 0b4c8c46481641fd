# SPDX-License-Identifier: Apache-2.0
"""Recall of a live model: which of its tables can be asked for their nearest rows, and the thread that keeps them in step.

Invariant: the indexes belong to one live model, and so to one run: who follows a job has others for a new run, and until these
are there the answer is Unavailable, never a row of the run before. What goes wrong with an index makes it anew, and is no matter
of rows or predictions. ``nearest`` is called by any thread; the keeper has one of its own, and one more while an index is made
beside another one.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import Event, Thread

from oarlock.serving.live import Live
from oarlock.serving.live_index import LiveIndex
from oarlock.serving.recall import RecallSpec, by_table, no_index
from oarlock.serving.snapshot import Version
from oarlock.serving.vectors import Floats, Keys, Nearest
from oarlock.telemetry.histogram import Histogram

logger = logging.getLogger(__name__)

# Between two looks at what was noted, where there was nothing.
IDLE_SECONDS = 0.02
LAGS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class LiveRecall:
    """The indexes of tables of ``live`` that ``specs`` name. UnknownTable, or InvalidArgument, if it has none such."""

    def __init__(
        self, specs: Sequence[RecallSpec], live: Live, *, clock: Callable[[], float] = time.monotonic, lags: Histogram
    ) -> None:
        self.specs = by_table(specs)
        self._live = live
        self._over = Event()
        self.indexes = {
            name: LiveIndex(spec, live.table(name), live.lock, clock=clock, lags=lags, going_on=self._unless_over)
            for name, spec in self.specs.items()
        }
        live.notes = {name: index.note for name, index in self.indexes.items()}

    def _unless_over(self) -> None:
        if self._over.is_set():
            raise Ended

    def close(self) -> None:
        """Have what is being made end soon."""
        self._over.set()

    # In step, by one thread

    @property
    def ready(self) -> bool:
        return all(index.ready for index in self.indexes.values())

    def step(self) -> bool:
        """Begin what can be begun, and put some of what was noted in place; return whether there is more to do at once."""
        more = False
        for index in self.indexes.values():
            if self._live.whole:
                index.begin()
            more |= index.step()
        return more

    def due(self) -> LiveIndex | None:
        """Return an index that is to be made anew, if there is one."""
        return next((index for index in self.indexes.values() if index.due), None)

    # Asking

    @property
    def version(self) -> Version:
        """Of which run they are."""
        return Version(self._live.run, self._live.cut, 0.0, live=True)

    def index(self, table: str) -> LiveIndex:
        """Return a table's index; UnknownTable says which there are."""
        found = self.indexes.get(table)
        if found is None:
            raise no_index(self.specs, table)
        found.check_ready()
        return found

    def nearest(
        self,
        table: str,
        vectors: Floats,
        k: int,
        *,
        exact: bool = False,
        among: Keys | None = None,
        without: Keys | None = None,
    ) -> tuple[Nearest, Version]:
        """Return the ``k`` nearest rows of vectors: float32[q, dim], and the version that they are of at least."""
        index, live = self.index(table), self._live
        age = max(live.age, 0.0 if among is not None else index.lag)
        version = Version(live.run, live.cut, time.time() - age, live=True)
        return index.nearest(vectors, k, exact=exact, among=among, without=without), version


class Ended(Exception):
    """What was being made is wanted no more."""


class Keeper:
    """Keeps the indexes that ``recall`` returns in step, from ``start`` to ``close``; ``said`` has what goes wrong told."""

    def __init__(
        self, recall: Callable[[], LiveRecall | None], said: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self._recall = recall
        self._said = said
        self._over = Event()
        self._thread: Thread | None = None
        self._builder: Thread | None = None

    def start(self) -> None:
        """Go on in threads."""
        self._thread = Thread(target=self._keep, name="oarlock-recall", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        before: LiveRecall | None = None
        while not self._over.is_set():
            recall = self._recall()
            if before is not None and recall is not before:
                before.close()
            before = recall
            if recall is None or not self.keep(recall):
                self._over.wait(IDLE_SECONDS)
        if before is not None:
            before.close()
        if self._builder is not None:
            self._builder.join()

    def keep(self, recall: LiveRecall) -> bool:
        """Put some of what was noted in place, and see to what is to be made anew; return whether there is more to do at once."""
        more = False
        with self._said("the index"), contextlib.suppress(Ended):
            try:
                more = recall.step()
            except Exception:
                for index in recall.indexes.values():
                    index.stop()
                raise
        due = recall.due()
        if due is not None and (self._builder is None or not self._builder.is_alive()):
            self._builder = Thread(target=self._rebuild, args=(due,), name="oarlock-index", daemon=True)
            self._builder.start()
        return more

    def _rebuild(self, index: LiveIndex) -> None:
        with self._said("the new index"), contextlib.suppress(Ended):
            index.rebuild()
            logger.info("event=index_made table=%s rows=%d", index.spec.table, index.rows)

    def close(self) -> None:
        """Keep nothing in step any more; idempotent."""
        self._over.set()
        recall = self._recall()
        if recall is not None:
            recall.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
