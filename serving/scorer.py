# SPDX-License-Identifier: Apache-2.0
"""A scorer: the bound graph of a model, fed with the rows and dense parameters of one state of it.

Invariant: scores are those of training's evaluation for the same samples: the same graph, rows as a pull reads them, and the
dense parameters of the same state, of which one array serves all of a batch. A scorer belongs to one thread at a time
(batcher.py); what it returns is the caller's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from oarlock.nn import Model
from oarlock.serving.snapshot import Wanted


class State(Protocol):
    """One state of a model, such as a Snapshot, or the live model of one run of a job, whose rows and dense parameters go on.

    ``dense``: float32[P], all dense parameters, which are not changed: another state of them is another array.
    """

    @property
    def dense(self) -> NDArray[np.float32]: ...

    def lookup_many(self, wanted: Sequence[Wanted]) -> Sequence[int | None]:
        """Write the weights of keys: uint64[n] to out: float32[n, dim], for each (table, keys, out); return how many keys of each
        have no row (None: not known)."""


class Samples(Protocol):
    """Encoded rows: keys uint64[samples] or uint64[samples, fields] by lookup, other inputs float32[samples, width] by name."""

    @property
    def samples(self) -> int: ...
    @property
    def keys(self) -> Mapping[str, NDArray[np.uint64]]: ...
    @property
    def feeds(self) -> Mapping[str, NDArray[np.float32]]: ...


class Scored(NamedTuple):
    """Scores: float32[samples], and how many keys had no row; None: not known of these samples alone."""

    scores: NDArray[np.float32]
    missing: int | None


class Scorer:
    """Scores any number of samples, at most ``max_batch`` of them at a time."""

    def __init__(self, model: Model, max_batch: int) -> None:
        self.max_batch = max_batch
        self._lookups = model.lookups
        self._inputs = [each.name for each in model.dense_inputs]
        self._program = model.bind(max_batch)
        fields = max((lookup.fields for lookup in model.lookups), default=1)
        self._positions = np.arange(max_batch * fields, dtype=np.int32)
        self._rows = {
            lookup.name: np.empty((max_batch * lookup.fields, lookup.dim), np.float32) for lookup in model.lookups
        }
        # The array that the program's parameters are a copy of.
        self._dense: NDArray[np.float32] | None = None

    def score(self, state: State, parts: Sequence[Samples]) -> list[Scored]:
        """Return the scores of each part; one part may have any number of samples, several ``max_batch`` together."""
        # Once: of a live model it may be another array at any moment.
        dense = state.dense
        if self._dense is not dense:
            self._program.flat_parameters[:] = dense
            self._program.prepare()
            self._dense = dense
        if len(parts) == 1 and (size := parts[0].samples) > self.max_batch:
            runs = [slice(at, min(at + self.max_batch, size)) for at in range(0, size, self.max_batch)]
            found = [self._scored(state, parts, run) for run in runs]
            scores = [scored.scores for each in found for scored in each]
            return [Scored(np.concatenate(scores), _sum([scored.missing for each in found for scored in each]))]
        return self._scored(state, parts, slice(None))

    def _scored(self, state: State, parts: Sequence[Samples], run: slice) -> list[Scored]:
        """Return the scores of the samples of ``run`` of each part; together they are ``max_batch`` at most."""
        feeds: dict[str, Any] = {name: _joined([part.feeds[name][run] for part in parts]) for name in self._inputs}
        wanted: list[Wanted] = []
        for lookup in self._lookups:
            rows, at = self._rows[lookup.name], 0
            for part in parts:
                keys = part.keys[lookup.name][run]
                wanted.append((lookup.table, keys.reshape(-1), rows[at : at + keys.size]))
                at += keys.size
            shape = (at // lookup.fields, lookup.fields) if lookup.fields > 1 else (at,)
            feeds[lookup.name] = (rows[:at], self._positions[:at].reshape(shape))
        found = state.lookup_many(wanted)
        missing = [_sum(found[number :: len(parts)]) for number in range(len(parts))]
        sizes = [len(range(*run.indices(part.samples))) for part in parts]
        scores, at, out = self._program.predict(feeds, sum(sizes)).copy(), 0, []
        for size, lacking in zip(sizes, missing, strict=True):
            out.append(Scored(scores[at : at + size], lacking))
            at += size
        return out


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [each for each in counts if each is not None]
    return sum(known) if len(known) == len(counts) else None


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
