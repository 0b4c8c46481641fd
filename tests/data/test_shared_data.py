# SPDX-License-Identifier: Apache-2.0
"""Published data, where they are present: the counts that their source states, and popularity's published HR@10."""

from pathlib import Path

import numpy as np
import pytest

from oarlock.data.interactions import list_test, list_train, load_catalogue, load_positives, load_test
from oarlock.data.ncf_files import import_ncf
from oarlock.data.ranking import count_lists, expected_hit_rate, rank_lists, sum_ranks

# Name: users, items, training rows, test rows, HR@10 of popularity with ties split evenly.
SETS = {
    "ml1m-ncf": (6040, 3706, 994_169, 6040, 0.4535),
    "lastfm-ncf": (1741, 2665, 67_408, 1741, 0.6634),
    "amusic-ncf": (1776, 12_929, 44_311, 1776, 0.2494),
}


@pytest.mark.parametrize("name", SETS)
def test_import_reaches_the_published_popularity(shared_data: Path, tmp_path: Path, name: str) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip(f"shared data: {name} is not present")
    *counts, popularity = SETS[name]
    info = import_ncf(shared_data / name, tmp_path / "out")
    assert [info.users, info.items, info.train_rows, info.test_rows] == counts
    train, test = list_train(tmp_path / "out"), list_test(tmp_path / "out")
    catalogue = load_catalogue(train, test)
    assert catalogue.size == info.items
    assert load_positives(train).items.size == info.train_rows
    lists = load_test(test)
    found, times = np.unique(load_positives(train).items, return_counts=True)
    scores = np.zeros(catalogue.size, np.float32)
    scores[np.searchsorted(catalogue, found)] = times
    scores = scores[np.searchsorted(catalogue, lists.items)]
    assert expected_hit_rate(*count_lists(scores, lists.offsets, lists.items), 10) == pytest.approx(
        popularity, abs=0.002
    )
    constant = rank_lists(np.ones_like(scores), lists.offsets, lists.items)
    assert sum_ranks(constant, 10).hits == 0
