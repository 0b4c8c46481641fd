# SPDX-License-Identifier: Apache-2.0
"""A block as views of its file: the same as when it is read, none where it cannot be, and damage is found all the same."""

import checkpoint_story as story
import numpy as np
import pytest

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.store import CheckpointStore, LocalStore, open_store
from oarlock.embedding.spec import TableSpec, to_json
from oarlock.proto.errors import CorruptCheckpoint

SPEC = to_json(TableSpec("user", 2, blocks=1))


def written(store: CheckpointStore, make_manifest, rows: int = 50):
    keys = np.arange(rows, dtype=np.uint64)
    values = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    entry = store.write_block(1, BlockImage("rows", "user", 0, 3, {}, keys, values, values + 1))
    manifest = make_manifest(1, [entry], tables=(SPEC,), dense=())
    store.commit(manifest)
    return manifest, entry


def test_it_is_the_block_and_lies_in_the_file(tmp_path, make_manifest):
    store = LocalStore(tmp_path / "c")
    manifest, entry = written(store, make_manifest)
    mapped, read = store.map_block(manifest, entry), store.load_block(manifest, entry)
    assert mapped is not None
    for name in ("keys", "weights", "state", "counters"):
        assert np.array_equal(getattr(mapped, name), getattr(read, name))
    assert not mapped.weights.flags.writeable
    # It stays good when the cut is deleted.
    (tmp_path / "c" / "cut-000001" / entry.file).unlink()
    assert np.array_equal(mapped.weights, read.weights)
    with pytest.raises(CorruptCheckpoint, match="missing"):
        store.map_block(manifest, entry)


def test_a_block_without_rows_is_mapped_too(tmp_path, make_manifest):
    store = LocalStore(tmp_path / "c")
    mapped = store.map_block(*written(store, make_manifest, rows=0))
    assert mapped is not None
    assert mapped.rows == 0


def test_what_has_no_whole_plain_file_of_this_machine_is_none(tmp_path, make_manifest):
    compressed = LocalStore(tmp_path / "z", compress="zstd")
    assert compressed.map_block(*written(compressed, make_manifest, rows=5000)) is None
    elsewhere = open_store(f"memory://{tmp_path.name}/c")
    assert elsewhere.map_block(*written(elsewhere, make_manifest)) is None
    chained = LocalStore(tmp_path / "s")
    first = story.write(chained, make_manifest, 1, 1, None)
    second = story.write(chained, make_manifest, 2, 2, list(first.blocks))
    assert chained.map_block(first, first.blocks[0]) is not None
    assert chained.map_block(second, second.blocks[0]) is None


def test_damage_is_found_unless_it_is_trusted(tmp_path, make_manifest):
    store = LocalStore(tmp_path / "c")
    manifest, entry = written(store, make_manifest)
    path = tmp_path / "c" / "cut-000001" / entry.file
    data = bytearray(path.read_bytes())
    at = bytes(data).index(np.float32(99).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"weights.*checksum"):
        store.map_block(manifest, entry)
    assert store.map_block(manifest, entry, checked=True) is not None
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        store.map_block(manifest, entry, checked=True)
