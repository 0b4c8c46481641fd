# SPDX-License-Identifier: Apache-2.0
"""Where a job's next run begins: the cut of its own folder that `--resume` means.

Invariant: it is on the job's line of history unless it was asked for by number, and every file of it is whole. Reads only.
"""

import logging
from collections.abc import Sequence

from oarlock.checkpoint.format import cut_folder
from oarlock.checkpoint.line import Restore, events_of, line_of, restores_in
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.store import CheckpointStore, open_checkpoint
from oarlock.client.job import JobSpec
from oarlock.proto.errors import CorruptCheckpoint, NotFound, SpecMismatch

logger = logging.getLogger(__name__)


def cut_to_resume(store: CheckpointStore, spec: JobSpec, restores: Sequence[Restore] | None, cut: int | None) -> str:
    """Return the path of the cut that a job goes on from: ``cut``, or the newest of its line.

    ``restores``: what the coordinator's file says of it, None if that is lost. A new job that has no cut of its own begins again
    where it began. CorruptCheckpoint says what is damaged, with the next older whole cut of the line as ``older``.
    """
    cuts = store.cuts()
    if cut is not None:
        store.load_manifest(cut)  # says which there are
        _check(store, spec, cut, [n for n in cuts if n < cut])
        return f"{store.files.root}/{cut_folder(cut)}"
    if restores is None:
        newest = store.latest()
        restores = restores_in(events_of(newest.metrics)) if newest is not None else []
    line = line_of(cuts, restores)
    if line:
        _check(store, spec, line[-1], line[:-1])
        return f"{store.files.root}/{cut_folder(line[-1])}"
    if spec.restore:
        other, manifest = open_checkpoint(spec.restore, options=place_of(spec).options_for(spec.restore))
        other.verify(manifest)
        return spec.restore
    raise NotFound(f"{store.files.root} holds no whole checkpoint: train anew under another --name")


def _check(store: CheckpointStore, spec: JobSpec, cut: int, older: Sequence[int]) -> None:
    try:
        _verified(store, spec, cut)
    except CorruptCheckpoint as error:
        whole = next((n for n in reversed(older) if _is_whole(store, spec, n)), None)
        says = "no older cut is whole" if whole is None else f"cut {whole} is the next older one that is whole"
        # What it says of older ones is of those with a manifest; these were read.
        raise CorruptCheckpoint(
            f"cut {cut} is damaged: {error.message.rpartition('; ')[0] or error.message}; {says}",
            **{**error.details, "cut": cut, "older": whole},
        ) from None


def _verified(store: CheckpointStore, spec: JobSpec, cut: int) -> Manifest:
    manifest = store.read_manifest(cut)
    if manifest.job != spec.job:
        raise SpecMismatch(
            f"cut {cut} in {store.files.root} is of job {manifest.job}, not of {spec.name} ({spec.job}): give it to --restore "
            "without --resume, which begins a new job with it"
        )
    store.verify(manifest)
    return manifest


def _is_whole(store: CheckpointStore, spec: JobSpec, cut: int) -> bool:
    try:
        _verified(store, spec, cut)
    except (CorruptCheckpoint, SpecMismatch) as error:
        logger.warning("event=cut_passed_over cut=%d reason=%s", cut, error)
        return False
    return True
