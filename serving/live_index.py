# SPDX-License-Identifier: Apache-2.0
"""The nearest rows of one table of a live model: an index that follows its rows a moment later, and answers by the rows.

    change     noted by key alone, beside the path that applies it
    lap        some noted keys: their rows are looked up, and those that differ from the index's are changed there, or leave
    answer     candidates of the index, looked up in the live table: who has no row now is none, the others are scored by it
    rebuild    once many rows have changed, an index is made beside the one that answers, and told of what changes meanwhile

Invariant: a key that is answered has a row, with that score, at a moment of the answer. What a change does to the candidates lags
behind by ``lag`` at most. ``note`` is called with the model's lock held, ``begin`` and ``step`` by one thread, ``rebuild`` by
one, beside that; ``nearest`` by any.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.fresh import FreshTable
from oarlock.proto.errors import Unavailable
from oarlock.serving.backlog import Backlog
from oarlock.serving.nearest import LEAST_ROWS, NearestIndex
from oarlock.serving.recall import REBUILD, RecallSpec, check_vectors, no_index
from oarlock.serving.vectors import BLOCK_ROWS, Floats, Keys, Nearest, Vectors, best_of, top_columns
from oarlock.telemetry.histogram import Histogram

# Keys that are put in place at once: nobody searches meanwhile.
LAP_KEYS = 4096
# Up to here all rows are compared while there is no index yet: tens of milliseconds for each vector.
EXACT_ROWS = 1_000_000
# Candidates beyond those that are asked for, and this share of these, for some may have no row any more, or a worse one.
SPARE, SPARE_SHARE = 16, 0.25
# Of all time, to have indexes made anew; so long after one that failed.
REBUILD_SHARE, FAILED_SECONDS = 0.1, 10.0


class _Kept:
    """An index, and what it lacks of ``table``; ``find`` tells which keys have rows there."""

    def __init__(self, index: NearestIndex, find: Callable[[Keys], NDArray[np.bool_]]) -> None:
        self.index = index
        self.backlog = Backlog(self._matters)
        self._find = find
        # Ascending; of these it is made, which takes long. None: not known yet, or made.
        self._begun_with: Keys | None = None
        self._built = False

    def build(self, keys: Keys, rows: Floats, going_on: Callable[[], object]) -> None:
        self._begun_with = np.sort(keys)
        self.index.build(keys, rows, going_on=going_on)
        self._built, self._begun_with = True, None

    def _matters(self, keys: Keys) -> NDArray[np.bool_]:
        begun_with, built = self._begun_with, self._built
        if built:
            known = self.index.holds(keys)
        elif begun_with is None:
            return np.ones(len(keys), np.bool_)
        else:
            # Nobody who notes may wait for the index itself.
            known = np.isin(keys, begun_with, assume_unique=True)
        return self._find(keys) | known


class LiveIndex:
    """The index of ``table``, whose changes are under ``lock``. ``going_on`` raises when all is over; ``lags`` observes lags."""

    def __init__(
        self,
        spec: RecallSpec,
        table: FreshTable,
        lock: Lock,
        *,
        clock: Callable[[], float],
        lags: Histogram,
        going_on: Callable[[], object] = lambda: None,
    ) -> None:
        self.spec = spec
        self._first, self._end = spec.check_columns(table.spec.dim)
        self._table = table
        self._lock = lock
        self._clock = clock
        self._lags = lags
        self._going_on = going_on
        self._form = Vectors(self.dim, spec.metric)
        # Those that are told of changes, and the one of them that answers.
        self._told: tuple[_Kept, ...] = ()
        # To change these: one may be given up while another one is made.
        self._changing = Lock()
        self._answers: _Kept | None = None
        self._not_before = clock()
        self.rebuilds = 0

    @property
    def dim(self) -> int:
        return self._end - self._first

    @property
    def rows(self) -> int:
        """Rows that the index has."""
        answers = self._answers
        return 0 if answers is None else answers.index.rows

    @property
    def waiting(self) -> int:
        """Changes that are still to be put in place, of a key as many as were noted."""
        answers = self._answers
        return 0 if answers is None else answers.backlog.waiting

    @property
    def ready(self) -> bool:
        """Whether it can be asked: by an index, or by comparing all rows, where these are not too many."""
        answers = self._answers
        return answers is not None and (not self.spec.ann or answers.index.trained or answers.index.rows <= EXACT_ROWS)

    @property
    def lag(self) -> float:
        """For how long, in seconds, the change of which that is longest has not been put in place."""
        answers = self._answers
        oldest = None if answers is None else answers.backlog.oldest
        return 0.0 if oldest is None else max(0.0, self._clock() - oldest)

    # In step

    def note(self, keys: Keys) -> None:
        """Take note of keys: uint64[n] whose rows have just changed, come or gone."""
        for kept in self._told:
            kept.backlog.note(keys, self._clock())

    def begin(self) -> None:
        """Have all rows as they are, for exact search, unless they are here already, or could not be a moment ago."""
        if self._answers is None and self._clock() >= self._not_before:
            self._answers = self._made(ann=False)

    def stop(self) -> None:
        """Have nothing, and answer nothing, until ``begin``: what went wrong may have left it in any state."""
        with self._changing:
            self._answers, self._told = None, ()
            self._not_before = self._clock() + FAILED_SECONDS

    def step(self) -> bool:
        """Put some of what was noted in place; return whether there was any."""
        answers = self._answers
        noted_at = None if answers is None else self._lap(answers)
        if noted_at is None:
            return False
        self._lags.observe(max(0.0, self._clock() - noted_at))
        return True

    @property
    def due(self) -> bool:
        """Whether ``rebuild`` should be called."""
        answers = self._answers
        if answers is None or not self.spec.ann or answers.index.rows < LEAST_ROWS or self._clock() < self._not_before:
            return False
        return not answers.index.trained or answers.index.changed > REBUILD * answers.index.rows

    def rebuild(self) -> None:
        """Make an index of the rows as they are by now, beside the one that answers, and exchange them once it is in step."""
        begun = self._clock()
        self._not_before = begun + FAILED_SECONDS
        made = self._made(ann=True)
        # What changed while it was made; then it is behind no farther than the other one is.
        for _ in range(made.backlog.waiting // LAP_KEYS + 1):
            self._going_on()
            self._lap(made)
        with self._changing:
            if made not in self._told:
                # All were given up meanwhile, and it has heard of nothing since.
                return
            self._answers, self._told = made, (made,)
            self.rebuilds += 1
            ended = self._clock()
            self._not_before = ended + (ended - begun) * (1 / REBUILD_SHARE - 1)

    def _made(self, *, ann: bool) -> _Kept:
        """Return an index that is told of changes from before it has any row on."""
        made = _Kept(NearestIndex(self.dim, self.spec.metric, ann=ann), lambda keys: self._rows(keys)[1])
        with self._changing:
            self._told = (*self._told, made)
        try:
            keys = self._keys()
            rows, present = self._rows(keys)
            made.build(keys[present], rows[present], self._going_on)
        except BaseException:
            with self._changing:
                self._told = tuple(kept for kept in self._told if kept is not made)
            raise
        return made

    def _keys(self) -> Keys:
        found = []
        for block in range(self._table.spec.blocks):
            with self._lock:
                found.append(self._table.keys_of(block))
        return np.concatenate(found)

    def _rows(self, keys: Keys) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the vectors of keys as the table has them: float32[n, dim], and who has a row: bool[n]."""
        out = np.empty((len(keys), self._table.spec.dim), np.float32)
        present = self._table.find(keys, out)
        return out[:, self._first : self._end], present

    def _lap(self, kept: _Kept) -> float | None:
        """Put some of what was noted in place; return since when it was to be, None: there was nothing."""
        keys, noted_at = kept.backlog.take(LAP_KEYS)
        if not len(keys):
            return None
        rows, present = self._rows(keys)
        gone, keys, rows = keys[~present], keys[present], rows[present]
        other = kept.index.differing(keys, rows)
        gone = gone[kept.index.holds(gone)]
        if other.any() or len(gone):
            kept.index.apply(keys[other], rows[other], gone)
        kept.backlog.done()
        return noted_at

    # Asking

    def nearest(
        self, vectors: Floats, k: int, *, exact: bool = False, among: Keys | None = None, without: Keys | None = None
    ) -> Nearest:
        """Return the ``k`` nearest rows of vectors: float32[q, dim]; ``exact``: of all that the index has."""
        check_vectors(self.spec.table, self.dim, vectors)
        if among is not None:
            return self._among(self._form.unit(vectors), k, among, without)
        return self._found(vectors, k, k + max(SPARE, int(SPARE_SHARE * k)), {"exact": exact, "without": without})

    def check_ready(self) -> None:
        """Raise Unavailable unless it can be asked."""
        if not self.ready:
            raise no_index({self.spec.table: self.spec}, self.spec.table)

    def _found(self, vectors: Floats, k: int, asked: int, options: dict[str, Any]) -> Nearest:
        """Return the ``k`` nearest of ``asked`` candidates, or of more, where too few of these have rows."""
        if len(vectors) > 1 and len(vectors) * asked > BLOCK_ROWS:
            half = len(vectors) // 2
            parts = [self._found(each, k, asked, options) for each in (vectors[:half], vectors[half:])]
            return Nearest(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        answers = self._answers
        if answers is None:
            raise Unavailable(f"the index of table {self.spec.table} is made anew: ask again")
        candidates, _ = answers.index.search(vectors, asked, **options)
        found = self._checked(self._form.unit(vectors), candidates, k)
        lacking = (candidates.counts == asked) & (found.counts < k)
        if lacking.any():
            again = self._found(vectors[lacking], k, 2 * asked, options)
            found.keys[lacking], found.scores[lacking], found.counts[lacking] = again
        return found

    def _checked(self, queries: Floats, candidates: Nearest, k: int) -> Nearest:
        """Return the best of candidates by the rows that they have now."""
        count, asked = candidates.keys.shape
        rows, present = self._rows(candidates.keys.reshape(-1))
        rows = self._form.unit(rows).reshape(count, asked, self.dim)
        scores = np.einsum("qd,qmd->qm", queries, rows)
        there = present.reshape(count, asked) & (np.arange(asked) < candidates.counts[:, None])
        scores[~there | ~np.isfinite(scores)] = -np.inf
        return best_of(candidates.keys, scores, k)

    def _among(self, queries: Floats, k: int, among: Keys, without: Keys | None) -> Nearest:
        """Return the nearest of some keys, by the rows that they have now."""
        wanted = np.unique(among) if without is None else np.setdiff1d(among, without)
        best, where = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.uint64)
        for begin in range(0, len(wanted), BLOCK_ROWS):
            keys = wanted[begin : begin + BLOCK_ROWS]
            rows, present = self._rows(keys)
            keys, rows = keys[present], self._form.unit(rows[present])
            scores = queries @ rows.T
            scores[~np.isfinite(scores)] = -np.inf
            top = top_columns(scores, k)
            best = np.concatenate([best, np.take_along_axis(scores, top, 1)], axis=1)
            where = np.concatenate([where, keys[top]], axis=1)
            top = top_columns(best, k)
            best, where = np.take_along_axis(best, top, 1), np.take_along_axis(where, top, 1)
        return best_of(where, best, k)
