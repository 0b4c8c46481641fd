# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under any URL that fsspec knows: ``s3://bucket/prefix``, ``memory://folder``, ...

Invariant: as of ``checkpoint/files.py``, where the file system's put is atomic and durable when it is answered, as that of an
object store is. A manifest is put only where there is none: S3 and what speaks like it decide that themselves (If-None-Match);
of other file systems the one that asks first and then writes leaves a moment in which two coordinators could both write.
Nothing is cached, since other processes write too. Any number of threads; connections are the process's, shared by all.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec

from oarlock.checkpoint.files import plain_name
from oarlock.proto.errors import InvalidArgument

# What an answer may say that tells of a file, and not of the way there.
_OF_FILES = (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOTEMPTY, errno.EEXIST)
# They have no folders; asking them for one may make a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}


class FsspecFiles:
    """A folder under a URL. ``options`` are the file system's, such as ``endpoint_url`` of S3; credentials are its business."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        try:
            with _told(url):
                self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **(options or {}))
        except OSError as error:
            raise InvalidArgument(f"{url}: no file system for it: {error.strerror}") from None
        self._root = root.rstrip("/")
        if not self._root:
            raise InvalidArgument(f"{url}: name a folder, such as s3://bucket/checkpoints")

    @property
    def root(self) -> str:
        return self._url

    def write_file(self, path: str, data: Any, *, meanwhile: Callable[[], object] = int) -> None:
        """Put a file, in place of one of that name."""
        target = self._path(path)
        meanwhile()
        with _told(self._name(path)):
            self._make_folder(target)
            self._fs.pipe_file(target, b"".join(data) if isinstance(data, list) else bytes(memoryview(data)))

    def commit_file(self, path: str, data: Any) -> None:
        """Put a file where there is none; FileExistsError if there is another one. The same again changes nothing."""
        target, data = self._path(path), bytes(memoryview(data))
        try:
            with _told(self._name(path)):
                self._make_folder(target)
                self._fs.pipe_file(target, data, mode="create")
        except OSError:
            # An answer may be lost, and the put asked again be refused because of the first: what is there decides.
            found = self._found(path)
            if found is None:
                raise
            if found != data:
                raise FileExistsError(errno.EEXIST, "another one is there", self._name(path)) from None
            return
        if self._found(path) != data:
            raise OSError(errno.EIO, "what was written does not read back", self._name(path))

    def read_file(self, path: str) -> bytes:
        """Return the file's bytes."""
        target = self._path(path)
        with _told(self._name(path)):
            data: bytes = self._fs.cat_file(target)
            return data

    def map_file(self, path: str) -> None:
        """Return None: what is elsewhere can only be read."""

    def size(self, path: str) -> int:
        """Return the file's length in bytes."""
        target = self._path(path)
        with _told(self._name(path)):
            found = self._fs.info(target)
        if found["type"] != "file":
            raise OSError(errno.EINVAL, "not a regular file", self._name(path))
        return int(found["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the lengths of a folder's files by name, by one listing; none if it does not exist."""
        found = self._entries(f"{self._root}/{plain_name(folder)}")
        return {name: int(entry["size"]) for name, entry in found.items() if entry["type"] == "file"}

    def _list(self, path: str, kind: str) -> list[str]:
        return sorted(name for name, entry in self._entries(path).items() if entry["type"] == kind)

    def _entries(self, path: str) -> dict[str, dict[str, Any]]:
        try:
            with _told(path):
                entries = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        # Some list the folder itself, as the empty object that stands for it.
        names.pop(path.rpartition("/")[2], None)
        return names

    def folders(self) -> list[str]:
        """Return the names of the root's folders, sorted."""
        return self._list(self._root, "directory")

    def list(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted; none if it does not exist."""
        return self._list(f"{self._root}/{plain_name(folder)}", "file")

    def sync_folder(self, folder: str) -> None:
        """Do nothing: a file that was put is there under its name."""

    def delete(self, path: str, *, durable: bool = False) -> None:
        """Delete a file."""
        target = self._path(path)
        with _told(self._name(path)):
            self._fs.rm_file(target)

    def delete_folder(self, folder: str) -> None:
        """Delete an empty folder, where there are folders without files in them."""
        path = f"{self._root}/{plain_name(folder)}"
        with _told(self._name(folder)):
            if self._fs.isdir(path) and not self._fs.ls(path, detail=False):
                self._fs.rmdir(path)
            elif self._fs.isdir(path):
                raise OSError(errno.ENOTEMPTY, "not empty")

    def _found(self, path: str) -> bytes | None:
        try:
            return self.read_file(path)
        except FileNotFoundError:
            return None

    def _path(self, path: str) -> str:
        folder, _, name = path.partition("/")
        return f"{self._root}/{plain_name(folder)}/{plain_name(name)}"

    def _name(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _make_folder(self, target: str) -> None:
        protocol = self._fs.protocol
        if not _OBJECT_STORES.intersection([protocol] if isinstance(protocol, str) else protocol):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn whatever a file system raises into an OSError with a number and a name."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, str(error) or os.strerror(errno.EACCES), name) from error
    except OSError as error:
        number = error.errno if error.errno in _OF_FILES else errno.EIO
        raise OSError(number, error.strerror or str(error), name) from error
    except Exception as error:
        # Each client library has errors of its own, and what is above knows those of files only.
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", name) from error
