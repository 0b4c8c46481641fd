# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are: the few operations that a store needs, and their form for a local folder.

Invariant: when ``write_file`` returned, the file's bytes are durable; ``commit_file`` makes a file appear whole or not
at all, and when it returned, that file and the names of all files beside it are durable. Paths are ``folder/name``
below the root and never lead out of it. Stateless: any number of threads and processes, one writer per file.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from oarlock.checkpoint.direct import LEAST_BYTES, read_direct, write_direct
from oarlock.proto.errors import InvalidArgument


class Files(Protocol):
    """Where checkpoints are kept. Failures are OSErrors; what is not there is FileNotFoundError."""

    @property
    def root(self) -> str: ...

    def write_file(self, path: str, data: Any, *, meanwhile: Callable[[], object] = int) -> None: ...

    def commit_file(self, path: str, data: Any) -> None: ...

    def read_file(self, path: str) -> Any: ...

    def map_file(self, path: str) -> Any | None: ...

    def size(self, path: str) -> int: ...

    def sizes(self, folder: str) -> dict[str, int]: ...

    def folders(self) -> list[str]: ...

    def list(self, folder: str) -> list[str]: ...

    def sync_folder(self, folder: str) -> None: ...

    def delete(self, path: str, *, durable: bool = False) -> None: ...

    def delete_folder(self, folder: str) -> None: ...


class Calls:
    """The system calls that change a disk, one method each, so that a test can make any one of them fail."""

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def bypass(self, descriptor: int, on: bool) -> bool:
        """Have what is read and written go past the system's cache, or not; return whether it does."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except (OSError, AttributeError):
            return False
        return on

    def begin_sync(self, descriptor: int) -> None:
        # The system begins to write what it is told not to keep; what is not on the disk yet stays in its cache.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def make_folder(self, path: str) -> None:
        os.mkdir(path)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def remove_folder(self, path: str) -> None:
        os.rmdir(path)


def plain_name(name: str) -> str:
    """Return ``name`` if it names a file or folder of the folder that it is looked for in, and nothing else."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or os.sep in name:
        raise InvalidArgument(f"{name!r} is not the plain name of a file or folder")
    return name


class LocalFiles:
    """A folder of a local (or mounted) file system. The folder is made when the first file is written."""

    def __init__(self, root: str | Path, *, calls: Calls | None = None) -> None:
        self._root = os.path.abspath(root)
        self._calls = calls or Calls()

    @property
    def root(self) -> str:
        return self._root

    def write_file(self, path: str, data: Any, *, meanwhile: Callable[[], object] = int) -> None:
        """Write a new file and make its bytes durable. A file of that name is replaced, not overwritten in place.

        ``data``: bytes, or a list of pieces of them. ``meanwhile`` is called while the disk is busy with them.
        """
        folder, name = self._split(path)
        self._make_folder(folder)
        target = os.path.join(folder, name)
        try:
            descriptor = self._calls.create(target)
        except FileExistsError:
            # What is left of an earlier attempt. Removing it spares those who may still read it, and follows no link.
            self._calls.remove(target)
            descriptor = self._calls.create(target)
        try:
            pieces = [memoryview(piece).cast("B") for piece in (data if isinstance(data, list) else [data])]
            if sum(map(len, pieces)) >= LEAST_BYTES:
                write_direct(self._calls, descriptor, pieces)
            else:
                for rest in pieces:
                    while rest:
                        rest = rest[self._calls.write(descriptor, rest) :]
                self._calls.begin_sync(descriptor)
            meanwhile()
            self._calls.sync(descriptor)
        finally:
            self._calls.close(descriptor)

    def commit_file(self, path: str, data: Any) -> None:
        """Make a file appear whole or not at all, after the names of all files beside it are durable."""
        folder, name = self._split(path)
        self.write_file(f"{path}.tmp", data)
        self._calls.sync_folder(folder)
        self._calls.sync_folder(os.path.dirname(folder))
        self._calls.rename(os.path.join(folder, f"{name}.tmp"), os.path.join(folder, name))
        self._calls.sync_folder(folder)

    def read_file(self, path: str) -> Any:
        """Return a read-only buffer of the file's bytes. In memory: a file that is cut short meanwhile harms nobody."""
        descriptor = self._open(path)
        try:
            size = os.fstat(descriptor).st_size
            if size >= LEAST_BYTES:
                return read_direct(self._calls, descriptor, size)
            with os.fdopen(descriptor, "rb", closefd=False) as opened:
                return opened.read(size)
        finally:
            os.close(descriptor)

    def map_file(self, path: str) -> Any | None:
        """Return a read-only view of the file where it lies, whose pages are the system's and come when they are first read.

        None for an empty file, and where the system maps none. It stays good after the file is deleted; a file that is cut
        short ends a process that then reads behind its end.
        """
        descriptor = self._open(path)
        try:
            if not os.fstat(descriptor).st_size:
                return None
            # Python's own mmap would keep a file open for each view. The name leads to what is open.
            with pa.memory_map(f"/proc/self/fd/{descriptor}") as mapped:
                return mapped.read_buffer()
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        descriptor = self._open(path)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the lengths of a folder's files by name, of plain files only; none if it does not exist or is a link."""
        path = os.path.join(self._root, plain_name(folder))
        if os.path.islink(path):
            return {}
        try:
            with os.scandir(path) as entries:
                found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {name: status.st_size for name, status in found.items() if stat.S_ISREG(status.st_mode)}

    def folders(self) -> list[str]:
        """Return the names of the root's folders, sorted; a link to a folder is none."""
        try:
            with os.scandir(self._root) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def list(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if it does not exist or is a link."""
        path = os.path.join(self._root, plain_name(folder))
        try:
            return [] if os.path.islink(path) else sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def sync_folder(self, folder: str) -> None:
        """Wait until the names of a folder's files, and its own, are durable."""
        self._calls.sync_folder(os.path.join(self._root, plain_name(folder)))
        self._calls.sync_folder(self._root)

    def delete(self, path: str, *, durable: bool = False) -> None:
        """Delete a file (a link itself, not what it points to); ``durable`` waits until it stays deleted."""
        folder, name = self._split(path)
        self._calls.remove(os.path.join(folder, name))
        if durable:
            self._calls.sync_folder(folder)

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder."""
        self._calls.remove_folder(os.path.join(self._root, plain_name(folder)))

    def _split(self, path: str) -> tuple[str, str]:
        folder, _, name = path.partition("/")
        return os.path.join(self._root, plain_name(folder)), plain_name(name)

    def _make_folder(self, folder: str) -> None:
        if os.path.islink(folder):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder)
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            try:
                self._calls.make_folder(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise
            self._calls.sync_folder(os.path.dirname(path))

    def _open(self, path: str) -> int:
        folder, name = self._split(path)
        # Neither the cut's folder nor the file may be a link that leads elsewhere.
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", os.path.join(folder, name))
        return descriptor
