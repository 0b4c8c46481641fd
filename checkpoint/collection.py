# SPDX-License-Identifier: Apache-2.0
"""Garbage collection by reference: a file goes when no manifest names it, wherever it is.

Invariant: no file that a readable manifest names is deleted, nor any that a damaged one might: those of its cut and of older
ones. So a failure at any point leaves all cuts as they were, and the next collection does what this one did not.
What compaction wrote stays while the newest cut has a chain that it can stand in. The coordinator alone calls it.
"""

import contextlib
import errno
import logging
from collections.abc import Collection

from oarlock.checkpoint.cuts import Cuts
from oarlock.checkpoint.format import compact_folder, cut_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.proto.errors import CorruptCheckpoint

logger = logging.getLogger(__name__)


def named(manifest: Manifest) -> set[str]:
    """Return the paths of all files that a manifest names."""
    return {file.path for entry in manifest.blocks for link in entry.links for file in link.files}


def collect(cuts: Cuts, *, below: int | None = None) -> list[int]:
    """Delete every file that no manifest names, in folders with numbers under ``below``; return the cuts whose folders went.

    The folder of a cut that exists is left as it is. Not to be called with the number of a cut that is being written.
    """
    found = {cut: _read(cuts, cut) for cut in cuts.cuts()}
    manifests = [manifest for manifest in found.values() if manifest is not None]
    keep = {path for manifest in manifests for path in named(manifest)}
    if manifests:
        keep |= _stand_ins(manifests[-1])
    above = max((cut for cut, manifest in found.items() if manifest is None), default=-1)
    gone = []
    for cut in cuts.folders("cut"):
        if cut not in found and _in_range(cut, above, below) and _empty(cuts, cut_folder(cut), keep):
            gone.append(cut)
            logger.info("checkpoint_discarded cut=%d", cut)
    for cut in cuts.folders("compact"):
        if _in_range(cut, above, below):
            _empty(cuts, compact_folder(cut), keep)
    return gone


def _in_range(cut: int, above: int, below: int | None) -> bool:
    return above < cut and (below is None or cut < below)


def _read(cuts: Cuts, cut: int) -> Manifest | None:
    try:
        return cuts.read_manifest(cut)
    except CorruptCheckpoint as error:
        logger.warning("checkpoint_not_collected cut=%d reason=%r", cut, error.message)
        return None


def _stand_ins(newest: Manifest) -> set[str]:
    """Return the paths of what compaction may have written, or be writing, to stand in the newest cut's chains."""
    return {
        f"{compact_folder(link.number)}/{kind}{link.file.removeprefix('rows')}"
        for entry in newest.blocks
        if entry.kind == "rows"
        for link in entry.links
        for kind in ("rows", "waiting")
    }


def _empty(cuts: Cuts, folder: str, keep: Collection[str]) -> bool:
    """Delete what is not to be kept of a folder, and the folder if nothing is left; tell whether it is gone."""
    names = cuts.files.list(folder)
    left = [name for name in names if f"{folder}/{name}" in keep]
    for name in names:
        if name not in left:
            # Another attempt at the same collection may be as far.
            with contextlib.suppress(FileNotFoundError):
                cuts.files.delete(f"{folder}/{name}")
    if left:
        return False
    try:
        cuts.files.delete_folder(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        # A shard that has not heard of the end of its attempt wrote another file meanwhile: the next collection's.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
