# SPDX-License-Identifier: Apache-2.0
"""A fixed small job, run again and again, of which the n-th step fails: each message, statement and file in its turn.

    message      its request or its answer is lost, it comes twice, or one of both comes later than a gate is waited for
    statement    the coordinator dies just before it, or, if it is a COMMIT, just after: all is on disk, and nobody was told
    file         whoever writes, commits or deletes it dies just before, or just after

Invariant: the job has everything in it: cuts, a coordinator that is killed, a shard that is killed while it writes, and the run
that goes on from the newest cut. What is asked of it is the same as of any schedule, and that every cut is whole. One thread.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.store import LocalStore
from oarlock.proto.errors import PSError
from oarlock.simulation.data import Data
from oarlock.simulation.faults import GATE_SECONDS, KILL_SHARD, SYNC, WIRE, Fault, Outcome, Schedule
from oarlock.simulation.loop import Process
from oarlock.simulation.quick import quick
from oarlock.simulation.restored import go_on
from oarlock.simulation.resuming import LOOK_SECONDS
from oarlock.simulation.state import WatchedStore
from oarlock.simulation.wire import Call, Killed
from oarlock.simulation.world import World

STATEMENT, BEFORE_FILE, AFTER_FILE = "statement", "before a file", "after a file"
KINDS = (*WIRE, STATEMENT, BEFORE_FILE, AFTER_FILE)
# Longer than a gate is waited for, and than a worker waits at one.
LATE_SECONDS = 2.5 * GATE_SECONDS
# Whatever fails costs a lease or two.
MOST_SECONDS = 120.0
NONE = 1 << 30
GOES_ON = 5


def job(mode: str) -> Schedule:
    """Return the job of a mode: ``async``, or ``sync``."""
    ranks = 2 if mode == SYNC else 0
    return Schedule(
        seed=5,
        shards=2,
        workers=2,
        open_splits=1,
        prefetch=1,
        epochs=2,
        rows_per_split=6,
        batch_rows=3,
        mode=mode,
        staleness=0,
        latency=0.2,
        faults=(Fault(160, "kill_coordinator", 0, 0.1),),
        checkpoint_seconds=1.0 if mode != SYNC else 2.0,
        at_cuts=(Fault(3, KILL_SHARD, 2, 0.1, "Shard.Write"),),
        cuts_before=1,
        ranks=ranks,
    )


class Failing(World):
    """The job, whose step number ``at`` of a ``kind`` fails; ``steps``: how many it had of them."""

    def __init__(self, schedule: Schedule, data: Data, folder: Path, kind: str, at: int) -> None:
        super().__init__(schedule, data, folder)
        self._kind = kind
        self._at = at
        self.steps = 0
        self._writing: Process | None = None
        self._committing = False
        send = self.wire.send

        def sent(call: Call) -> None:
            if kind in WIRE and self._failing():
                self.wire.armed.append(Fault(0, kind, 0, LATE_SECONDS, call.method))
            send(call)

        self.wire.send = sent  # type: ignore[method-assign]

    def _failing(self) -> bool:
        self.steps += 1
        return self.steps == self._at

    def _make_store(self, process: Process) -> WatchedStore:
        """Have the coordinator die at the statement that is to fail."""
        store = super()._make_store(process)
        execute = store._execute

        def counted(statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
            if self._kind == STATEMENT and not statement.startswith("SELECT") and self._failing():
                store.tear = 0
            return execute(statement, values)

        store._execute = counted  # type: ignore[method-assign]
        return store

    def _before(self, process: Process, call: Call) -> bool:
        if call.method == "Shard.Write":
            self._writing = process
        return super()._before(process, call)

    def operate(self, what: str, operation: Callable[[], Any]) -> Any:
        """Do something to the checkpoints' files, unless its process dies before; blocks are written by shards."""
        fails = self._kind in (BEFORE_FILE, AFTER_FILE) and not self.wire.closed and self._failing()
        if fails and self._kind == BEFORE_FILE:
            self._die(what)
        # A file that is committed is written first, under another name.
        outside, self._committing = self._committing, self._committing or what == "commit_file"
        try:
            result = operation()
        finally:
            self._committing = outside
        if fails:
            self._die(what)
        return result

    def _die(self, what: str) -> None:
        process = self._writing if what == "write_file" and not self._committing else None
        if process is None:
            self._end_coordinator(self.coordinator_process, 0.3)
        else:
            process.alive = False
            self._later(LOOK_SECONDS, self._shard_ended, process)
        raise Killed


@contextmanager
def watched(world: Failing) -> Iterator[None]:
    """Let a world see every file that is written, committed or deleted."""
    names = ("write_file", "commit_file", "delete")
    originals: dict[str, Any] = {name: getattr(LocalFiles, name) for name in names}

    def seen(name: str) -> Any:
        def operate(self: LocalFiles, *arguments: Any, **named: Any) -> Any:
            return world.operate(name, lambda: originals[name](self, *arguments, **named))

        return operate

    for name in names:
        setattr(LocalFiles, name, seen(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(LocalFiles, name, original)


def run_failing(mode: str, data: Data, kind: str, at: int) -> tuple[Outcome, int]:
    """Run the job with one step that fails, and go on from one of its cuts; return what came of it, and how many steps it had."""
    schedule = job(mode)
    with quick(), tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        return _run_failing(schedule, data, Path(name), kind, at)


def _run_failing(schedule: Schedule, data: Data, folder: Path, kind: str, at: int) -> tuple[Outcome, int]:
    world = Failing(schedule, data, folder, kind, at)
    with watched(world):
        outcome = world.run()
    if not outcome.violation:
        outcome.violation = _looked_at(world, outcome)
    # Going on costs as much as the job itself: after some of the messages is enough.
    if not outcome.violation and world.cuts.committed and (kind not in WIRE or at % GOES_ON == 0):
        outcome.violation = go_on(schedule, data, world.folder / "checkpoints", folder / "again").violation
    return outcome, world.steps


def _looked_at(world: Failing, outcome: Outcome) -> str:
    """Return what is wrong with a job that is done: a cut that is not whole, or that it took too long."""
    if outcome.seconds > MOST_SECONDS:
        return f"L1: it took {outcome.seconds:.0f} s"
    store = LocalStore(world.folder / "checkpoints")
    for cut in store.cuts():
        try:
            manifest = store.load_manifest(cut)
            for entry in manifest.blocks:
                store.load_block(manifest, entry)
        except PSError as error:
            return f"C1: cut {cut} is there and not whole: {error}"
    return ""
