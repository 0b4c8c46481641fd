# SPDX-License-Identifier: Apache-2.0
"""The command line of a shard's process: what cannot be is said before anything begins."""

import subprocess
import sys
from pathlib import Path


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
