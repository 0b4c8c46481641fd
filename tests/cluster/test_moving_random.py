# SPDX-License-Identifier: Apache-2.0
"""Copies under random schedules: losses, repeats, lateness, deaths of shards and of the coordinator, cuts and scaling."""

from pathlib import Path

import pytest
from copies_model import Model

from oarlock.client.job import OVER

SEEDS = 60


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
@pytest.mark.parametrize(("replicas", "servers"), [(0, 2), (1, 2), (1, 3), (2, 4)])
def test_promises_hold_and_all_comes_to_rest(tmp_path: Path, replicas: int, servers: int, first: int) -> None:
    for seed in range(first, first + 10):
        try:
            run(seed, tmp_path / f"{seed}", replicas, servers)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, replicas {replicas}, servers {servers}: {error}") from error


def run(seed: int, path: Path, replicas: int, servers: int, on_loss: str = "rollback") -> Model:
    model = Model(seed, path, replicas=replicas, servers=servers, on_loss=on_loss)
    for _ in range(300):
        if model.c.phase in OVER:
            break
        model.step()
        if model.c.phase == "training" and model.rng.random() < 0.07:
            model.strike()
    if model.c.phase not in OVER:
        model.settle()
    model.store.close()
    return model
