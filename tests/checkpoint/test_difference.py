# SPDX-License-Identifier: Apache-2.0
"""What differs between two cuts is what a comparison of dicts says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_story import write

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.difference import compare
from oarlock.embedding.spec import DenseSpec, TableSpec, to_json


def cut_of(store: Any, make_manifest: Any, cut: int, keys: Any, weights: Any, state: Any, dense: Any) -> Any:
    parts = [keys % 2 == block for block in (0, 1)]
    images = [
        BlockImage("rows", "user", block, cut, {}, keys[part], weights[part], state[part])
        for block, part in enumerate(parts)
    ]
    images.append(BlockImage("dense", "bias", 0, cut, {}, keys[:0], dense[None], np.empty((1, 0), np.float32)))
    entries = [store.write_block(cut, image) for image in images]
    specs = {
        "tables": (to_json(TableSpec("user", weights.shape[1], blocks=2)),),
        "dense": (to_json(DenseSpec("bias", (5,))),),
    }
    manifest = make_manifest(cut, entries, **specs)
    store.commit(manifest)
    return store, manifest


@pytest.mark.parametrize("rows", [0, 50, 150_000])
def test_keys_and_values(tmp_path: Path, rows: int, quick: Any, make_manifest: Any, rng: np.random.Generator) -> None:
    store = quick(tmp_path)
    sides = []
    for cut in (1, 2):
        keys = np.unique(rng.integers(0, 2 * rows + 1, rows).astype(np.uint64))[: rows or 0]
        weights = np.ones((len(keys), 2), np.float32)
        weights[keys % 7 == cut] = 3
        state = np.ones((len(keys), 1), np.float32)
        state[keys % 11 == cut] = 4
        sides.append((keys, weights, state, np.array([1, 2, 3, 4, 5 * cut], np.float32)))
    if rows:
        sides[1][1][np.flatnonzero(np.isin(sides[1][0], sides[0][0]))[3], 1] = -77.5
    told: list[tuple[int, int]] = []
    cuts = [cut_of(store, make_manifest, cut, *side) for cut, side in enumerate(sides, 1)]
    table, bias = compare(*cuts, lambda *each: told.append(each))
    before, after = (
        {int(key): (*w.tolist(), *s.tolist()) for key, w, s in zip(side[0], side[1], side[2], strict=True)}
        for side in sides
    )
    both = before.keys() & after.keys()
    assert (table.added, table.removed) == (len(after.keys() - both), len(before.keys() - both))
    assert table.changed == sum(before[key] != after[key] for key in both)
    assert table.same == len(both) - table.changed
    changes = {key: max(abs(before[key][i] - after[key][i]) for i in (0, 1)) for key in both}
    assert table.largest == max(changes.values(), default=0)
    assert table.largest_key is None if not rows else changes[table.largest_key] == table.largest > 70
    assert (bias.changed, bias.same, bias.largest, bias.differs) == (1, 4, 5, True)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not any(each.differs for each in compare(cuts[0], cuts[0]))


def test_what_cannot_be_compared_is_said(tmp_path: Path, quick: Any, make_manifest: Any) -> None:
    store = quick(tmp_path)
    values = np.zeros((0, 2), np.float32), np.zeros((0, 1), np.float32), np.zeros(5, np.float32)
    one = cut_of(store, make_manifest, 1, np.empty(0, np.uint64), *values)
    two = cut_of(store, make_manifest, 2, np.empty(0, np.uint64), np.zeros((0, 3), np.float32), *values[1:])
    assert compare(one, two)[0].problem == "it was rows of 2 in 2 blocks, and is rows of 3 in 2 blocks"
    other = quick(tmp_path / "b")
    three = (other, write(other, make_manifest, 1, 1, None))
    assert [(each.name, each.problem) for each in compare(one, three)] == [
        ("user", "it was rows of 2 in 2 blocks, and is rows of 1 in 2 blocks"),
        ("bias", "only the first cut has it"),
    ]
    assert compare(three, one)[1].as_json()["problem"] == "only the second cut has it"
    # Another optimizer: the rows are the same, but for their state.
    keys, weights = np.array([4], np.uint64), np.ones((1, 2), np.float32)
    four = cut_of(store, make_manifest, 4, keys, weights, np.ones((1, 1), np.float32), values[2])
    five = cut_of(store, make_manifest, 5, keys, weights, np.ones((1, 2), np.float32), values[2])
    assert replace(compare(four, five)[0], same=0) == replace(compare(five, four)[0], same=0)
    assert (compare(four, five)[0].changed, compare(four, five)[0].largest) == (1, 0)
