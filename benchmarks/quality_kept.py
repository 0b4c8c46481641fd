# SPDX-License-Identifier: Apache-2.0
"""What the jobs of a comparison came to, on disk, so that one that was interrupted goes on where it was.

jobs.jsonl: one JSON object a line; first what the comparison is, then, for each job that ended, its case, seed and figures.
Invariant: a job stands there once it is over, and whole; a file of another comparison is refused. One process at a time.
"""

import json
import os
from pathlib import Path
from typing import Any

from oarlock.benchmarks.quality_cases import Trained
from oarlock.proto.errors import InvalidArgument

FILE = "jobs.jsonl"


class Kept:
    """``folder`` None: nothing is kept, and nothing found."""

    def __init__(self, folder: Path | None, comparison: dict[str, Any]) -> None:
        self._file = folder / FILE if folder is not None else None
        self._comparison = comparison
        self._jobs: dict[tuple[str, int], Trained] = {}

    def open(self) -> None:
        """Read what is there, or begin the file."""
        if self._file is None:
            return
        if not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._comparison)
            return
        text = self._file.read_text(encoding="utf-8")
        # What was cut off by an interruption in the midst of a line was not over.
        lines = text.split("\n")[:-1]
        try:
            head, *jobs = (json.loads(line) for line in lines)
            if not isinstance(head, dict):
                raise TypeError("no head")
            found = {(job["case"], job["seed"]): Trained(*job["found"]) for job in jobs}
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"{self._file}: is not what --keep writes ({error}); name another folder") from None
        if head != self._comparison:
            names = sorted(n for n in {*head, *self._comparison} if head.get(n) != self._comparison.get(n))
            raise InvalidArgument(
                f"{self._file}: is of another comparison, which differs in {', '.join(names)}; name another folder"
            )
        if not text.endswith("\n"):
            self._file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._jobs = found

    def get(self, case: str, seed: int) -> Trained | None:
        """Return what this job came to, None if it has not been run."""
        return self._jobs.get((case, seed))

    def put(self, case: str, seed: int, found: Trained) -> None:
        """Keep what a job came to."""
        self._jobs[case, seed] = found
        if self._file is not None:
            self._write({"case": case, "seed": seed, "found": list(found)})

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
