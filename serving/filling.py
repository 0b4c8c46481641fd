# SPDX-License-Identifier: Apache-2.0
"""Filling a live model from a cut: the blocks of it that are newer than what shards have told.

Invariant: the model gets each block whole or not at all; the cut is said to be served once all of it is here. Reads only; by one
thread at a time, beside those that apply what shards tell.
"""

import numpy as np

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.embedding.frozen import stored_rows
from oarlock.serving.live import Live
from oarlock.serving.snapshot import Progress


def fill(live: Live, store: Reading, manifest: Manifest, at: float, *, trust: bool, progress: Progress) -> None:
    """Give a model the blocks of a cut of its run, or of the one that it began from, which were so ``at``."""
    specs = manifest.table_specs()
    entries = [
        entry
        for entry in manifest.blocks
        if entry.kind == "rows" and entry.name in live.tables and live.part.has(entry.block)
    ]
    done, total = 0, sum(entry.total_bytes for entry in entries)
    for entry in entries:
        if live.lacks(entry.name, entry.block, entry.seq):
            image = store.load_block(manifest, entry, checked=trust)
            rows = stored_rows(specs[entry.name], np.asarray(image.weights), np.asarray(image.state))
            live.fill(entry.name, entry.block, entry.seq, np.asarray(image.keys), rows, at)
        done += entry.total_bytes
        progress(done, total)
    parameters = live.parameters
    if parameters is not None:
        for entry in manifest.blocks:
            if entry.kind == "dense" and parameters.lacks(entry.name, entry.block, entry.seq):
                values = np.asarray(store.load_block(manifest, entry, checked=trust).weights, np.float32)
                with live.lock:
                    parameters.fill(entry.name, entry.block, entry.seq, values.reshape(-1), at)
        with live.lock:
            parameters.publish()
    live.cut, live.filled = max(live.cut, manifest.cut), True
