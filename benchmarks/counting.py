# SPDX-License-Identifier: Apache-2.0
"""Counting: data with skewed keys, and what a finished counting job's checkpoint says against what the files say.

Invariant: what should be there is computed from the Parquet files alone; nothing of the mechanism that is tested is asked.
Pure functions over files.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.simulation.counting import batches_of

FILES = 4
GROUP_ROWS = 1024
TEST_ROWS = 2048
# Above it float32 counts no more.
LIMIT = 1 << 24
# The table and the dense parameter that count; a job may have others beside them.
COUNTERS = ("key", "batches")


@dataclass(frozen=True)
class Count:
    """What a counting job came to: sums of shortages and of excesses, and whether what it told of itself is true.

    ``evaluation_exact``: of a job whose metric is the count.
    """

    lost: int
    doubled: int
    groups_lost: int
    groups_doubled: int
    samples_exact: bool
    evaluation_exact: bool
    rows: int
    epochs: int

    @property
    def exact(self) -> bool:
        return not (self.lost or self.doubled or self.groups_lost or self.groups_doubled)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_data(folder: Path, *, rows: int, keys: int, seed: int) -> None:
    """Write ``rows`` training rows and some test rows of two key columns, a few keys far more often than the others."""
    rng = np.random.default_rng(seed)
    for name, count, files in (("train", rows, FILES), ("test", TEST_ROWS, 1)):
        (folder / name).mkdir(parents=True)
        for part, part_rows in enumerate(np.diff(np.linspace(0, count, files + 1).astype(int)).tolist()):
            table = pa.table({c: (keys * rng.random(part_rows) ** 3).astype(np.int64) for c in "ab"})
            pq.write_table(table, folder / name / f"part-{part}.parquet", row_group_size=GROUP_ROWS)


def _columns(folder: Path) -> list[NDArray[np.int64]]:
    return [
        pa.concat_tables([pq.read_table(f, columns=[c]) for f in sorted(folder.glob("*.parquet"))])[c].to_numpy()
        for c in "ab"
    ]


def check(data: Path, folder: Path, spec: JobSpec, history: list[dict[str, Any]]) -> Count:
    """Compare the final checkpoint in a job's ``folder``, and its ``history``, with the files in ``data``."""
    train, test = _columns(data / "train"), _columns(data / "test")
    size = 1 + int(max(column.max() for column in (*train, *test)))
    per_epoch = sum((np.bincount(column, minlength=size) for column in train), np.zeros(size, np.int64))
    wanted = per_epoch * spec.epochs
    if wanted.max() >= LIMIT:
        raise ValueError(f"a key occurs {wanted.max()} times: float32 cannot count that")
    found, groups = _counted(folder, size)
    missing = wanted - found
    group_count = sum(batches_of(spec)) * spec.epochs
    rows = len(train[0])
    return Count(
        lost=int(missing[missing > 0].sum()),
        doubled=int(-missing[missing < 0].sum()),
        groups_lost=max(0, group_count - groups),
        groups_doubled=max(0, groups - group_count),
        samples_exact=[r["samples"] for r in history] == [rows] * spec.epochs,
        # Nobody trains while an epoch is evaluated, so what it sees are the counts of all epochs until then.
        evaluation_exact=[r["metrics"].get("count") for r in history]
        == [float((per_epoch * (e + 1))[test[0]].sum()) / len(test[0]) for e in range(spec.epochs)],
        rows=rows,
        epochs=spec.epochs,
    )


def _counted(folder: Path, size: int) -> tuple[NDArray[np.int64], int]:
    """Return how often each key, and how many groups, were counted by the newest checkpoint's rows."""
    store = LocalStore(folder / "checkpoints")
    manifest = store.load_manifest()
    found = np.zeros(size, np.int64)
    groups = 0
    for entry in manifest.blocks:
        if entry.name not in COUNTERS:
            continue
        image = store.load_block(manifest, entry)
        if image.kind == "dense":
            groups += int(image.weights.sum(dtype=np.float64))
        elif len(image.keys) and int(image.keys.max()) >= size:
            raise ValueError(f"the checkpoint has key {image.keys.max()}, which stands in no file")
        else:
            found[image.keys.astype(np.int64)] = image.weights[:, 0].astype(np.int64)
    return found, groups
