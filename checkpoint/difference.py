# SPDX-License-Identifier: Apache-2.0
"""What differs between two cuts, of one job or of two: keys that came, left and changed, and the largest change.

Invariant: one block of each is in memory at a time; nothing loops over keys. Tables are compared by name, if they have the same
dim and number of blocks, for then a key is in the same block of both.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.chain import among
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.embedding.spec import DenseSpec, TableSpec

_PIECE = 1 << 16
Side = tuple[Reading, Manifest]


@dataclass
class Difference:
    """Of a table: keys; of a dense parameter: values in ``same`` and ``changed``. ``problem``: why it could not be compared.

    A row has changed if its weights, state or counters have; ``largest`` is the largest change of a weight.
    """

    kind: str
    name: str
    added: int = 0
    removed: int = 0
    changed: int = 0
    same: int = 0
    largest: float = 0.0
    largest_key: int | None = None
    problem: str = ""

    @property
    def differs(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.problem)

    def as_json(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and (name, value) != ("problem", "")
        }


def compare(before: Side, after: Side, progress: Callable[[int, int], None] | None = None) -> list[Difference]:
    """Return a Difference for every table and dense parameter of either cut. ``progress(done, total)`` is told blocks."""
    found = [_pair(kind, name, before[1], after[1]) for kind, name in _names(before[1], after[1])]
    entries = [{(e.kind, e.name, e.block): e for e in manifest.blocks} for _, manifest in (before, after)]
    whole = {(each.kind, each.name): each for each in found if not each.problem}
    keys = [key for key in entries[0] if key[:2] in whole]
    for done, key in enumerate(keys, 1):
        one, other = (
            side[0].load_block(side[1], known[key]) for side, known in zip((before, after), entries, strict=True)
        )
        (_dense if key[0] == "dense" else _rows)(whole[key[:2]], one, other)
        if progress is not None:
            progress(done, len(keys))
    return found


def _names(before: Manifest, after: Manifest) -> list[tuple[str, str]]:
    names = [("rows", name) for manifest in (before, after) for name in manifest.table_specs()]
    return list(dict.fromkeys(names + [("dense", name) for each in (before, after) for name in each.dense_specs()]))


def _pair(kind: str, name: str, before: Manifest, after: Manifest) -> Difference:
    specs: list[TableSpec | DenseSpec | None] = [
        (each.table_specs() if kind == "rows" else each.dense_specs()).get(name) for each in (before, after)
    ]
    if None in specs:
        return Difference(kind, name, problem=f"only the {'second' if specs[0] is None else 'first'} cut has it")
    forms = [_form(spec) for spec in specs if spec is not None]
    return Difference(kind, name, problem="" if forms[0] == forms[1] else f"it was {forms[0]}, and is {forms[1]}")


def _form(spec: TableSpec | DenseSpec) -> str:
    if isinstance(spec, TableSpec):
        return f"rows of {spec.dim} in {spec.blocks} blocks"
    return f"of shape {spec.shape} in slices of {spec.slice}"


def _rows(found: Difference, one: BlockImage, other: BlockImage) -> None:
    stays, stayed = among(one.keys, other.keys), among(other.keys, one.keys)
    found.removed += int(np.count_nonzero(~stays))
    found.added += int(np.count_nonzero(~stayed))
    a, b = np.flatnonzero(stays), np.flatnonzero(stayed)
    for begin in range(0, len(a), _PIECE):
        piece, along = a[begin : begin + _PIECE], b[begin : begin + _PIECE]
        changed = np.zeros(len(piece), np.bool_)
        for name in ("weights", "state", "counters"):
            x, y = getattr(one, name)[piece], getattr(other, name)[along]
            changed |= _unlike(x, y)
            if name == "weights" and len(piece):
                _largest(found, np.abs(y.astype(np.float64) - x).max(axis=1), one.keys[piece])
        found.changed += int(np.count_nonzero(changed))
        found.same += int(len(piece) - np.count_nonzero(changed))


def _unlike(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
    if x.shape[1] != y.shape[1]:
        return np.ones(len(x), np.bool_)  # another optimizer, or other counters
    differs: NDArray[np.bool_] = (x != y).any(axis=1)
    return differs


def _dense(found: Difference, one: BlockImage, other: BlockImage) -> None:
    changes = np.abs(other.weights[0].astype(np.float64) - one.weights[0])
    found.changed += int(np.count_nonzero(changes))
    found.same += int(np.count_nonzero(changes == 0))
    found.largest = max(found.largest, float(changes.max(initial=0.0)))


def _largest(found: Difference, changes: NDArray[np.float64], keys: NDArray[np.uint64]) -> None:
    at = int(changes.argmax())
    if changes[at] > found.largest:
        found.largest, found.largest_key = float(changes[at]), int(keys[at])
