# SPDX-License-Identifier: Apache-2.0
"""The counting recipe at a pace: every batch takes a while, until a file in the data's folder says that there is no need to wait.

So a job lasts as long as a test needs it, however fast the machine, and no longer. Threads of a worker.
"""

import time
from pathlib import Path
from typing import Any

from oarlock.client.job import JobSpec
from oarlock.simulation.counting import CountingRecipe, CountingWorkload

BATCH_SECONDS = 0.05
HURRY = "hurry"


class PacedWorkload(CountingWorkload):
    """Counts, and takes its time to read."""

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec)
        self._hurry = Path(spec.files[0]["path"]).parents[1] / HURRY

    def encode(self, rows: Any, *, epoch: int, split: int, batch: int) -> Any:
        if not self._hurry.exists():
            time.sleep(BATCH_SECONDS)
        return super().encode(rows, epoch=epoch, split=split, batch=batch)


class PacedRecipe(CountingRecipe):
    def workload(self, spec: JobSpec) -> PacedWorkload:
        return PacedWorkload(spec)


recipe = PacedRecipe()
