# SPDX-License-Identifier: Apache-2.0
"""Place: where a job keeps its checkpoints, as its job file says: a folder, or a URL with options of its file system.

Invariant: nothing of it is secret, for it is written to the job's files, to logs and to the options of processes. A secret is
refused by its name; credentials come from the environment or from the files where a file system's own clients look for them.
A place has the checkpoints of one job. Pure, but for ``open`` and ``check_owner``, which any thread may call.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from oarlock.checkpoint.store import CheckpointStore, is_url, open_store
from oarlock.proto.errors import InvalidArgument

COMPRESS = ("", "zstd")
FOLDER = "checkpoints"
_SECRET = re.compile(
    r"secret|token|passw|credential|connection.?string|(^|[._-])(auth|sas)($|[._-])|key([._-]?id)?$", re.IGNORECASE
)
# What names a key that others keep.
_NO_SECRET = re.compile(r"(kms|kms.?master).?key.?id$", re.IGNORECASE)
_ADVICE = (
    "give credentials in the environment (such as AWS_ACCESS_KEY_ID) or in the files where its clients look for them"
)


@dataclass(frozen=True)
class Place:
    """``path``: a folder, or a URL that fsspec knows, empty for the job's own folder. ``options``: those of the URL's file
    system, such as ``endpoint_url`` of S3. ``compress``: zstd, or empty."""

    path: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    compress: str = ""

    def __post_init__(self) -> None:
        if self.compress not in COMPRESS:
            raise InvalidArgument(f"checkpoint_compress = {self.compress!r}: choose zstd, or nothing")
        if self.options and not is_url(self.path):
            raise InvalidArgument("checkpoint_options are those of a URL's file system: give checkpoint_path = a URL")
        refuse_secret(self.path, "checkpoint_path")
        for name, value in _flat(self.options):
            last = name.rpartition(".")[2]
            if (_SECRET.search(last) and not _NO_SECRET.search(last)) or _has_password(value):
                raise InvalidArgument(
                    f"checkpoint_options: {name} would be written to the job's files and logs: {_ADVICE}"
                )

    def root(self, folder: Path) -> str:
        """Return the path or URL of the checkpoints of the job in ``folder``."""
        return self.path.rstrip("/") or str(folder / FOLDER)

    def open(self, folder: Path) -> CheckpointStore:
        """Return the store of the job in ``folder``. Nothing is read yet."""
        return self.store(self.root(folder))

    def store(self, root: str) -> CheckpointStore:
        """Return the store at ``root``, with the options of this place if they can be meant for it."""
        return open_store(root, compress=self.compress or None, options=self.options_for(root))

    def options_for(self, path: str) -> Mapping[str, Any]:
        """Return the options with which ``path`` is opened: these, if it is of the same kind of file system."""
        same = is_url(path) and is_url(self.path) and urlsplit(path).scheme == urlsplit(self.path).scheme
        return self.options if same else {}


def refuse_secret(path: str, name: str) -> None:
    """Raise InvalidArgument for a URL that may have a secret in it; ``name``: what it was given as."""
    if is_url(path):
        parts = urlsplit(path)
        if parts.password is not None or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.hostname or ''}..."
            raise InvalidArgument(f"{name} = {shown!r} has a password or a query: {_ADVICE}")


def same_place(one: str, other: str) -> bool:
    """Return whether two paths or URLs mean one folder, however they are written."""
    return resolved(one) == resolved(other)


def resolved(path: str) -> tuple[str, ...]:
    """Return what kind of place a path or URL means ("": a folder), its path there, and what else it takes to find it."""
    if not is_url(path):
        return "", os.path.realpath(path)
    parts = urlsplit(path)
    if parts.scheme == "file":
        return "", os.path.realpath(unquote(parts.path))
    # It is loaded where it is used, as by the store.
    import fsspec

    try:
        system = fsspec.get_filesystem_class(parts.scheme)
        stripped, options = str(system._strip_protocol(path)), system._get_kwargs_from_urls(path)
    except (ImportError, ValueError, OSError):
        # Nothing there can be opened from here either.
        return path.rstrip("/"), ""
    if issubclass(system, fsspec.get_filesystem_class("file")):
        return "", os.path.realpath(stripped)
    # Of some file systems the path alone does not say of which host it is.
    return system.__qualname__, stripped.rstrip("/"), repr(sorted(options.items()))


class Job(Protocol):
    """What a job says of its place."""

    @property
    def checkpoint_path(self) -> str: ...

    @property
    def checkpoint_options(self) -> Mapping[str, Any]: ...

    @property
    def checkpoint_compress(self) -> str: ...


def place_of(job: Job) -> Place:
    """Return where a job keeps its checkpoints."""
    return Place(job.checkpoint_path, job.checkpoint_options, job.checkpoint_compress)


def check_owner(store: CheckpointStore, job: str) -> None:
    """Raise InvalidArgument if the newest whole checkpoint there is of another job than ``job``."""
    newest = store.latest()
    if newest is not None and newest.job != job:
        raise InvalidArgument(
            f"{store.files.root} has checkpoints of another job ({newest.job}): every job needs a checkpoint_path of its own",
            job=newest.job,
        )


def _flat(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is None or isinstance(value, str | int | float | bool):
            yield f"{before}{name}", value
        else:
            raise InvalidArgument(f"checkpoint_options: {before}{name} = {value!r}: give text, a number, true or false")


def _has_password(value: Any) -> bool:
    return isinstance(value, str) and is_url(value) and urlsplit(value).password is not None
