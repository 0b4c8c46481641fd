# SPDX-License-Identifier: Apache-2.0
"""Going back: a job that has lost blocks for good begins its next run from its last cut, in the same processes.

    decided    recorded: the run is over, and its coordinator can neither read nor write the file any more (``hand_on``)
    begun      recorded, in the transaction that begins the next run: from which cut, and how often from the same one
    over       all blocks are loaded, and the job trains

Invariant: whoever dies between two of these, the next coordinator goes on from what is recorded, as one that takes the place of
this one in the same process does. A run that is over is refused by name; its processes are told to come again (``stays``), but
not those of before the job was begun by ``--resume``: others were started in their place. The coordinator's lock covers it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.client.job import GATHERING, OVER, STOPPING
from oarlock.cluster.recoveries import ROLLBACK
from oarlock.cluster.store import Store
from oarlock.proto.errors import CorruptCheckpoint, NotFound, PSError

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator
    from oarlock.cluster.members import Member

logger = logging.getLogger(__name__)

FACT, FIRST_RUN = "going_back", "first_run"
# So often a job goes back to one cut without coming to the next one: after that it is the job, not the shards.
MOST_TIMES = 10


@dataclass(frozen=True)
class Loss:
    """What ended a run. ``begun``: whether the next one is recorded: then ``path`` is where it began, ``times`` how often."""

    shard: int
    blocks: int
    why: str
    begun: bool = False
    path: str = ""
    times: int = 0
    # Of the cut: 0 for the job's beginning; and what was trained since, for people.
    cut: int = 0
    lost: str = ""


class GoingBack:
    """``loss``: the newest, None: the job never went back by itself. ``first_run``: the first one whose processes stay."""

    def __init__(self, *, able: bool) -> None:
        self._able = able
        self.loss: Loss | None = None
        self.first_run = 1

    def take_up(self, store: Store, run: int) -> None:
        """Load what was recorded; ``run``: the one that the job is in."""
        found = store.fact(FACT)
        self.loss = Loss(**found) if found is not None else None
        self.first_run = store.fact(FIRST_RUN, run)

    @property
    def due(self) -> bool:
        """Whether the next run is to be begun."""
        return self.loss is not None and not self.loss.begun

    def stays(self, run: int, now: int) -> bool:
        """Whether a process of ``run`` is to take part in the run that the job is in ``now``."""
        return self.first_run <= run < now

    def may(self, c: "Coordinator") -> bool:
        """Whether the job can go on by itself."""
        if not self._able or c.phase in (STOPPING, *OVER) or c.stop_wanted is not None:
            return False
        return self.loss is None or self.loss.times < MOST_TIMES or c.cuts.newest_path() != self.loss.path

    def decide(self, store: Store, shard: int, blocks: int, why: str) -> None:
        """Record that the run is over."""
        before = self.loss or Loss(0, 0, "")
        self.loss = replace(before, shard=shard, blocks=blocks, why=why, begun=False)
        store.set_fact(FACT, asdict(self.loss))

    def begun(self, store: Store, run: int, path: str, cut: int, lost: str) -> None:
        """Record that run ``run`` has begun, by itself if that was due, else since somebody asked for it."""
        if self.loss is None or self.loss.begun:
            self.loss, self.first_run = None, run
            store.set_fact(FACT, None)
            store.set_fact(FIRST_RUN, run)
            return
        times = 1 + (self.loss.times if self.loss.path == path else 0)
        self.loss = replace(self.loss, begun=True, path=path, times=times, cut=cut, lost=lost)
        store.set_fact(FACT, asdict(self.loss))
        store.set_fact(FIRST_RUN, self.first_run)

    def tell(self, c: "Coordinator") -> None:
        """Note a run that has begun and does not train yet among the recoveries."""
        if self.loss is not None and self.loss.begun and c.phase == GATHERING:
            c.recoveries.begin(
                ROLLBACK,
                self.loss.shard,
                self.loss.blocks,
                c.clock(),
                lambda: c.phase != GATHERING,
                lost=self.loss.lost,
                cut=self.loss.cut,
            )


def end_run(c: "Coordinator", member: "Member | None", blocks: int) -> None:
    """Blocks are lost: end the run, or the job if it cannot go on by itself. ``member``: who had them; None: nobody knows."""
    why = f"no shard has {blocks} blocks any more"
    if member is not None:
        error = f": {member.error}" if member.error else ""
        why = f"shard {member.id} ({member.address}, pid {member.pid}) is gone{error}"
    if not c.going_back.may(c):
        c.fail(f"{why}; go on from the last checkpoint with --resume")
        return
    with c.store as store:
        c.going_back.decide(store, -1 if member is None else member.id, blocks, why)
    # What anybody does in this run from now on is in no file, and nobody hears of it.
    c.handed_on = c.store.hand_on()
    logger.warning("event=run_over run=%d reason=%s", c.run, why)


def go_back_by_itself(c: "Coordinator", checkpoints: CheckpointStore) -> None:
    """Begin the run that is due, of a coordinator that has just opened its file; it fails if it cannot."""
    loss = c.going_back.loss
    assert loss is not None, "asked for when it is due"
    path = ""
    try:
        manifest, path = _newest(c, checkpoints)
        c.begin_run(manifest, path)
    except (PSError, OSError) as error:
        where = path or "its last cut"
        c.fail(f"{loss.why}; it cannot go back to {where}: {error}; go on from the last checkpoint with --resume")
        return
    after = c.going_back.loss
    assert after is not None, "recorded with the run"
    where = f"cut {after.cut}" if after.cut else "the beginning"
    c.warn(f"{loss.why}: all go back to {where}, in run {c.run}; to be trained again: {after.lost}")


def _newest(c: "Coordinator", checkpoints: CheckpointStore) -> tuple[Manifest | None, str]:
    """Return the newest committed cut of this run, or what it began with: a manifest and its path; None: first values."""
    cut = c.cuts.begun
    if cut:
        # It may have been committed, and not recorded: those before it may be gone by now.
        try:
            manifest = checkpoints.load_manifest(cut)
            if (manifest.job, manifest.run) == (c.spec.job, c.run):
                return manifest, f"{checkpoints.files.root}/{cut_folder(cut)}"
        except (CorruptCheckpoint, NotFound):
            logger.info("event=cut_never_was cut=%d", cut)
    path = c.cuts.newest_path()
    if not path:
        return None, ""
    return open_checkpoint(path, options=place_of(c.spec).options_for(path))[1], path


def lost_since(manifest: Manifest | None, steps: int, counted: Mapping[str, Any]) -> str:
    """Return what was trained since a cut, or the beginning, for people: ``steps`` groups until now."""
    groups = max(0, steps - int(counted.get("steps", 0)))
    text = f"{groups} groups of splits that were closed, and what was open"
    if manifest is None:
        return f"{text}, since the beginning"
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(manifest.created)).total_seconds()
    except (TypeError, ValueError):
        return f"{text}, since cut {manifest.cut}"
    return f"{text}, since cut {manifest.cut}, {max(0.0, seconds):.0f} s ago"
