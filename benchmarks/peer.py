# SPDX-License-Identifier: Apache-2.0
"""The other process of a benchmark of the wire: started, asked for its processor time, ended.

Invariant: it says on its first line, as JSON, where it listens; answers each line with the processor seconds that it has
used; and ends when its standard input closes.
"""

import json
import subprocess
import sys
from typing import Any


class PeerProcess:
    """``python -m module``; ``started`` is what it said first."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None, "made with a pipe"
        return json.loads(self._process.stdout.readline())

    def processor_seconds(self) -> float:
        """Return the processor time that the process has used."""
        assert self._process.stdin is not None, "made with a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None, "made with a pipe"
        assert self._process.stdout is not None, "made with a pipe"
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
