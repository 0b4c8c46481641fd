# SPDX-License-Identifier: Apache-2.0
"""A process that serves a job, as people start it. A conftest loads it as ``serving_process``."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oarlock.serving import Client


@contextmanager
def following(folder: Path, log: Path, *options: str) -> Iterator[tuple[Client, dict[str, Any]]]:
    """Follow a job that runs; yield a client and what the process said once it was ready."""
    command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", "--follow", str(folder), "--json", *options]
    with (
        log.open("w") as err,
        subprocess.Popen([*command, "--log-level", "info"], stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            facts = json.loads(line)
            with Client(facts["address"]) as client:
                yield client, facts
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
