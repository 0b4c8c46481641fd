# SPDX-License-Identifier: Apache-2.0
"""Beginning: from which checkpoint a coordinator that has just opened its state begins a run, if from any.

    told to restore              that one
    one that lost blocks         its newest committed cut, or where it began: it goes back by itself
    a job made of a checkpoint   that one, unless a run of the job was begun before
    any other                    none

Invariant: a run's number and those of its cuts are above all that the job's folder of checkpoints has, also where the
coordinator's own file was lost.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from oarlock.checkpoint.line import events_of
from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.client.job import OVER
from oarlock.client.warm import to_values
from oarlock.cluster.going_back import go_back_by_itself
from oarlock.proto.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator


class Past(NamedTuple):
    """What a folder of checkpoints says of a job: its highest cut, attempts included, its highest run, and its history."""

    cut: int = 0
    run: int = 0
    events: tuple[dict[str, Any], ...] = ()


def past_of(store: CheckpointStore, job: str) -> Past:
    """Return what a store says of job ``job``."""
    run, events = 0, None
    for cut in reversed(store.cuts()):
        try:
            manifest = store.read_manifest(cut)
        except CorruptCheckpoint:
            continue
        if manifest.job == job:
            run = max(run, manifest.run)
            events = events_of(manifest.metrics) if events is None else events
    return Past(max(store.folders("cut"), default=0), run, tuple(events or ()))


def begin(c: "Coordinator", restore: str, store: CheckpointStore, *, accept_signature: bool = False) -> None:
    """Begin a run of ``c``, whose checkpoints are in ``store``, if one is to be begun. ``restore``: what it was told.

    ``accept_signature``: its workers may have another compute signature than those before.
    """
    c.accept_signature = accept_signature
    if c.handed_on is not None:
        return
    if c.going_back.due and not restore and c.phase not in OVER:
        go_back_by_itself(c, store)
        return
    path = restore or (c.spec.restore if not c.has_begun else "")
    if not path and c.spec.warm_start and not c.events.all:
        warm = to_values(c.spec.warm_start)
        with c.lock, c.store as state:
            c.events.add(state, "warm_start", c.run, **warm)
    if path:
        options = place_of(c.spec).options_for(path)
        c.begin_run(open_checkpoint(path, options=options)[1], path, past_of(store, c.spec.job))


def next_run(c: "Coordinator", store: CheckpointStore) -> "Coordinator":
    """Return the coordinator of the run after that of ``c``, which is over. It is open, as one that was started again would be:
    with a term of its own; and the run is begun, or the job failed.
    """
    assert c.handed_on is not None, "asked for when a run is over"
    after = type(c)(c.handed_on, c.spec, clock=c.clock, rng=c.rng, goes_back=True)
    after.metrics_address, after.roots = c.metrics_address, c.roots
    try:
        after.open()
        begin(after, "", store)
    except BaseException:
        after.store.close()
        raise
    return after
