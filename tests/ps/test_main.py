# SPDX-License-Identifier: Apache-2.0
"""A shard's process: what cannot be is said before anything begins; what it does beside answering."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from oarlock.ps.process import IDLE_SECONDS, LOOK_SECONDS, _make_ready
from oarlock.simulation.loop import VirtualLoop


def test_a_spill_folder_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "missing"):
        command = [sys.executable, "-m", "oarlock.ps", "--coordinator", "127.0.0.1:1", "--spill-folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"error: --spill-folder {folder} is no folder" in done.stderr


def test_memory_that_is_too_little_for_requests_is_refused_at_once() -> None:
    command = [sys.executable, "-m", "oarlock.ps", "--coordinator", "127.0.0.1:1", "--request-memory-bytes", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: --request-memory-bytes 1000: give an integer from 67108864 to" in done.stderr


def test_memory_for_a_cut_is_made_ready_piece_by_piece_while_a_shard_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = SimpleNamespace(tables=[SimpleNamespace(nbytes=3 << 20), SimpleNamespace(nbytes=4 << 20)])
    asked: list[tuple[float, int]] = []

    async def body() -> None:
        begun = asyncio.get_running_loop().time()

        def piece(most: int) -> bool:
            asked.append((asyncio.get_running_loop().time() - begun, most))
            # The third one finds nothing to do.
            return len(asked) != 3

        monkeypatch.setattr("oarlock.ps.process.make_some_ready", piece)
        making = asyncio.ensure_future(_make_ready(shard, None))  # type: ignore[arg-type]
        await asyncio.sleep(2 * IDLE_SECONDS + LOOK_SECONDS + IDLE_SECONDS / 2)
        making.cancel()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(body())
    assert [round(time, 6) for time, _ in asked] == [0, IDLE_SECONDS, 2 * IDLE_SECONDS, 2 * IDLE_SECONDS + LOOK_SECONDS]
    assert {most for _, most in asked} == {7 << 20}
