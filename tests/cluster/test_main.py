# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.cluster`: what stops it from starting is one line, and exit code 1."""

import logging
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.cluster.__main__ import main


@pytest.fixture(autouse=True)
def no_log_is_kept() -> Iterator[None]:
    logger = logging.getLogger("oarlock")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture
def folder(cluster: Any, tmp_path: Path) -> Path:
    made = tmp_path / "job"
    made.mkdir()
    (made / "job.json").write_text(replace(cluster.spec, job="a" * 32).to_json())
    return made


def ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cluster", "--log-level", "error", *arguments])
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_port_that_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = ends(capsys, monkeypatch, "--dir", str(folder), "--listen", f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in line
    assert not (folder / "coordinator.json").exists()


def test_a_folder_without_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "oarlock prepare" in ends(capsys, monkeypatch, "--dir", str(tmp_path))


def test_a_checkpoint_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ends(capsys, monkeypatch, "--dir", str(folder), "--restore", str(folder / "checkpoints" / "cut-000009"))
    assert "no committed cut 9" in line


def test_a_state_that_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "state.sqlite").write_bytes(b"garbage" * 1000)
    assert "is no coordinator state" in ends(capsys, monkeypatch, "--dir", str(folder))
