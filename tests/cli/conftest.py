# SPDX-License-Identifier: Apache-2.0
"""The command, called in this process, in a folder of its own, on a small data set."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from oarlock.cli.main import main
from oarlock.data.planted import generate_ncf
from tests.conftest import load_shared

# The reader of traces that the tests of telemetry have.
load_shared("telemetry/trace_check.py")


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that an error is."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(autouse=True)
def no_log_is_left_open() -> Iterator[None]:
    logger = logging.getLogger("oarlock")
    before = list(logger.handlers)
    yield
    for handler in logger.handlers:
        if handler not in before:
            handler.close()
    logger.handlers[:] = before


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    generate_ncf(folder, users=100, items=200, positives_per_user=25, seed=1)
    return folder


@pytest.fixture
def oarlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


@pytest.fixture
def train(oarlock: Callable[..., Ended], data: Path) -> Callable[..., Ended]:
    """Train in this process, on little."""

    def call(*arguments: str) -> Ended:
        given = ["--in-process", "--reader", "arrow", "--set", "heartbeat_seconds=0.1"]
        if "--resume" not in arguments:
            given += ["--data", str(data), "--set", "recipe_options.batch_samples=1024"]
        return oarlock("train", "ncf", *given, *arguments)

    return call
