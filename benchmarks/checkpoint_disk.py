# SPDX-License-Identifier: Apache-2.0
"""What a cut's files cost without the product: written once more, and read and copied once; and what it takes to restore them.

Invariant: as many files of the same bytes, one fsync each, by one thread; what is read comes from the disk, not from the
system's cache, unless it is said to be there. Nothing is left on the disk.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from oarlock.checkpoint.store import LocalStore
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.router import Routes, changes_of
from oarlock.ps.adopting import adopt
from oarlock.ps.shard import Shard


def write_raw(files: Iterable[Path], folder: Path) -> float:
    """Return the seconds in which the bytes of ``files`` can be written to ``folder``, which is removed again."""
    contents = [file.read_bytes() for file in files]
    folder.mkdir()
    try:
        begun = time.monotonic()
        for number, content in enumerate(contents):
            descriptor = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return time.monotonic() - begun
    finally:
        shutil.rmtree(folder)


def compact(root: Path, cut: int) -> tuple[int, float]:
    """Return the bytes that a compaction of all chains of a cut writes, and its seconds, one block after the other."""
    store = LocalStore(root)
    manifest = store.load_manifest(cut)
    begun = time.monotonic()
    found = store.compact(manifest)
    return sum(entry.total_bytes for entry in found), time.monotonic() - begun


def forget(files: Iterable[Path]) -> None:
    """Have the system keep nothing of these files in its cache. They must be durable."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_raw(files: Iterable[Path]) -> float:
    """Return the seconds in which ``files`` can be read, and copied once to memory of their own."""
    files = list(files)
    sizes = [file.stat().st_size for file in files]
    begun = time.monotonic()
    room = np.empty(max(sizes, default=0), np.uint8)
    kept = []
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb", buffering=0) as opened:
            at = 0
            while at < size and (n := opened.readinto(room.data[at:size])):
                at += n
        kept.append(room[:size].copy())
    return time.monotonic() - begun


def restore(spec: JobSpec, me: int, routes: Routes, cut: Path) -> tuple[float, int]:
    """Return the seconds in which shard ``me`` adopts its blocks from a cut, and how many rows it has then."""
    shard = Shard(spec)
    try:
        begun = time.monotonic()
        adopt(shard, me, changes_of(routes), ClosedSet(), str(cut))
        return time.monotonic() - begun, sum(table.rows for table in shard.tables)
    finally:
        shard.close()
