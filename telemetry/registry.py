# SPDX-License-Identifier: Apache-2.0
"""Registry: the sources of a process's metrics, asked when somebody scrapes and at no other time.

Invariant: whoever counts, counts in plain attributes of its own and knows nothing of this; a source that fails, or says what
the table of metrics does not know, costs its own values and no others'. Called from any thread.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from threading import Lock
from typing import Any

from oarlock.telemetry.histogram import Histogram
from oarlock.telemetry.metrics import BY_NAME, METRICS, Metric

logger = logging.getLogger(__name__)

# What a source returns: by name of the metric a number or a Histogram, or these by the values of the metric's labels (a text,
# or a tuple of texts if there are several) as far as they were not given when the source was added.
Source = Callable[[], Mapping[str, Any]]
Labels = tuple[tuple[str, str], ...]
Value = float | Histogram

FAILURES = "oarlock_telemetry_failures_total"


@dataclass(frozen=True)
class Family:
    """A metric with its values, each under other labels."""

    metric: Metric
    samples: dict[Labels, Value]


@dataclass(frozen=True, eq=False)
class _Added:
    source: Source
    labels: dict[str, str]


class Registry:
    """The sources of one process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._added: list[_Added] = []
        self._failures = 0
        self._complained: set[_Added] = set()

    def add(self, source: Source, **labels: str) -> Callable[[], None]:
        """Ask ``source`` at every scrape, ``labels`` beside its own, until what is returned is called."""
        added = _Added(source, labels)
        with self._lock:
            self._added.append(added)

        def remove() -> None:
            with self._lock:
                if added in self._added:
                    self._added.remove(added)
                self._complained.discard(added)

        return remove

    @contextmanager
    def added(self, source: Source, **labels: str) -> Iterator[None]:
        """Ask ``source`` while the body runs."""
        remove = self.add(source, **labels)
        try:
            yield
        finally:
            remove()

    def collect(self) -> list[Family]:
        """Return the metrics that have values, in the order of the table."""
        with self._lock:
            added = list(self._added)
        found: dict[str, dict[Labels, Value]] = {}
        for each in added:
            try:
                # Whole or not at all: half a source's values would look like all of them.
                values = list(_values(each))
            except Exception as error:
                self._failed(each, error)
                continue
            for name, labels, value in values:
                # The first one stands: a page with two values of one metric under the same labels is refused whole.
                found.setdefault(name, {}).setdefault(labels, value)
        found[FAILURES] = {(): self._failures}
        return [Family(metric, found[metric.name]) for metric in METRICS if found.get(metric.name)]

    def _failed(self, added: _Added, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            again = added in self._complained
            self._complained.add(added)
        # Scrapes come every few seconds, for as long as the job runs.
        level = logging.DEBUG if again else logging.WARNING
        logger.log(level, "event=telemetry_failed labels=%s error=%s: %s", added.labels, type(error).__name__, error)


def _values(added: _Added) -> Iterator[tuple[str, Labels, Value]]:
    for name, found in added.source().items():
        metric = BY_NAME[name]
        given = {n: v for n, v in added.labels.items() if n in metric.labels}
        own = tuple(n for n in metric.labels if n not in given)
        for key, value in found.items() if isinstance(found, Mapping) else (((), found),):
            texts = (key,) if isinstance(key, str) else tuple(key)
            if len(texts) != len(own):
                raise ValueError(f"{name}: labels {texts} came, wanted {own}")
            if isinstance(value, Histogram) != (metric.kind == "histogram") or not isinstance(value, Real | Histogram):
                raise TypeError(f"{name}: {type(value).__name__} is no value of a {metric.kind}")
            labels = {**given, **dict(zip(own, texts, strict=True))}
            yield (
                name,
                tuple((n, labels[n]) for n in metric.labels),
                value if isinstance(value, Histogram) else _plain(value),
            )


def _plain(value: Any) -> float:
    """Return a number as Python's own, integers exactly."""
    return int(value) if hasattr(value, "__index__") else float(value)
