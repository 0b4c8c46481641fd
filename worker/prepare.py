# SPDX-License-Identifier: Apache-2.0
"""Prepare: examples to a group whose keys are distinct and ordered by block, ready to be pulled.

Invariant: lookups that share a table share one KeySet, so a key is pulled and pushed once per group. One thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.client.probe import Probe
from oarlock.client.router import Routes
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySet, KeySorter
from oarlock.nn import Model
from oarlock.proto.errors import InvalidArgument, SpecMismatch
from oarlock.worker.recipe import Example


@dataclass
class Prepared:
    """A group on its way: what to pull, into which buffers, and where each lookup's samples find their rows.

    ``sizes``: samples of each of its batches, which lie one after the other in ``inverse`` and ``feeds``.
    """

    sizes: tuple[int, ...]
    keys: dict[str, KeySet]
    inverse: dict[str, NDArray[np.int32]]
    feeds: dict[str, NDArray[np.float32]]
    rows: dict[str, NDArray[np.float32]]
    dense: NDArray[np.float32]
    # Pushes that each shard had applied when the rows were pulled.
    seen: dict[int, int] = field(default_factory=dict)
    # If its pull is one that finds out what staleness costs: what its rows are compared with, and what came of that.
    probe: Probe | None = None
    excess: float = 0.0

    @property
    def samples(self) -> int:
        return sum(self.sizes)


class Preparer:
    """Turns Examples into Prepared groups; its sorter's scratch memory is used again and again."""

    def __init__(self, model: Model, layout: Layout) -> None:
        self._sorter = KeySorter()
        self._layout = layout
        self._tables: dict[str, list[str]] = {}
        for lookup in model.lookups:
            self._tables.setdefault(lookup.table, []).append(lookup.name)
            number = layout.table_index.get(lookup.table)
            if number is None or layout.tables[number].dim != lookup.dim:
                has = "no such table" if number is None else f"it with dim {layout.tables[number].dim}"
                raise SpecMismatch(
                    f"the recipe's model looks up table {lookup.table!r} with dim {lookup.dim}, the job has {has}: "
                    "the recipe is not the one that planned this job",
                    table=lookup.table,
                )
        if tuple(model.parameters) != layout.dense:
            raise SpecMismatch(
                "the dense parameters of the recipe's model are not those of the job: the recipe is not the one that "
                "planned it"
            )
        self._salts = {t: table_salt(t) for t in self._tables}

    def prepare(self, examples: Sequence[Example], routes: Routes) -> Prepared:
        """Return a group's examples with their keys made distinct, in the order in which ``routes`` groups blocks by owner."""
        example = examples[0] if len(examples) == 1 else _joined(examples)
        keys: dict[str, KeySet] = {}
        inverse: dict[str, NDArray[np.int32]] = {}
        rows: dict[str, NDArray[np.float32]] = {}
        for table, lookups in self._tables.items():
            number = self._layout.table_index[table]
            spec = self._layout.tables[number]
            missing = [name for name in lookups if name not in example.keys]
            if missing:
                raise InvalidArgument(f"the recipe's encode() gave no keys for lookup {missing[0]!r}")
            raw = [example.keys[name] for name in lookups]
            flat = raw[0].reshape(-1) if len(raw) == 1 else np.concatenate([r.reshape(-1) for r in raw])
            made = self._sorter.build(flat, self._salts[table], spec.blocks.bit_length() - 1, routes.ranks[number])
            keys[table] = made
            at = 0
            for name, r in zip(lookups, raw, strict=True):
                inverse[name] = made.inverse[at : at + r.size].reshape(r.shape)
                at += r.size
            rows[table] = np.empty((len(made.keys), spec.dim), np.float32)
        dense = np.empty(self._layout.dense_size, np.float32)
        return Prepared(tuple(e.samples for e in examples), keys, inverse, example.feeds, rows, dense)


def _joined(examples: Sequence[Example]) -> Example:
    """Return the examples of several batches as one; each batch is found in it again by its samples."""
    for example in examples:
        arrays: dict[str, NDArray[Any]] = {**example.keys, **example.feeds}
        for name, values in arrays.items():
            if len(values) != example.samples:
                raise InvalidArgument(
                    f"the recipe's encode() gave {len(values)} rows of {name!r} for {example.samples} samples: with "
                    "accumulate > 1 every array needs one for each sample"
                )
        if example.keys.keys() != examples[0].keys.keys() or example.feeds.keys() != examples[0].feeds.keys():
            raise InvalidArgument("the recipe's encode() gave other inputs for one batch than for another of its group")
    keys = {name: np.concatenate([e.keys[name] for e in examples]) for name in examples[0].keys}
    feeds = {name: np.concatenate([e.feeds[name] for e in examples]) for name in examples[0].feeds}
    return Example(sum(e.samples for e in examples), keys, feeds)
