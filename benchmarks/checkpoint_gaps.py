# SPDX-License-Identifier: Apache-2.0
"""What workers' notes of their pushes say: the gaps between two that were acknowledged, speeds, and the rows that were touched.

Invariant: a group counts once, when the last of its messages was acknowledged. Pure functions over arrays.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.data.files import files_from_json
from oarlock.data.splits import locate, plan_splits

NOTES = np.dtype([("sent", "<f8"), ("told", "<f8"), ("split", "<i8"), ("group", "<i8"), ("cut", "<i8")])


@dataclass(frozen=True)
class Spans:
    """One cut by ``time.monotonic``: asked for; its gate shut, and opened again; all files written; committed, old ones gone."""

    cut: int
    asked: float
    shut: float
    opened: float
    written: float
    committed: float


def groups(notes: NDArray[np.void]) -> NDArray[np.void]:
    """Return one line for each (split, group), in the order in which they were acknowledged."""
    order = np.lexsort((notes["told"], notes["group"], notes["split"]))
    found = notes[order]
    last = np.ones(len(found), np.bool_)
    last[:-1] = (found["split"][1:] != found["split"][:-1]) | (found["group"][1:] != found["group"][:-1])
    whole = found[last]
    ordered: NDArray[np.void] = whole[np.argsort(whole["told"], kind="stable")]
    return ordered


def median_gap(told: NDArray[np.float64]) -> float:
    """Return the usual seconds between two acknowledged pushes."""
    return float(np.median(np.diff(told)))


def longest_gap(told: NDArray[np.float64], begin: float, end: float) -> float:
    """Return the longest gap between two acknowledged pushes that overlaps [begin, end]; 0 if there is none."""
    over = (told[:-1] < end) & (told[1:] > begin)
    return float(np.diff(told)[over].max(initial=0.0))


def speed(workers: Iterable[NDArray[np.float64]], begin: float, end: float) -> float:
    """Return how many groups all workers had acknowledged in a second of [begin, end]."""
    return sum(int(((told > begin) & (told <= end)).sum()) for told in workers) / max(1e-9, end - begin)


def touched_rows(spec: JobSpec, keys: NDArray[np.uint64], found: NDArray[np.void]) -> int:
    """Return how many distinct rows these groups pushed to, from the data's ``keys`` uint64[samples, fields] alone.

    An epoch that has more samples has these again and again; no group has the last of them and the first.
    """
    files = files_from_json(list(spec.files))
    begins = np.cumsum([0, *(file.rows for file in files)])
    first_of = {file.path: int(begin) for file, begin in zip(files, begins, strict=False)}
    plan = plan_splits(files, spec.rows_per_split)
    parts = []
    for split, group in zip(found["split"].tolist(), found["group"].tolist(), strict=True):
        _, where = locate(split, plan, spec.seed)
        begin = first_of[where.file.path] + where.first_row + group * spec.batch_rows
        count = min(spec.batch_rows, where.rows - group * spec.batch_rows)
        parts.append(keys[begin % len(keys) :][:count].reshape(-1))
    return len(np.unique(np.concatenate(parts))) if parts else 0
