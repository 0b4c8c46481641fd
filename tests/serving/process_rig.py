# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve` as a process of its own. Loaded by conftest under the name ``process_rig``."""

import re
import signal
import subprocess
import sys

SECONDS = 120.0


class Process:
    """`oarlock serve` with ``arguments``, once it is ready."""

    def __init__(self, *arguments):
        command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines = []
        while not any(line.startswith("ready") for line in self.lines):
            line = self.process.stdout.readline()
            if not line:
                break
            self.lines.append(line.strip())
        found = re.search(r"listening at ([^,\s]+)", "\n".join(self.lines))
        self.address = found[1] if found else ""

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, "".join(out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
