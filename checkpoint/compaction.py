# SPDX-License-Identifier: Apache-2.0
"""Compaction: a long chain's content as one whole file, which later cuts may chain on instead.

Invariant: no cut changes. What is written is in a folder of its own, ``compact-000012/`` for chains whose newest link is of cut
12, under names that nothing uses until a cut is committed that names them; before that all of it is durable. So compaction
may fail or die anywhere, and be begun again. One compaction of a block at a time, from any process and thread, while cuts
are written and collected. A shard has it done by ps/compacting.py.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.entry import BlockEntry, Link
from oarlock.checkpoint.format import compact_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading

logger = logging.getLogger(__name__)


Write = Callable[[str, BlockImage], BlockEntry]
# Compacted files that cuts name, by folder and file.
Used = Mapping[tuple[str, str], Link]


def compact(
    store: Reading,
    write: Write,
    manifest: Manifest,
    blocks: Iterable[BlockEntry],
    progress: Callable[[int, int], None] | None,
) -> list[BlockEntry]:
    """Write a whole file for each of ``blocks`` that has increments; return their entries. ``write`` gets a folder's name."""
    entries = [entry for entry in blocks if entry.base]
    used = in_use(store, manifest)
    written = []
    done, total = 0, sum(entry.total_bytes for entry in entries)
    for entry in entries:
        written.append(compact_block(store, write, manifest, entry, used))
        done += entry.total_bytes
        if progress is not None:
            progress(done, total)
    logger.info(
        "checkpoint_compacted cut=%d blocks=%d bytes=%d",
        manifest.cut,
        len(written),
        sum(e.total_bytes for e in written),
    )
    return written


def compact_block(store: Reading, write: Write, manifest: Manifest, entry: BlockEntry, used: Used) -> BlockEntry:
    """Write a whole file for one chain, durably; return its entry. ``used``: as ``in_use`` found it."""
    newest = entry.links[-1]
    folder = compact_folder(newest.number)
    known = used.get((folder, newest.file))
    if known is not None:
        # A cut has it already: it must not be written again, for that cut must not change even if we die in between.
        return replace(entry, base=(), **known.__dict__)
    written = write(folder, store.load_block(manifest, entry))
    store.files.sync_folder(folder)
    return written


def in_use(store: Reading, manifest: Manifest) -> Used:
    """Return the compacted files that cuts name. Newer cuts than ``manifest`` may, older ones cannot."""
    found = (store.newest([cut]) for cut in store.cuts() if cut >= manifest.cut)
    links = (entry.links[0] for each in found if each is not None for entry in each.blocks)
    return {(link.folder, link.file): link for link in links if link.folder == compact_folder(link.number)}
