# SPDX-License-Identifier: Apache-2.0
"""Copies that are told of each operation as bytes are equal to their owner's blocks, bit for bit, in every mode; and stay so."""

import pytest
from copies_rig import Copies, spec_of

from oarlock.embedding.optimizers import OPTIMIZERS

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_follow_their_owner(seed):
    optimizer = sorted(OPTIMIZERS)[seed % len(OPTIMIZERS)]
    copies = Copies(spec_of(optimizer), seed)
    try:
        copies.copy(1.0 if seed % 2 else 0.5)
        for _ in range(50):
            act = copies.rng.choice(["push"] * 12 + ["sweep"] * 3 + ["undo"] * 2 + ["close_split", "copy", "deliver"])
            if act == "copy":
                copies.copy(0.2)
            else:
                getattr(copies, act)()
        copies.same()
        # A history or two has no sweep that finds anything, or nothing to undo.
        assert {name for name, _ in copies.kinds} >= ({"Pushed", "Swept", "Undone", "Image"} if seed < 3 else set())
        copies.copy(1.0)
        copies.promote()
        for _ in range(10):
            copies.push()
        copies.same()
    finally:
        copies.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_of_rows_and_dense_blocks_in_hybrid(seed):
    ranks = 2 + seed % 2
    copies = Copies(spec_of(mode="hybrid", ranks=ranks), seed)

    def between():
        if copies.rng.random() < 0.2:
            copies.copy(0.3)
        if copies.rng.random() < 0.2:
            copies.sweep()
        if copies.rng.random() < 0.2:
            copies.same()

    try:
        for _ in range(10):
            copies.train_step(ranks, between)
        copies.same()
        assert copies.kinds >= {("Pushed", True), ("Pushed", False), ("Stepped", False), ("Image", False)}
        copies.copy(1.0)
        end_with_promotion(copies, ranks)
    finally:
        copies.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_in_sync(seed):
    ranks = 2 + seed % 2
    copies = Copies(spec_of(mode="sync", ranks=ranks), seed)

    def between():
        if copies.rng.random() < 0.2:
            copies.copy(0.3)
        if copies.rng.random() < 0.2:
            copies.same()

    try:
        for _ in range(20):
            copies.train_step(ranks, between)
        copies.same()
        assert sum(table.evicted for table in copies.owner.tables) > 20
        assert copies.kinds == {("Pushed", False), ("Stepped", False), ("Image", False)}
        copies.copy(1.0)
        end_with_promotion(copies, ranks)
    finally:
        copies.close()


def end_with_promotion(copies, ranks):
    """Promote members in the middle of a step: what was staged is there, and commits that are sent again decide."""
    staging = copies.stage(ranks)
    next(staging)
    copies.promote()
    copies.commit_again(ranks)
    for _ in staging:
        pass
    for rank in range(ranks):
        copies.commit(rank, rank % 3 + 1)
    copies.same()
    assert {int(shard.staged.range()[0]) for shard in copies.shards()} == {copies.step}
    for _ in range(3):
        copies.train_step(ranks)
    copies.same()
