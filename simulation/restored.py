# SPDX-License-Identifier: Apache-2.0
"""A job that goes on from a cut of another one, on other shards and without faults: what came of both must be exact.

Invariant: the same files, seed and specs; everything else is drawn anew from the schedule's seed. One thread.
"""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

from oarlock.checkpoint.store import LocalStore, open_checkpoint
from oarlock.cluster.coordinator import Coordinator
from oarlock.simulation.data import Data
from oarlock.simulation.faults import Outcome, Schedule
from oarlock.simulation.quick import quick
from oarlock.simulation.world import World


class Restored(World):
    """A job of the simulation that begins from the checkpoint ``path``."""

    def __init__(self, schedule: Schedule, data: Data, folder: Path, path: str, log: list[str] | None = None) -> None:
        super().__init__(schedule, data, folder, log)
        self._path = path
        # Both follow a job from its begin.
        self.residuals.kept = False
        self.kept.follows = False

    def _opened(self, c: Coordinator) -> None:
        super()._opened(c)
        if c.run == 1:
            c.begin_run(open_checkpoint(self._path)[1], self._path)


def go_on(schedule: Schedule, data: Data, checkpoints: Path, folder: Path, log: list[str] | None = None) -> Outcome:
    """Restore one of the cuts in ``checkpoints`` and train to the end."""
    rng = random.Random(schedule.seed + 2)
    cut = rng.choice(LocalStore(checkpoints).cuts())
    other = replace(schedule, shards=rng.randint(1, 3), workers=rng.randint(1, 3), faults=(), at_gates=(), at_cuts=())
    folder.mkdir()
    outcome = Restored(other, data, folder, f"{checkpoints}@{cut}", log).run()
    return replace(outcome, violation=f"{outcome.violation} (restored from cut {cut})" if outcome.violation else "")


def run(schedule: Schedule, data: Data, log: list[str] | None = None) -> Outcome:
    """Run a schedule in a folder of its own, and go on from one of its cuts."""
    with quick(), tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        return _run(schedule, data, Path(name), log)


def _run(schedule: Schedule, data: Data, folder: Path, log: list[str] | None) -> Outcome:
    # By itself: a world that is still named somewhere when rubbish is looked for is never found.
    world = World(schedule, data, folder, log)
    outcome = world.run()
    if outcome.violation or not world.cuts.committed:
        return outcome
    again = go_on(schedule, data, world.folder / "checkpoints", folder / "again", log)
    found = {"cut committed": world.cuts.committed, "block compacted": world.cuts.compacted, "restored": 1}
    outcome.counts.update(found)
    return replace(outcome, violation=again.violation, events=outcome.events + again.events)
