# SPDX-License-Identifier: Apache-2.0
"""Generated data for `oarlock.benchmarks.end_to_end`: clicks of Criteo's shape and pairs of MovieLens-1M's, as arrays to map.

Ids follow a bounded Zipf law, independently in each field, their ranks scattered by a bijection so that frequent rows are no
neighbours; labels come of a hidden logistic model, so there is something to learn. Invariant: a pure function of its
arguments. Callable from any thread.

    folder/rows-NN.parquet   the column ``row``: which line of the arrays a sample is
    folder/keys.npy          uint64[samples, fields], as fields of a schema have them
    folder/ids.npy           int32[samples, fields], row numbers of one table of all fields (what PyTorch is given)
    folder/numbers.npy       float32[samples, 13], label.npy float32[samples]
    folder/existing-F.npy    uint64[n]: the keys of lookup F whose rows exist before anything is timed
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from oarlock.data.categories import hash_array
from oarlock.data.field_keys import field_salt, write_keys

# Categories of the 26 columns of the Criteo Kaggle data set, as its readers publish them.
CRITEO = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
NUMBERS = 13
USERS, ITEMS = 6040, 3706
EXPONENT, USER_EXPONENT, ITEM_EXPONENT = 1.05, 0.6, 0.9
POSITIVE_PAIRS = 0.2
EFFECTS = 4096
ROWS_PER_GROUP, GROUPS_PER_FILE = 2048, 32


@dataclass(frozen=True)
class DataSize:
    """How many samples, the cap of a field's categories (0: none), and whether rows that no sample names exist too."""

    samples: int
    cap: int
    every_row: bool


def field_name(number: int) -> str:
    """Return the name of a categorical field; its keys depend on it."""
    return f"C{number + 1}"


def categories(cap: int) -> list[int]:
    """Return the number of categories of each field."""
    return [min(n, cap) if cap else n for n in CRITEO]


def zipf_ranks(rng: np.random.Generator, n: int, size: int, exponent: float) -> NDArray[np.int64]:
    """Return int64[size] of ranks 0 to n - 1, P(r) in proportion to (r + 1)^-exponent, by the inverse of the exact law."""
    mass = np.cumsum(np.arange(1, n + 1, dtype=np.float64) ** -exponent)
    # Sorted draws find their places in one walk through the law, not in a search each through megabytes of it.
    drawn = rng.random(size)
    order = np.argsort(drawn)
    ranks = np.empty(size, np.int64)
    ranks[order] = np.searchsorted(mass, drawn[order] * mass[-1], side="left").clip(0, n - 1)
    return ranks


def scattered(ranks: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return (a * rank + b) mod n with a prime to n: each rank has an id of its own."""
    a = int(rng.integers(1, max(2, n)))
    while np.gcd(a, n) != 1:
        a += 1
    return (ranks * a + int(rng.integers(0, n))) % n


def generate_clicks(folder: Path, size: DataSize, *, seed: int = 0) -> int:
    """Write the data of the click models; return how many rows exist before timing."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    counts = categories(size.cap)
    numbers = np.log1p(rng.lognormal(1.0, 1.5, (size.samples, NUMBERS))).astype(np.float32)
    keys = np.empty((size.samples, len(counts)), np.uint64)
    ids = np.empty((size.samples, len(counts)), np.int32)
    logit = numbers @ rng.normal(0, 0.15, NUMBERS).astype(np.float32)
    existing: list[NDArray[np.uint64]] = []
    begin = 0
    for field, n in enumerate(counts):
        found = scattered(zipf_ranks(rng, n, size.samples, EXPONENT), n, rng)
        all_keys = np.empty((n, 1), np.uint64)
        write_keys(hash_array(pa.array(np.arange(n))), field_salt(field_name(field)), all_keys, 0)
        keys[:, field] = all_keys[found, 0]
        ids[:, field] = found + begin
        begin += n
        existing.append(all_keys[:, 0] if size.every_row else all_keys[np.unique(found), 0])
        effects = rng.normal(0, 0.3, EFFECTS).astype(np.float32)
        logit += effects[(found * 2654435761 + field * 97) % EFFECTS]
    logit -= np.quantile(logit, 0.75)
    label = (rng.random(size.samples) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    rows = np.concatenate(existing)
    for name, array in {"keys": keys, "ids": ids, "numbers": numbers, "label": label, "existing-fields": rows}.items():
        np.save(folder / f"{name}.npy", array)
    _write_row_numbers(folder, size.samples)
    return len(rows)


def generate_pairs(folder: Path, samples: int, *, seed: int = 0) -> int:
    """Write the data of NeuMF: users, items and labels that are given, not drawn; return how many rows exist before timing."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    users = scattered(zipf_ranks(rng, USERS, samples, USER_EXPONENT), USERS, rng)
    items = scattered(zipf_ranks(rng, ITEMS, samples, ITEM_EXPONENT), ITEMS, rng)
    pairs = np.stack([users, items], axis=1)
    np.save(folder / "keys.npy", pairs.astype(np.uint64))
    np.save(folder / "ids.npy", pairs.astype(np.int32))
    np.save(folder / "label.npy", (rng.random(samples) < POSITIVE_PAIRS).astype(np.float32))
    np.save(folder / "existing-user.npy", np.arange(USERS, dtype=np.uint64))
    np.save(folder / "existing-item.npy", np.arange(ITEMS, dtype=np.uint64))
    _write_row_numbers(folder, samples)
    return USERS + ITEMS


def _write_row_numbers(folder: Path, samples: int) -> None:
    """Write what splits are made of. Several files: a reader takes in a file's whole footer for each split."""
    per_file = ROWS_PER_GROUP * GROUPS_PER_FILE
    for number, begin in enumerate(range(0, samples, per_file)):
        rows = np.arange(begin, min(begin + per_file, samples), dtype=np.int64)
        pq.write_table(pa.table({"row": rows}), folder / f"rows-{number:02}.parquet", row_group_size=ROWS_PER_GROUP)
