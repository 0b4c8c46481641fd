# SPDX-License-Identifier: Apache-2.0
"""The job of `oarlock.benchmarks.checkpoint`: its coordinator, here, makes cuts when asked; its shard and workers are processes.

Invariant: a cut is what the coordinator's own protocol makes, from the gate to the manifest; it is only asked for, and watched.
One event loop.
"""

import asyncio
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from oarlock.benchmarks.checkpoint_gaps import Spans
from oarlock.benchmarks.noted_job import NotedJob
from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.router import Routes, unpack_placement
from oarlock.proto.errors import Unavailable

LOOK_SECONDS = 0.004
CUT_SECONDS = 300.0
RESIDENT_SECONDS = 0.01


@dataclass
class Cut:
    """One cut that was made: its times, and the most resident memory of the shard above what it had before."""

    spans: Spans
    whole: bool
    training: bool
    manifest: Manifest
    more_bytes: int
    # Bytes of the files of rows that it wrote, and of those which are increments; rows in these.
    bytes: int = 0
    increment_bytes: int = 0
    increment_rows: int = 0
    files: list[Path] = field(default_factory=list)


class CheckpointJob(NotedJob):
    """``begin()``, ``train()``, cuts, ``rest()``, ``close()``."""

    def __init__(self, data: Path, folder: Path, options: dict[str, object], workers: int) -> None:
        super().__init__("checkpoint", data, folder, options, workers)

    @property
    def checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    def routes(self) -> Routes:
        return unpack_placement(self._coordinator.layout, self._coordinator.placement())

    async def cut(self, *, whole: bool, training: bool = True) -> Cut:
        """Make a cut; ``whole``: as the first one of a run, which follows on none."""
        cuts = self._coordinator.cuts
        watched = Resident(self.pids(["shard0"])[0])
        try:
            with self._coordinator.lock:
                if whole:
                    cuts.committed = 0
                wanted = cuts.last + 1
                written = self._written_seconds()
                asked = time.monotonic()
                cuts.wanted = True
            shut = opened = 0.0
            while not (cuts.last == wanted and not cuts.begun):
                self._check()
                gate, now = cuts.gate, time.monotonic()
                shut = gate.shuts if gate is not None else shut
                if cuts.opened == wanted and not opened:
                    opened = now
                if now > asked + CUT_SECONDS:
                    raise Unavailable(f"cut {wanted} was not made within {CUT_SECONDS:g} s")
                await asyncio.sleep(LOOK_SECONDS)
            committed = time.monotonic()
        finally:
            watched.close()
        if cuts.failed.get("cut") == wanted:
            raise Unavailable(f"cut {wanted} was given up: {cuts.failed['error']}")
        opened = opened or committed
        spans = Spans(wanted, asked, shut or opened, opened, opened + self._written_seconds() - written, committed)
        return self._made(Cut(spans, whole, training, self._manifest(wanted), watched.most - watched.first))

    def compaction(self) -> dict[str, float]:
        """Return what the shard told of its compaction: chains, bytes and seconds."""
        (shard,) = self._coordinator.members.alive("shard")
        found = shard.stats.get("compaction", {})
        return {name: found.get(name, 0) for name in ("blocks", "bytes", "seconds")}

    def _written_seconds(self) -> float:
        """Return how long orders to write took so far."""
        return self.orders.stages.seconds.get("write", 0.0)

    def _manifest(self, cut: int) -> Manifest:
        return LocalStore(self.checkpoints).load_manifest(cut)

    def _made(self, cut: Cut) -> Cut:
        folder = cut_folder(cut.manifest.cut)
        for entry in cut.manifest.blocks:
            link = entry.links[-1]
            if link.folder != folder:
                continue
            size = entry.bytes + entry.waiting_bytes + entry.gone_bytes
            cut.files += [self.checkpoints / each.path for each in link.files]
            if entry.kind == "rows":
                cut.bytes += size
                cut.increment_bytes += size if entry.base else 0
                cut.increment_rows += entry.rows if entry.base else 0
        return cut


class Resident:
    """The resident memory of a process: at ``first``, and the ``most`` of any sample since."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/statm")
        self.first = self.most = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _now(self) -> int:
        try:
            return int(self._path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def _sample(self) -> None:
        while not self._over.wait(RESIDENT_SECONDS):
            self.most = max(self.most, self._now())

    def close(self) -> None:
        self._over.set()
        self._thread.join()
