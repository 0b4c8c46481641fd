# SPDX-License-Identifier: Apache-2.0
"""A small job's story for tests that fail it somewhere: chained cuts of two blocks, compaction, collection."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.chain import rebase
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.embedding.spec import TableSpec, to_json

SPEC = to_json(TableSpec("user", 1, blocks=2))


def block(number: int, seq: int, keys: list[int], waiting: int = 0) -> BlockImage:
    """Rows whose values say at which cut they were written."""
    values = np.full((len(keys), 1), seq, np.float32)
    image = BlockImage("rows", "user", number, seq, {7: seq}, np.array(keys, np.uint64), values, values[:, :0])
    return (
        replace(image, waiting=np.array([waiting], np.uint64), waited=np.array([seq], np.uint32)) if waiting else image
    )


def wanted(seq: int) -> list[dict[int, float]]:
    """What the blocks hold at a cut that ``write`` wrote with ``seq``."""
    first = dict.fromkeys(range(20), 1.0) | {seq: float(seq)}
    return [
        first | {n: float(n) for n in range(2, seq + 1)},
        {100 + n: float(n) for n in range(max(1, seq - 1), seq + 1)},
    ]


def write(store: CheckpointStore, make_manifest: Any, cut: int, seq: int, before: list[BlockEntry] | None) -> Manifest:
    """Write cut ``cut``: block 0 changes one row, block 1 gets one and loses the one before last; without ``before`` whole."""
    if before is None:
        images = [block(i, seq, []) for i in (0, 1)]
        images = [
            replace(
                image,
                keys=np.array(list(rows), np.uint64),
                weights=np.array(list(rows.values()), np.float32)[:, None],
                state=np.empty((len(rows), 0), np.float32),
                counters=np.empty((len(rows), 0), np.uint32),
            )
            for image, rows in zip(images, wanted(seq), strict=True)
        ]
        entries = [store.write_block(cut, image) for image in images]
    else:
        left = np.array([100 + seq - 2] if seq > 2 else [], np.uint64)
        entries = [
            store.write_block(cut, block(0, seq, [seq], waiting=50), after=before[0]),
            store.write_block(cut, block(1, seq, [100 + seq]), after=before[1], gone=left),
        ]
    manifest: Manifest = make_manifest(cut, entries, tables=(SPEC,), dense=(), step=seq, metrics={"auc": 1 / seq})
    store.commit(manifest)
    return manifest


def check(store: CheckpointStore) -> list[int]:
    """Read all cuts and compare them with what they are to hold; return them."""
    for cut in store.cuts():
        manifest = store.load_manifest(cut)
        store.verify(manifest)
        for entry, rows in zip(manifest.blocks, wanted(manifest.step), strict=True):
            image = store.load_block(manifest, entry)
            assert dict(zip(image.keys.tolist(), image.weights[:, 0].tolist(), strict=True)) == rows
    return store.cuts()


def files_of(store: CheckpointStore) -> set[str]:
    root = Path(store.files.root)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def story(store: CheckpointStore, make_manifest: Any, done: list[int]) -> None:
    """Chained cuts, compaction, a chain on what it wrote, and collection; ``done`` gets each cut when it is promised."""
    two = write(store, make_manifest, 2, 2, list(store.load_manifest(1).blocks))
    done.append(2)
    compacted = store.compact(two)
    store.keep_last(1)
    store.discard_incomplete()
    three = write(store, make_manifest, 3, 3, [rebase(e, c) for e, c in zip(two.blocks, compacted, strict=True)])
    done.append(3)
    store.keep_last(1)
    store.compact(three)
    store.discard_incomplete()
