# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of two tables with chains, and jobs of every recipe that were trained in this process, on little."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from oarlock.data.planted import generate_ncf
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process
from tests.conftest import load_shared

load_shared("serving/serving_rig.py")
CLICK = load_shared("recipes/test_click.py", "click_rig")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Cut 1 of a job, and cut 2 on top of it: the table user's block 0 has changed and lost rows there."""
    import serving_rig

    made = serving_rig.Model(tmp_path / "checkpoints")
    first = made.cut(1)
    entries = []
    for entry in first.blocks:
        if (entry.name, entry.block) == ("user", 0):
            image = made.store.load_block(first, entry)
            changed = replace(
                image, seq=2, keys=image.keys[1:3], weights=image.weights[1:3] + np.float32(0.1), state=image.state[1:3] + 1,
                counters=image.counters[1:3],
            )  # fmt: skip
            entry = made.store.write_block(2, changed, after=entry, gone=image.keys[:1].copy())
        entries.append(entry)
    made.commit(2, entries)
    return made


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Return the folder of a job of a recipe, trained for an epoch; made once."""
    folder = tmp_path_factory.mktemp("trained")
    made: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oarlock.data.tabular.cache_folder", lambda: folder / "cache")

        def train(recipe: str) -> Path:
            if recipe not in made:
                data = folder / ("pairs" if recipe == "ncf" else "clicks")
                if not data.exists() and recipe == "ncf":
                    generate_ncf(data, users=60, items=120, positives_per_user=15, seed=1)
                elif not data.exists():
                    CLICK.write(data, 2000, 3)
                values = {"recipe": recipe, "data": str(data), "epochs": 1, "workers": 1, "servers": 1}
                spec = create(folder / recipe, recipe, run_config({**values, "heartbeat_seconds": 0.1}))
                with threadpool_limits(1):
                    assert run_in_process(spec, folder / recipe, watch=lambda status: True)["phase"] == "done"
                made[recipe] = folder / recipe
            return made[recipe]

        yield train
