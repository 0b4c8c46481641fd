# SPDX-License-Identifier: Apache-2.0
"""A cut, opened: its rows are the cut's whatever its files are, blocks that did not change are shared, damage is refused."""

import gc
import weakref

import numpy as np
import pytest
import serving_rig

from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import CorruptCheckpoint, UnknownTable
from oarlock.serving.snapshot import Version, open_snapshot


def rows_of(snapshot, name, keys):
    table = snapshot.table(name)
    out = np.empty((len(keys), table.spec.dim), np.float32)
    missing = table.lookup(np.asarray(keys, np.uint64), out)
    return out, missing


@pytest.mark.parametrize("kind", ["plain", "zstd", "memory", "bfloat16"])
def test_rows_are_those_of_the_cut(tmp_path, kind):
    folder = f"memory://{tmp_path.name}/c" if kind == "memory" else tmp_path / "c"
    specs = (TableSpec("user", 4, blocks=4, dtype="bfloat16"),) if kind == "bfloat16" else serving_rig.SPECS
    model = serving_rig.Model(folder, specs=specs, compress="zstd" if kind == "zstd" else None)
    if kind == "bfloat16":
        # Every one of these values is one of bfloat16.
        model.keys = np.arange(8, 64, 8, dtype=np.uint64)
    manifest = model.cut(0 if kind == "bfloat16" else 3)
    told = []
    snapshot = open_snapshot(model.store, manifest, progress=lambda done, total: told.append((done, total)))
    for spec in specs:
        found, missing = rows_of(snapshot, spec.name, model.keys)
        assert missing == 0
        assert (found == serving_rig.value_of(manifest.cut, model.keys)[:, None]).all()
    assert snapshot.version == Version(0, manifest.cut, 1769860800.0)
    assert told[-1][0] == told[-1][1] == sum(e.total_bytes for e in manifest.blocks if e.kind == "rows")
    if "item" in snapshot.tables:
        assert rows_of(snapshot, "item", [1 << 40])[0].tolist() == [[0.0] * 16]


def test_a_chain_of_increments_reads_as_the_newest_link_says(tmp_path):
    model = serving_rig.Model(tmp_path / "c", specs=serving_rig.SPECS[:1])
    before = model.cut(1)
    changed, gone = model.keys[:50], model.keys[150:160]
    whole, model.keys = model.keys, changed
    images = model.images(model.specs[0], 2)
    model.keys = whole
    entries = []
    number = np.empty(len(gone), np.int32)
    serving_rig.blocks_of(gone, serving_rig.table_salt("user"), 2, number)
    for image, entry in zip(images, (e for e in before.blocks if e.kind == "rows"), strict=True):
        entries.append(model.store.write_block(2, image, after=entry, gone=gone[number == image.block]))
    entries += [e for e in before.blocks if e.kind == "dense"]
    snapshot = open_snapshot(model.store, model.commit(2, entries))
    found, missing = rows_of(snapshot, "user", whole)
    assert missing == len(gone)
    expected = serving_rig.value_of(1, whole)
    expected[:50] = serving_rig.value_of(2, changed)
    kept = ~np.isin(whole, gone)
    assert (found[kept, 0] == expected[kept]).all()
    # What left reads as a key that never came.
    other = serving_rig.Model(tmp_path / "d", specs=model.specs)
    other.keys = np.empty(0, np.uint64)
    assert (rows_of(open_snapshot(other.store, other.cut(1)), "user", gone)[0] == found[~kept]).all()


def test_blocks_that_did_not_change_are_shared_and_the_rest_goes(model):
    first = open_snapshot(model.store, model.store.load_manifest(1))
    second = open_snapshot(model.store, model.cut(2, same=model.store.load_manifest(1)), before=first)
    assert all(a is b for a, b in zip(first.tables["user"].blocks, second.tables["user"].blocks, strict=True))
    assert not set(first.tables["item"].blocks) & set(second.tables["item"].blocks)
    assert (rows_of(second, "item", model.keys)[0][:, 0] == serving_rig.value_of(2, model.keys)).all()
    shared, left = (weakref.ref(first.tables[name].blocks[0]) for name in ("user", "item"))
    del first
    gc.collect()
    assert shared() is not None
    assert left() is None


def test_another_job_shares_nothing(model, tmp_path):
    first = open_snapshot(model.store, model.store.load_manifest(1))
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    made = open_snapshot(other.store, other.cut(1), before=first)
    assert not set(made.tables["user"].blocks) & set(first.tables["user"].blocks)


def test_damage_is_refused_by_name_before_anything_is_served(model):
    manifest = model.store.load_manifest(1)
    entry = next(e for e in manifest.blocks if e.name == "item")
    path = model.folder / "cut-000001" / entry.file
    data = bytearray(path.read_bytes())
    at = len(data) // 2  # amid the weights
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=entry.file):
        open_snapshot(model.store, manifest)
    open_snapshot(model.store, manifest, trust=True)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match="missing"):
        open_snapshot(model.store, manifest, trust=True)


def test_an_unknown_table_is_named_with_those_there_are(model):
    snapshot = open_snapshot(model.store, model.store.load_manifest(1))
    with pytest.raises(UnknownTable, match="no table 'shop'; its tables are: user, item"):
        snapshot.table("shop")


def test_age_is_never_below_zero():
    assert Version(0, 1, 100.0).age(90.0) == 0.0
    assert Version(0, 1, 100.0).age(107.5) == 7.5
