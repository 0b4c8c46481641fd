# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as people run them, at a size that only shows that they come to their end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_tiny(tmp_path: Path) -> Callable[[str], tuple[dict[str, Any], str]]:
    """Run a benchmark by its name, tiny, and return what it found and what it said; it leaves nothing behind."""

    def run(name: str) -> tuple[dict[str, Any], str]:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", f"oarlock.benchmarks.{name}", "--tiny", "--json"],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert list(tmp_path.iterdir()) == [], "something was left behind"
        return json.loads(ended.stdout.splitlines()[-1]), ended.stderr

    return run
