# SPDX-License-Identifier: Apache-2.0
"""Chains: a block whose changes alone were written is, at every cut, the block as a plain dict has it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.checkpoint.block_file import BlockImage, decode, encode
from oarlock.checkpoint.chain import (
    HARD_LINKS,
    MAX_LINKS,
    Increment,
    merge,
    rebase,
    should_be_compacted,
    should_be_whole,
)
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.embedding.spec import TableSpec, to_json
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

TOP = (1 << 64) - 1
SPEC = to_json(TableSpec("user", 2, blocks=1))


class Model:
    """One block as dicts, and what changed since the last cut."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.changed: set[int] = set()
        self.gone: set[int] = set()
        self.sketch = b""
        self.seq = 0

    def do(self, what: str, key: int, value: int) -> None:
        self.seq += 1
        had = key in self.rows or key in self.waiting
        if what == "push":
            self.waiting.pop(key, None)
            self.rows[key] = value
        elif what == "wait" and key not in self.rows:
            self.waiting[key] = value
        elif what == "leave" and had:
            self.rows.pop(key, None)
            self.waiting.pop(key, None)
            self.gone.add(key)
        self.changed.add(key)

    def image(self, only_changed: bool) -> BlockImage:
        rows = {k: v for k, v in self.rows.items() if not only_changed or k in self.changed}
        waiting = {k: v for k, v in self.waiting.items() if not only_changed or k in self.changed}
        values = np.array(list(rows.values()), np.float32)
        return BlockImage(
            kind="rows",
            name="user",
            block=0,
            seq=self.seq,
            marks={7: self.seq},
            keys=np.array(list(rows), np.uint64),
            weights=np.stack([values, -values], axis=1),
            state=values[:, None] / 2,
            counters=values[:, None].astype(np.uint32),
            waiting=np.array(list(waiting), np.uint64),
            waited=np.array(list(waiting.values()), np.uint32),
        )

    def committed(self) -> None:
        self.changed.clear()
        self.gone.clear()


def whole(image: BlockImage) -> BlockImage:
    """The image with its rows and waiting keys in order."""
    order = np.argsort(image.waiting)
    return replace(decode(encode(image)), waiting=image.waiting[order], waited=image.waited[order], sketch=image.sketch)


def history(
    store: CheckpointStore, make_manifest: Any, cuts: list[list[tuple[str, int, int]]], begin: int = 1
) -> dict[int, BlockImage]:
    """Write a cut after each list of changes, the first whole; return what each has to hold."""
    model, entry, wanted = Model(), None, {}
    for cut, changes in enumerate(cuts, begin):
        for change in changes:
            model.do(*change)
        gone = np.array([] if entry is None else list(model.gone), np.uint64)
        entry = store.write_block(cut, model.image(entry is not None), after=entry, gone=gone)
        # As it travels to the coordinator and back.
        entry = BlockEntry(**json.loads(json.dumps(asdict(entry))))
        store.commit(manifest_of(make_manifest, cut, [entry]))
        model.committed()
        wanted[cut] = whole(model.image(False))
    return wanted


def manifest_of(make_manifest: Any, cut: int, entries: list[BlockEntry], **changes: Any) -> Manifest:
    result: Manifest = make_manifest(cut, entries, tables=(SPEC,), dense=(), **changes)
    return result


KEYS = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 1 << 40, 1 << 63, TOP])
CHANGES = st.tuples(st.sampled_from(["push", "push", "wait", "leave"]), KEYS, st.integers(1, 1000))


@given(cuts=st.lists(st.lists(CHANGES, max_size=12), min_size=1, max_size=8))
@settings(max_examples=25)
def test_every_cut_is_what_a_dict_says(
    cuts: Any, tmp_path_factory: Any, quick: Any, make_manifest: Any, same: Any
) -> None:
    store = quick(tmp_path_factory.mktemp("chain"))
    wanted = history(store, make_manifest, cuts)
    for cut, image in wanted.items():
        manifest = store.load_manifest(cut)
        assert Manifest.decode(manifest.encode()) == manifest
        (entry,) = manifest.blocks
        assert len(entry.links) == cut
        assert same(store.load_block(manifest, entry), image)
        assert not store.load_block(manifest, entry).weights.flags.writeable
        store.verify(manifest)
        assert list(store.damage(manifest)) == []


TALE = [
    [("push", 1, 10), ("push", 5, 50), ("push", 9, 90), ("wait", 3, 2)],
    [("push", 5, 51), ("leave", 9, 0), ("push", 3, 30), ("wait", 4, 1)],
    [("wait", 9, 1), ("push", 2, 20)],
]


@pytest.fixture
def store(tmp_path: Path, quick: Any, make_manifest: Any) -> CheckpointStore:
    result: CheckpointStore = quick(tmp_path)
    history(result, make_manifest, TALE)
    return result


def test_what_an_increment_says_on_disk(store: CheckpointStore) -> None:
    folder = Path(store.files.root, "cut-000002")
    names = ["gone-user-00000.arrow", "rows-user-00000.arrow", "waiting-user-00000.arrow"]
    assert sorted(path.name for path in folder.iterdir()) == [names[0], "manifest.json", *names[1:]]
    gone, rows, waiting = (pa.ipc.open_file((folder / name).read_bytes()).read_all() for name in names)
    assert gone.to_pydict() == {"key": [9]}
    assert rows.column("key").to_pylist() == [3, 5]
    assert waiting.to_pydict() == {"key": [4], "count": [1]}
    assert {table.schema.metadata[b"oarlock.after"] for table in (gone, rows, waiting)} == {b"4"}
    assert [table.schema.metadata[b"oarlock.kind"] for table in (gone, rows, waiting)] == [b"gone", b"rows", b"waiting"]
    assert (
        b"oarlock.after"
        not in pa.ipc.open_file(Path(store.files.root, "cut-000001", names[1]).read_bytes()).schema.metadata
    )
    (line,) = json.loads((folder / "manifest.json").read_bytes())["blocks"]
    assert line["base"] == [
        {n: line["base"][0][n] for n in ("bytes", "file", "folder", "rows", "seq", "sha256", *WAITING)}
    ]
    assert line["base"][0]["folder"] == "cut-000001"
    assert "folder" not in line


WAITING = ("waiting_bytes", "waiting_sha256")
NO_SUM = {"waiting_sha256": "", "gone_sha256": ""}


def test_a_sketch_comes_whole_and_stays_until_the_next() -> None:
    def link(keys: list[int], sketch: bytes) -> Increment:
        n = len(keys)
        image = BlockImage("rows", "u", 0, 1, {}, np.array(keys, np.uint64), *2 * [np.ones((n, 1), np.float32)])
        return Increment(replace(image, sketch=sketch), np.empty(0, np.uint64))

    assert merge([link([1], b"a"), link([2], b"bc"), link([3], b"")]).sketch == b"bc"
    assert merge([link([1], b""), link([2], b"")]).sketch == b""


def test_a_large_merge_is_what_a_dict_says(rng: np.random.Generator) -> None:
    """More rows than are copied at once."""
    links, rows = [], {}
    for at, count in enumerate((200_000, 90_000, 90_000)):
        keys = np.unique(rng.integers(0, 400_000, count).astype(np.uint64))
        gone = np.unique(rng.integers(0, 400_000, 20_000).astype(np.uint64)) if at else np.empty(0, np.uint64)
        weights = rng.random((len(keys), 3), np.float32)
        for key in gone.tolist():
            rows.pop(key, None)
        rows |= dict(zip(keys.tolist(), weights, strict=True))
        image = BlockImage("rows", "u", 0, at, {}, keys, weights, np.empty((len(keys), 0), np.float32))
        links.append(Increment(image, gone))
    merged = merge(links)
    assert merged.keys.tolist() == sorted(rows)
    assert np.array_equal(merged.weights, np.stack([rows[key] for key in sorted(rows)]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gone": np.array([1], np.int64)}, "gone: give a uint64 array"),
        ({"gone": np.array([4, 1, 4], np.uint64)}, "key 4 has left twice"),
        ({"after": None, "gone": np.array([1], np.uint64)}, "what they have left is not said: give after"),
        ({"cut": 3}, "is in cut-000003, which is not older than cut 3"),
        ({"image": {"seq": 3}}, "after has 10 operations, the increment only 3"),
        ({"image": {"name": "item"}}, "after is the chain of table user, block 0"),
        ({"image": {"block": 1}}, "after is the chain of table user, block 0"),
        ({"after": {"folder": ""}}, "after has no folder"),
    ],
)
def test_increments_that_cannot_be_are_refused(store: CheckpointStore, changes: dict[str, Any], says: str) -> None:
    (entry,) = store.load_manifest().blocks
    image = replace(store.load_block(store.load_manifest(), entry), **changes.pop("image", {}))
    after = replace(entry, **change) if (change := changes.pop("after", {})) is not None else None
    with pytest.raises(InvalidArgument) as caught:
        store.write_block(changes.pop("cut", 4), image, after=after, **changes)
    assert says in str(caught.value)
    assert not Path(store.files.root, "cut-000004").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folder": "cut-000002"}, "not in the order of their cuts"),
        ({"folder": "cut-12"}, "not the name of a cut's folder"),
        ({"folder": "compact-000003"}, "only the first link"),
        ({"seq": 1}, "operations of its chain's links do not ascend"),
        ({"base": 3}, "base is int"),
        ({"base": [3]}, "a link has int"),
        ({"base": [{"file": "x"}]}, "a link has the fields file"),
        ({"kind": "dense", "file": "dense-user-00000.arrow"}, "_bytes .* are not those of such a file of a table's"),
        (
            {"kind": "dense", **dict.fromkeys(("waiting_bytes", "gone_bytes"), 0), **NO_SUM},
            "are those of a table's block",
        ),
        ({"base": ()}, "the first link of its chain is whole, and nothing left it"),
        ({"gone_bytes": 0}, "gone_sha256 .* are not those"),
        ({"gone_sha256": "x"}, "gone_bytes .* are not those"),
    ],
)
def test_entries_that_cannot_be_are_refused(store: CheckpointStore, changes: dict[str, Any], says: str) -> None:
    (entry,) = store.load_manifest().blocks
    gone = {"gone_bytes": 9, "gone_sha256": "a" * 64}
    with pytest.raises(InvalidArgument, match=says):
        replace(entry, **{**gone, **changes})


def test_a_manifest_names_no_newer_folder_and_says_its_version(store: CheckpointStore, make_manifest: Any) -> None:
    entries = list(store.load_manifest().blocks)
    with pytest.raises(InvalidArgument, match="in cut-000003, which is newer than cut 2"):
        manifest_of(make_manifest, 2, entries)
    with pytest.raises(InvalidArgument, match=r"came with format 1\.2, the manifest says 1\.1"):
        manifest_of(make_manifest, 3, entries, format_version="1.1")
    # A block that did not change need not be written: a later cut names the same files.
    store.commit(manifest_of(make_manifest, 4, entries))
    assert store.load_manifest().blocks == tuple(entries)
    store.verify(store.load_manifest())


@pytest.mark.parametrize("name", ["rows", "gone", "waiting"])
@pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
def test_damage_names_the_file_and_the_next_cut_without_it(store: CheckpointStore, name: str, how: str) -> None:
    path = Path(store.files.root, "cut-000002", f"{name}-user-00000.arrow")
    data = bytearray(path.read_bytes())
    data[-500] ^= 1
    path.unlink() if how == "missing" else path.write_bytes(data if how == "altered" else data[:-7])
    for cut in (2, 3):
        manifest = store.load_manifest(cut)
        for action in (lambda m=manifest: store.verify(m), lambda m=manifest: store.load_block(m, m.blocks[0])):
            with pytest.raises(CorruptCheckpoint, match=f"^cut-000002/{name}-user-00000.arrow: {how}") as caught:
                action()
            assert caught.value.details["older"] == 1
            assert str(caught.value).endswith(f"cut 1 is the next older one{' without it' if cut == 3 else ''}")
        assert [str(error) for error in store.damage(manifest)] == [str(caught.value)]
    store.verify(store.load_manifest(1))


def test_a_damaged_beginning_spoils_all_of_its_chain(store: CheckpointStore) -> None:
    path = Path(store.files.root, "cut-000001", "rows-user-00000.arrow")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match="no older cut can be read"):
        store.verify(store.load_manifest())


def test_an_increment_is_no_whole_block(store: CheckpointStore, make_manifest: Any) -> None:
    """Under right checksums: a manifest that leaves out the beginning, or swaps it."""
    (entry,) = store.load_manifest().blocks
    bare = manifest_of(make_manifest, 3, [replace(entry, base=())])
    with pytest.raises(CorruptCheckpoint, match="it is an increment to 8 operations, where a whole block is expected"):
        store.load_block(bare, bare.blocks[0])
    shorter = manifest_of(make_manifest, 3, [replace(entry, base=entry.base[:1])])
    with pytest.raises(CorruptCheckpoint, match="an increment to 8 operations, where an increment to 4"):
        store.load_block(shorter, shorter.blocks[0])


def test_rows_of_another_width_do_not_merge(store: CheckpointStore, make_manifest: Any) -> None:
    (entry,) = store.load_manifest().blocks
    image = store.load_block(store.load_manifest(), entry)
    other = replace(image, state=np.ones((len(image.keys), 3), np.float32))
    manifest = manifest_of(make_manifest, 4, [store.write_block(4, other, after=entry)])
    store.commit(manifest)
    with pytest.raises(CorruptCheckpoint, match=r"^cut-000004/rows.* in a chain of \(2, 3, 1\)"):
        store.load_block(manifest, manifest.blocks[0])


# When to begin anew


def grown(changed: int, links: int, rows: int = 1000) -> BlockEntry:
    """The entry of a block whose chain has a whole file of ``rows`` and increments of ``changed``."""
    entry = BlockEntry("rows", "user", 7, "rows-user-00007.arrow", 9, rows, 1, "a" * 64, folder="cut-000001")
    for cut in range(2, links + 1):
        entry = replace(entry, folder=f"cut-{cut:06d}", rows=changed, base=entry.links)
    return entry


def test_cuts_are_increments_unless_those_would_be_as_large_or_chains_without_end() -> None:
    assert not should_be_whole(grown(10, 1), 875, rows=1000)
    assert should_be_whole(grown(10, 1), 876, rows=1000)
    assert should_be_whole(None, 0, rows=1000)
    assert should_be_whole(
        BlockEntry("dense", "w", 0, "dense-w-00000.arrow", 9, 9, 1, "a" * 64, folder="cut-000001"), 0, rows=9
    )
    # Nothing of it changed, of which nothing has to be read either.
    assert not should_be_whole(grown(0, 1, rows=0), 0, rows=0)
    # However far behind compaction is: a chain has at most so many links, and its increments so many rows.
    assert not should_be_whole(grown(10, HARD_LINKS - 1), 10, rows=1000)
    assert should_be_whole(grown(10, HARD_LINKS), 10, rows=1000)
    assert not should_be_whole(grown(500, 8), 500, rows=1000)
    assert should_be_whole(grown(500, 8), 501, rows=1000)
    # A block that grew is judged by what it is now.
    assert not should_be_whole(grown(500, 8), 501, rows=2000)


def test_long_chains_and_fat_ones_are_compacted() -> None:
    assert not should_be_compacted(grown(10, MAX_LINKS - 1))
    assert should_be_compacted(grown(10, MAX_LINKS))
    assert should_be_compacted(grown(10, 3), links=3)
    assert not should_be_compacted(grown(500, 3))
    assert should_be_compacted(grown(501, 3))
    assert not should_be_compacted(grown(0, 1, rows=0), links=1)


# Compaction


def test_a_compacted_chain_is_the_same_and_later_cuts_follow_it(
    store: CheckpointStore, make_manifest: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.load_manifest()
    wanted = store.load_block(manifest, manifest.blocks[0])
    before = {path: path.read_bytes() for path in Path(store.files.root).rglob("*.*")}
    told: list[tuple[int, int]] = []
    (done,) = store.compact(manifest, progress=lambda done, total: told.append((done, total)))
    assert told == [(manifest.blocks[0].total_bytes,) * 2]
    assert (done.folder, done.base, done.seq) == ("compact-000003", (), wanted.seq)
    assert all(path.read_bytes() == data for path, data in before.items())

    # A cut that was written meanwhile follows the old chain; the next one may follow the new file, with that in between.
    small = replace(
        wanted, seq=wanted.seq + 1, **{n: getattr(wanted, n)[:1] for n in ("keys", "weights", "state", "counters")}
    )
    small = replace(small, waiting=small.waiting[:0], waited=small.waited[:0])
    four = store.write_block(4, small, after=manifest.blocks[0])
    store.commit(manifest_of(make_manifest, 4, [four]))
    five = store.write_block(5, replace(small, seq=small.seq + 1), after=rebase(four, done), gone=wanted.keys[1:2])
    assert [link.folder for link in five.links] == ["compact-000003", "cut-000004", "cut-000005"]
    store.commit(manifest_of(make_manifest, 5, [five]))
    found = store.load_manifest()
    store.verify(found)
    image = store.load_block(found, found.blocks[0])
    assert image.keys.tolist() == [key for at, key in enumerate(wanted.keys.tolist()) if at != 1]
    assert image.waiting.tolist() == wanted.waiting.tolist()

    # Begun again, it does not touch what a cut names by now.
    with monkeypatch.context() as patch:
        patch.setattr(store.files, "write_file", lambda *_, **__: pytest.fail("a cut's file was written again"))
        assert store.compact(manifest) == [done]
    assert rebase(done, done) == done
    assert rebase(manifest.blocks[0], done) == done
    assert rebase(replace(four, base=()), done) == replace(four, base=())


def test_a_block_that_is_whole_is_not_compacted(store: CheckpointStore) -> None:
    assert store.compact(store.load_manifest(1)) == []
    assert not list(Path(store.files.root).glob("compact-*"))
