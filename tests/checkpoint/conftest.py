# SPDX-License-Identifier: Apache-2.0
"""A small job's blocks and manifests, and a disk that fails, dies or loses power at a chosen operation."""

import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import pytest

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.files import Calls, LocalFiles
from oarlock.checkpoint.manifest import BlockEntry, ClosedSet, Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.embedding.spec import Admission, DenseSpec, OptimizerSpec, TableSpec, to_json
from tests.conftest import load_shared

for _name in ("story", "faulty_files"):
    load_shared(f"checkpoint/{_name}.py", f"checkpoint_{_name}")

ADAGRAD = OptimizerSpec("adagrad")
TABLES = (
    TableSpec("user", 3, optimizer=ADAGRAD, blocks=2),
    TableSpec("Item", 2, optimizer=OptimizerSpec("sgd"), blocks=1),
)
COUNTING = (
    TableSpec("seen", 2, optimizer=OptimizerSpec("adagrad"), blocks=2, usage=True, admission=Admission("count")),
    TableSpec("Drawn", 2, optimizer=OptimizerSpec("sgd"), blocks=2, admission=Admission("sketch", capacity=1000)),
)
DENSE = (DenseSpec("tower.0-w", (3, 2), optimizer=ADAGRAD, slice=4),)


def image_of(kind: str, name: str, block: int, keys: list[int], width: tuple[int, int], version: int) -> BlockImage:
    rows = 1 if kind == "dense" else len(keys)
    weights = np.arange(rows * width[0], dtype=np.float32).reshape(rows, width[0]) + np.float32(version) / 4
    state = np.full((rows, width[1]), version + 0.5, np.float32)
    marks = {1 << 40: version, 7: 2 * version}
    return BlockImage(kind, name, block, 10 * version + block, marks, np.array(keys, np.uint64), weights, state)


def all_images(version: int) -> list[BlockImage]:
    """Every block of the job; ``version`` changes each file's contents. Block 1 of user is empty."""
    return [
        image_of("rows", "user", 0, [0, 5 + version, (1 << 64) - 1], (3, 3), version),
        image_of("rows", "user", 1, [], (3, 3), version),
        image_of("rows", "Item", 0, [11, 12], (2, 0), version),
        image_of("dense", "tower.0-w", 0, [], (4, 4), version),
        image_of("dense", "tower.0-w", 1, [], (2, 2), version),
    ]


def full_images(version: int) -> list[BlockImage]:
    """Every block of a job whose tables also count: what came with format 1.1."""
    keys = np.array([9, 1 << 63, version], np.uint64)
    seen = [
        replace(
            image_of("rows", "seen", block, rows, (2, 1), version),
            counters=np.arange(len(rows) * 3, dtype=np.uint32).reshape(len(rows), 3) + np.uint32(version << 28),
            waiting=keys[: 3 - block],
            waited=np.array([1, (1 << 30) - 1, version], np.uint32)[: 3 - block],
        )
        for block, rows in enumerate([[4, 3 + 100 * version], []])
    ]
    sketch = np.arange(24, dtype=np.int64) * version
    drawn = replace(image_of("rows", "Drawn", 0, [5], (2, 0), version), sketch=sketch.tobytes())
    # No key waits here, so there is no second file.
    idle = image_of("rows", "Drawn", 1, [], (2, 0), version)
    return [*seen, drawn, idle, *all_images(version)]


def manifest_of(cut: int, entries: list[BlockEntry], **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "job": "0123456789abcdef0123456789abcdef",
        "run": 2,
        "cut": cut,
        "created": "2026-01-31T12:00:00Z",
        "seed": 42,
        "tables": tuple(to_json(spec) for spec in TABLES),
        "dense": tuple(to_json(spec) for spec in DENSE),
        "recipe": "oarlock.recipes.lr:model",
        "config": {"batch_size": 512, "learning_rate": 1e-05, "label": "clické"},
        "files": ({"path": "day_0.parquet", "rows": 1000}, {"path": "day_1.parquet", "rows": 900}),
        "closed": ClosedSet(5, (6, 9)),
        "open_splits": (7, 1 << 40),
        "epoch": 1,
        "step": 1234,
        "metrics": {"auc": 0.75, "loss": 0.1},
        "best": {},
        "blocks": tuple(entries),
    }
    return Manifest(**{**values, **changes})


def same_images(a: BlockImage, b: BlockImage) -> bool:
    """Equal to the bit, rows in the same order."""
    plain = ("kind", "name", "block", "seq", "marks")
    arrays = ("keys", "weights", "state", "counters", "waiting", "waited")
    return all(getattr(a, name) == getattr(b, name) for name in (*plain, "sketch")) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((getattr(a, name), getattr(b, name)) for name in arrays)
    )


def write_cut(store: Any, cut: int, version: int) -> Manifest:
    manifest = manifest_of(cut, [store.write_block(cut, image) for image in all_images(version)])
    store.commit(manifest)
    return manifest


def write_full_cut(store: Any, cut: int, version: int) -> Manifest:
    tables = tuple(to_json(spec) for spec in (*TABLES, *COUNTING))
    manifest = manifest_of(cut, [store.write_block(cut, image) for image in full_images(version)], tables=tables)
    store.commit(manifest)
    return manifest


def write_chained_cuts(store: Any, packed: Any) -> tuple[Manifest, dict[tuple[str, int], BlockImage]]:
    """Cut 11 whole, then cut 12, of whose blocks some are increments; return its manifest and what those blocks hold.

    ``packed`` is the same store, but compresses: one increment is written with it.
    """
    before = write_full_cut(store, 11, 3)
    entries = {(entry.name, entry.block): entry for entry in before.blocks}
    old = {(image.name, image.block): image for image in full_images(3)}

    def at(name: str, block: int, rows: list[int], **changes: Any) -> BlockImage:
        part = {n: getattr(old[name, block], n)[rows] for n in ("keys", "weights", "state", "counters")}
        part["weights"] = part["weights"] + np.float32(100)
        none = {"waiting": np.empty(0, np.uint64), "waited": np.empty(0, np.uint32), "sketch": b""}
        return replace(old[name, block], seq=old[name, block].seq + 5, marks={7: 8}, **{**part, **none, **changes})

    waits = {"waiting": np.array([3, 303], np.uint64), "waited": np.array([4, 1], np.uint32)}
    sketch = np.arange(24, dtype=np.int64).tobytes()
    new = [
        (packed, at("seen", 0, [0], **waits), [303]),  # a row goes and waits again, a waiting key has come again
        (store, at("user", 0, [1]), [0]),
        (store, at("Drawn", 0, [], sketch=sketch), []),
        (store, at("user", 1, []), []),  # nothing but marks has changed
    ]
    for where, image, gone in new:
        key = image.name, image.block
        entries[key] = where.write_block(12, image, after=entries[key], gone=np.array(gone, np.uint64))
    manifest = replace(before, cut=12, step=1300, blocks=tuple(entries.values()))
    store.commit(manifest)
    user, seen = old["user", 0], old["seen", 0]
    last = at("user", 0, [1, 2])
    wanted = {
        ("user", 0): replace(last, weights=np.stack([last.weights[0], user.weights[2]])),
        ("user", 1): at("user", 1, []),
        ("seen", 0): at(
            "seen",
            0,
            [0],
            waiting=np.array([3, 9, 303, 1 << 63], np.uint64),
            waited=np.array([4, 1, 1, (1 << 30) - 1], np.uint32),
        ),
        ("Drawn", 0): replace(old["Drawn", 0], seq=at("Drawn", 0, []).seq, marks={7: 8}, sketch=sketch),
    }
    assert seen.keys.tolist() == [4, 303]
    return manifest, wanted


class Died(OSError):
    """The process is gone; nothing that it calls happens any more."""


class QuickDisk(Calls):
    """Without waiting for the disk, for tests that lose no power."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_folder(self, path: str) -> None:
        pass


@dataclass
class FaultyDisk(Calls):
    """Fails at operation ``fail_at`` (1 is the first). ``mode``:

    ``error``: that one call fails, as with a full disk (a write leaves half of its bytes), and the process goes on;
    ``kill``: the process dies before that call, the disk keeps what was done;
    ``power``: the same, and ``lose_power`` takes away all that was not made durable;
    ``torn``: the same, but only bytes are lost, names and renames stay;
    ``scattered``: the same, but each name's change is lost or kept by itself, in no order, as some file systems do.
    """

    fail_at: int
    mode: str
    operations: int = 0
    log: list[str] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)
    unsynced: dict[str, int] = field(default_factory=dict)  # path -> its durable bytes
    undo: list[tuple[str, Callable[[], object]]] = field(
        default_factory=list
    )  # folder, how to take a name's change back

    def _step(self, what: str) -> None:
        self.operations += 1
        self.log.append(what)
        if self.operations == self.fail_at or (self.operations > self.fail_at and self.mode != "error"):
            raise OSError(28, f"no space left: {what}") if self.mode == "error" else Died(what)

    def create(self, path: str) -> int:
        self._step(f"create {path}")
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.unsynced[path] = 0
        self.undo.append((os.path.dirname(path), lambda: Path(path).unlink(missing_ok=True)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        try:
            self._step(f"write {self.paths[descriptor]}")
        except OSError:
            super().write(descriptor, data[: len(data) // 2])
            raise
        return super().write(descriptor, data[: max(1024, len(data) * 2 // 3)])  # short, as the system may

    def sync(self, descriptor: int) -> None:
        self._step(f"sync {self.paths[descriptor]}")
        self.unsynced.pop(self.paths[descriptor], None)

    def close(self, descriptor: int) -> None:
        del self.paths[descriptor]
        super().close(descriptor)

    def sync_folder(self, path: str) -> None:
        self._step(f"sync_folder {path}")
        self.undo = [(folder, action) for folder, action in self.undo if folder != path]

    def rename(self, old: str, new: str) -> None:
        self._step(f"rename {old}")
        before = Path(new).read_bytes() if os.path.exists(new) else None
        super().rename(old, new)
        self.unsynced.update({new: self.unsynced.pop(old)} if old in self.unsynced else {})

        def back() -> None:
            os.replace(new, old)
            if before is not None:
                Path(new).write_bytes(before)

        self.undo.append((os.path.dirname(new), back))

    def make_folder(self, path: str) -> None:
        self._step(f"make_folder {path}")
        super().make_folder(path)
        self.undo.append((os.path.dirname(path), lambda: shutil.rmtree(path)))

    def remove(self, path: str) -> None:
        self._step(f"remove {path}")
        before = Path(path).read_bytes()
        super().remove(path)
        folder = os.path.dirname(path)
        # A folder that is durably gone has taken its names along.
        self.undo.append((folder, lambda: os.path.isdir(folder) and Path(path).write_bytes(before)))

    def remove_folder(self, path: str) -> None:
        self._step(f"remove_folder {path}")
        super().remove_folder(path)
        self.undo.append((os.path.dirname(path), lambda: os.mkdir(path)))

    def lose_power(self) -> None:
        for path, durable in self.unsynced.items() if self.mode in ("power", "torn", "scattered") else ():
            if os.path.exists(path):
                os.truncate(path, durable)
        chance = random.Random(self.fail_at)
        for _, action in reversed(self.undo):
            if self.mode == "power" or (self.mode == "scattered" and chance.random() < 0.5):
                action()


@pytest.fixture(scope="session", autouse=True)
def thread_of_fsspec() -> None:
    """Start the threads in which fsspec waits for networks and looks up names; they last as long as the process."""
    loop, names = fsspec.asyn.get_loop(), ThreadPoolExecutor(1)
    names.submit(int).result()
    loop.call_soon_threadsafe(loop.set_default_executor, names)


@pytest.fixture(scope="session")
def images() -> Callable[[int], list[BlockImage]]:
    return all_images


@pytest.fixture(scope="session")
def whole_images() -> Callable[[int], list[BlockImage]]:
    return full_images


@pytest.fixture(scope="session")
def write_whole() -> Callable[..., Manifest]:
    return write_full_cut


@pytest.fixture(scope="session")
def write_chained() -> Callable[..., Any]:
    return write_chained_cuts


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    return manifest_of


@pytest.fixture(scope="session")
def same() -> Callable[[BlockImage, BlockImage], bool]:
    return same_images


@pytest.fixture(scope="session")
def write() -> Callable[..., Manifest]:
    return write_cut


@pytest.fixture(scope="session")
def quick() -> Callable[[str | Path], CheckpointStore]:
    return lambda root: CheckpointStore(LocalFiles(root, calls=QuickDisk()))


@pytest.fixture(scope="session")
def faulty_disk() -> type[FaultyDisk]:
    return FaultyDisk
