# SPDX-License-Identifier: Apache-2.0
"""Child: one process that the launcher started, its log file, and why it ended.

Invariant: it ends when its standard input closes, which the launcher's death does too; its log is only appended to, also when
another process takes its place.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oarlock.client.entry import START_AGAIN

_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")


@dataclass
class Child:
    """A started process. ``role`` and ``number`` name its log file."""

    role: str
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    # Whether its end was dealt with.
    noticed: bool = False
    # Whether the launcher killed it itself.
    given_up: bool = False

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, rather than it itself."""
        return self.ended and self.process.returncode < 0

    @property
    def replaceable(self) -> bool:
        """Whether another one may do better: it was killed, or away for longer than its lease."""
        return self.killed or (self.ended and self.process.returncode == START_AGAIN)

    def complaint(self) -> str:
        return f"{self.role} {self.number}: {self.end()}"

    def end(self) -> str:
        """Return why it ended: its own error line, the exception that nobody caught, the signal, or its code."""
        code = self.process.returncode
        if code is not None and code < 0:
            hint = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
            return f"ended by {_signal_name(-code)}{hint}"
        with self.log.open("rb") as log:
            # The log of an earlier run of the job stands above.
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raised = [line for line in lines[-20:] if _EXCEPTION.fullmatch(line)]
        if own:
            return own[-1]
        if raised:
            return f"{raised[-1]}, see {self.log}"
        return f"ended with code {code}, see {self.log}"

    def what_happened(self) -> str:
        """Return its end as a sentence: ``worker 1 was ended by SIGKILL``."""
        if self.killed:
            return f"{self.role} {self.number} was ended by {_signal_name(-self.process.returncode)}"
        return f"{self.role} {self.number} ended ({self.end()})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def start_child(
    role: str,
    number: int,
    module: str,
    arguments: Sequence[str],
    *,
    logs: Path,
    log_level: str,
    blas_threads: int = 1,
) -> Child:
    """Start ``python -m module``; what it prints is appended to its log file in ``logs``."""
    log = logs / f"{role}-{number}.log"
    log.parent.mkdir(exist_ok=True)
    # -P: the current folder may hold a `proto` or a `data` that is not meant.
    command = [sys.executable, "-P", "-m", module, "--until-stdin-closes", "--log-level", log_level, *arguments]
    # Read when numpy is loaded, before the process knows its job: it starts so many threads then, and not one for each core.
    # OpenMP's number is also Arrow's, whose reading has its own thread already.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(blas_threads), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        log_start = out.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    return Child(role, number, process, log, log_start)
