# SPDX-License-Identifier: Apache-2.0
"""A small data set, and jobs of it that end within seconds."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from oarlock.client.job import JobSpec
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    generate_ncf(folder, users=100, items=200, positives_per_user=25, seed=1)
    return folder


@pytest.fixture(scope="session")
def run_of(data: Path) -> Any:
    def make(**changes: Any) -> Any:
        options = {"batch_samples": 1024, **changes.pop("recipe_options", {})}
        values = {"data": str(data), "epochs": 2, "reader": "arrow", "heartbeat_seconds": 0.1, **changes}
        return run_config({**values, "recipe_options": options})

    return make


@pytest.fixture
def start(run_of: Any, tmp_path: Path) -> Any:
    """Create a job in a folder of this test: (name, **fields) -> (spec, folder)."""

    def make(name: str = "job", **changes: Any) -> tuple[JobSpec, Path]:
        folder = tmp_path / name
        return create(folder, name, run_of(**changes)), folder

    return make


@pytest.fixture
def run_job() -> Any:
    """Run a job in this process: (spec, folder, restore, stop_when) -> last status."""

    def run(spec: JobSpec, folder: Path, restore: str = "", stop_when: Any = lambda status: False) -> dict[str, Any]:
        return run_in_process(
            spec, folder, restore=restore, watch=lambda status: not stop_when(status), watch_seconds=0.01
        )

    return run
