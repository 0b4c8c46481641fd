# SPDX-License-Identifier: Apache-2.0
"""A block's line of the manifest: the chain of files that hold it, a whole file first and increments after it.

Invariant: an entry that exists names plain files in folders of cuts (or of what compaction wrote), each link's folder of a
higher number than the one before it. Immutable; from any thread.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from oarlock.checkpoint.format import GONE, KINDS, WAITING, check_count, is_block_file, parse_folder
from oarlock.proto.errors import InvalidArgument

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileOf(NamedTuple):
    """One file that a link names."""

    kind: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Link:
    """The files of one cut of a block's chain, in ``folder``.

    ``rows`` counts a table's rows in ``file``, or a dense block's values; ``sha256`` is over the whole file. The second file
    is of keys without a row, the third of keys that left since the link before; a link without them has no such file.
    """

    folder: str
    file: str
    bytes: int
    rows: int
    seq: int
    sha256: str
    waiting_bytes: int = 0
    waiting_sha256: str = ""
    gone_bytes: int = 0
    gone_sha256: str = ""

    def __post_init__(self) -> None:
        _check_files(self, f"link {self.folder}/{self.file}")
        if parse_folder(self.folder) is None:
            raise InvalidArgument(
                f"link {self.folder}/{self.file}: give the name of a cut's folder, such as cut-000012"
            )

    @property
    def number(self) -> int:
        """Return the cut that wrote it, or up to which it was compacted."""
        return parse_folder(self.folder)[1]  # type: ignore[index]

    @property
    def files(self) -> tuple[FileOf, ...]:
        """Return the files that there are: of keys that left, of rows, of waiting keys, as they are to be read."""
        found = [FileOf(self.file.partition("-")[0], f"{self.folder}/{self.file}", self.bytes, self.sha256)]
        if self.gone_bytes:
            found.insert(0, FileOf(GONE, self._beside(GONE), self.gone_bytes, self.gone_sha256))
        if self.waiting_bytes:
            found.append(FileOf(WAITING, self._beside(WAITING), self.waiting_bytes, self.waiting_sha256))
        return tuple(found)

    def _beside(self, kind: str) -> str:
        return f"{self.folder}/{kind}-{self.file.partition('-')[2]}"


@dataclass(frozen=True)
class BlockEntry:
    """One block: the files of the cut that changed it last, as in Link, and ``base``, the links before those.

    ``base`` is empty where the file is whole; else its first link is whole, and the rest are increments, as the entry's own
    file is. ``folder`` is empty until it is known: then the files are in the folder of the manifest's own cut.
    """

    kind: str
    name: str
    block: int
    file: str
    bytes: int
    rows: int
    seq: int
    sha256: str
    waiting_bytes: int = 0
    waiting_sha256: str = ""
    folder: str = ""
    gone_bytes: int = 0
    gone_sha256: str = ""
    base: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"block kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        check_count(f"{self.where}: block", self.block)
        _check_files(self, self.where)
        if self.folder != "" and parse_folder(self.folder) is None:
            raise InvalidArgument(f"{self.where}: folder {self.folder!r} is not the name of a cut's folder")
        if not isinstance(self.base, list | tuple):
            raise InvalidArgument(f"{self.where}: base is {type(self.base).__name__}: give a list of links")
        object.__setattr__(self, "base", tuple(link_of(link) for link in self.base))
        if self.kind != "rows" and (self.base or self.waiting_bytes or self.gone_bytes):
            raise InvalidArgument(
                f"{self.where}: increments, waiting_bytes and gone_bytes are those of a table's block"
            )
        links = self.links if self.folder else self.base
        if any(after.number <= before.number for before, after in pairwise(links)):
            raise InvalidArgument(f"{self.where}: the links of its chain are not in the order of their cuts")
        if any(after.seq < before.seq for before, after in pairwise(links)):
            raise InvalidArgument(f"{self.where}: the operations of its chain's links do not ascend")
        if any(parse_folder(link.folder)[0] != "cut" for link in links[1:]):  # type: ignore[index]
            raise InvalidArgument(f"{self.where}: only the first link of a chain is what compaction wrote")
        if (self.base[0] if self.base else self).gone_bytes:
            raise InvalidArgument(f"{self.where}: the first link of its chain is whole, and nothing left it")

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """The chain, the whole file first, the entry's own files last."""
        own = {f.name: getattr(self, f.name) for f in fields(Link)}
        return (*self.base, Link(**own))

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all files of the chain."""
        own = self.bytes + self.waiting_bytes + self.gone_bytes
        return own + sum(link.bytes + link.waiting_bytes + link.gone_bytes for link in self.base)

    @property
    def waiting_file(self) -> str:
        """Return the name of the newest link's file of waiting keys, empty if it has none."""
        return f"{WAITING}-{self.file.partition('-')[2]}" if self.waiting_bytes else ""

    @property
    def where(self) -> str:
        """What messages call it, such as ``table user, block 3``."""
        return f"{'table' if self.kind == 'rows' else 'dense parameter'} {self.name}, block {self.block}"


def link_of(values: object) -> Link:
    """Return ``values`` if it is a link, or the link of its fields."""
    if isinstance(values, Link):
        return values
    needed = {f.name for f in fields(Link) if f.default is MISSING}
    if not isinstance(values, Mapping) or not needed <= values.keys() <= {f.name for f in fields(Link)}:
        found = f"the fields {', '.join(map(str, values))}" if isinstance(values, Mapping) else type(values).__name__
        raise InvalidArgument(f"a link has {found}: expected {', '.join(f.name for f in fields(Link))}")
    return Link(**values)


def _check_files(files: Any, where: str) -> None:
    for name in ("bytes", "rows", "seq", "waiting_bytes", "gone_bytes"):
        check_count(f"{where}: {name}", getattr(files, name))
    if not is_block_file(files.file):
        raise InvalidArgument(f"{where}: file {files.file!r} is not the plain name of a block's file")
    if not isinstance(files.sha256, str) or not _SHA256.fullmatch(files.sha256):
        raise InvalidArgument(f"{where}: sha256 {files.sha256!r} is not 64 small hex digits")
    for kind, size, digest in (
        (WAITING, files.waiting_bytes, files.waiting_sha256),
        (GONE, files.gone_bytes, files.gone_sha256),
    ):
        if not size and digest == "":
            continue
        known = isinstance(digest, str) and _SHA256.fullmatch(digest)
        if not files.file.startswith("rows-") or not size or not known:
            raise InvalidArgument(
                f"{where}: {kind}_bytes {size} and {kind}_sha256 {digest!r} are not those of such a file of a table's block"
            )
