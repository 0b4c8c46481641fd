# SPDX-License-Identifier: Apache-2.0
"""Copies under random schedules: losses, repeats, lateness, deaths of shards and of the coordinator, cuts and scaling."""

from pathlib import Path

import pytest
from copies_faults import strike
from copies_model import Model

from oarlock.client.job import OVER

SOON, ALL = 12, 300
SETTINGS = [
    (0, 2, "rollback"),
    (1, 2, "rollback"),
    (1, 3, "rollback"),
    (2, 4, "rollback"),
    (0, 2, "reload"),
    (1, 3, "reload"),
]


@pytest.mark.parametrize(("replicas", "servers", "on_loss"), SETTINGS)
def test_promises_hold_and_all_comes_to_rest(tmp_path: Path, replicas: int, servers: int, on_loss: str) -> None:
    run_all(range(SOON), tmp_path, replicas, servers, on_loss)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("replicas", "servers", "on_loss"), SETTINGS)
def test_promises_hold_in_many_schedules(tmp_path: Path, replicas: int, servers: int, on_loss: str) -> None:
    run_all(range(SOON, ALL), tmp_path, replicas, servers, on_loss)


def run_all(seeds: range, folder: Path, replicas: int, servers: int, on_loss: str) -> None:
    for seed in seeds:
        try:
            run(seed, folder / f"{seed}", replicas, servers, on_loss)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def run(seed: int, path: Path, replicas: int, servers: int, on_loss: str = "rollback") -> Model:
    model = Model(seed, path, replicas=replicas, servers=servers, on_loss=on_loss)
    for _ in range(300):
        if model.c.phase in OVER:
            break
        model.step()
        if model.c.phase == "training" and model.rng.random() < 0.07:
            strike(model)
    if model.c.phase not in OVER:
        model.settle()
    model.store.close()
    return model
