# SPDX-License-Identifier: Apache-2.0
"""Micro-batching: what several callers ask for while a batch is computed is the next batch.

Invariant: nobody waits while a scorer is free, so who is alone is answered at once; what waits is bounded in samples and in time,
beyond both callers are told that the process is overloaded (Unavailable). A batch is of one state of the model, and what fails
in it fails for those alone whose samples are at fault. The caller's own thread computes: whoever heads the queue when a scorer
becomes free takes those behind it along. Any number of threads.
"""

from collections import deque
from collections.abc import Sequence
from threading import Event, Lock

from oarlock.proto.errors import PSError, Unavailable
from oarlock.serving.scorer import Samples, Scored, Scorer, State
from oarlock.telemetry.histogram import Histogram

# Samples that wait for a scorer, all callers together.
QUEUE_SAMPLES = 65_536
QUEUE_SECONDS = 1.0
SAMPLES = tuple(float(1 << i) for i in range(0, 17, 2))


class _Entry:
    """A caller's samples, and what came of them."""

    __slots__ = ("error", "samples", "scored", "scorer", "state", "turned")

    def __init__(self, state: State, samples: Samples) -> None:
        self.state = state
        self.samples = samples
        self.turned = Event()
        # Whom it may compute with, if it is to compute.
        self.scorer: Scorer | None = None
        self.scored: Scored | None = None
        self.error: Exception | None = None


class Batcher:
    """Shares ``scorers`` out, whose ``max_batch`` bounds what is joined; one caller alone may have more."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        *,
        queue_samples: int = QUEUE_SAMPLES,
        queue_seconds: float = QUEUE_SECONDS,
    ) -> None:
        self._max_batch = min(scorer.max_batch for scorer in scorers)
        self._queue_samples = queue_samples
        self._queue_seconds = queue_seconds
        self._lock = Lock()
        # One of the two is empty.
        self._free = list(scorers)
        self._queue: deque[_Entry] = deque()
        self._waiting = 0
        self.batches = 0
        self.overloaded = 0
        # Samples of a batch.
        self.batch_samples = Histogram(SAMPLES)

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return self._waiting

    def score(self, state: State, samples: Samples) -> Scored:
        """Return the scores of samples; Unavailable if too much waits already, or did not come to its turn in time."""
        entry = _Entry(state, samples)
        with self._lock:
            if self._free:
                entry.scorer = self._free.pop()
            elif self._queue and self._waiting + samples.samples > self._queue_samples:
                self.overloaded += 1
                raise Unavailable(
                    f"overloaded: {self._waiting} samples wait for a prediction already, the limit is {self._queue_samples}: "
                    "ask again in a moment, or another server"
                )
            else:
                self._queue.append(entry)
                self._waiting += samples.samples
        if entry.scorer is None and not entry.turned.wait(self._queue_seconds):
            self._leave(entry)
        if entry.scorer is not None:
            self._lead(entry, entry.scorer)
        if entry.error is not None:
            raise entry.error
        assert entry.scored is not None
        return entry.scored

    def _leave(self, entry: _Entry) -> None:
        """Take an entry out of the queue whose time is over; if its turn has just come, wait for what comes of it."""
        with self._lock:
            if entry in self._queue:
                self._queue.remove(entry)
                self._waiting -= entry.samples.samples
                self.overloaded += 1
                raise Unavailable(
                    f"overloaded: a prediction did not come to its turn within {self._queue_seconds:g} s: ask again in a "
                    "moment, or another server"
                )
        entry.turned.wait()

    def _lead(self, entry: _Entry, scorer: Scorer) -> None:
        batch = self._taken(entry)
        try:
            self._compute(batch, scorer)
        finally:
            with self._lock:
                head = self._queue.popleft() if self._queue else None
                if head is None:
                    self._free.append(scorer)
                else:
                    self._waiting -= head.samples.samples
                    head.scorer = scorer
            if head is not None:
                head.turned.set()
            for other in batch[1:]:
                other.turned.set()

    def _taken(self, entry: _Entry) -> list[_Entry]:
        """Return the batch that ``entry`` heads: with it, those that wait next, as far as they fit."""
        batch, room = [entry], self._max_batch - entry.samples.samples
        with self._lock:
            while self._queue and self._queue[0].state is entry.state and self._queue[0].samples.samples <= room:
                found = self._queue.popleft()
                self._waiting -= found.samples.samples
                room -= found.samples.samples
                batch.append(found)
            self.batches += 1
            self.batch_samples.observe(sum(each.samples.samples for each in batch))
        return batch

    def _compute(self, batch: list[_Entry], scorer: Scorer) -> None:
        try:
            found = scorer.score(batch[0].state, [each.samples for each in batch])
        except Exception as error:
            if len(batch) == 1 or (isinstance(error, PSError) and error.retryable):
                # What may be had later is lacked by all of them alike.
                for each in batch:
                    each.error = error
            else:
                for each in batch:
                    self._compute([each], scorer)
            return
        for each, scored in zip(batch, found, strict=True):
            each.scored = scored
