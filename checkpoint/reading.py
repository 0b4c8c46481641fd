# SPDX-License-Identifier: Apache-2.0
"""Reading a cut's blocks back: every file of a block's chain is looked at, checked and merged.

Invariant: what is returned is what was written, else CorruptCheckpoint names the file, what is wrong with it, and the next older
cut that does not need it. One block is in memory at a time. No state is kept between calls, so any thread may call.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from oarlock.checkpoint.block_file import BlockImage, decode
from oarlock.checkpoint.chain import Increment, merge
from oarlock.checkpoint.cuts import NO_FILE, Cuts
from oarlock.checkpoint.entry import BlockEntry, FileOf, Link
from oarlock.checkpoint.format import GONE, KINDS, WAITING, cut_folder
from oarlock.checkpoint.frame import Identity, damaged_columns, open_frame
from oarlock.checkpoint.gone_file import decode_gone
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.waiting_file import decode_waiting
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, VersionMismatch

_NOTHING = np.empty(0, np.uint64)
Result = TypeVar("Result")


class Reading(Cuts):
    """The cuts of one job, and what is in their files."""

    def load_block(self, manifest: Manifest, entry: BlockEntry, *, checked: bool = False) -> BlockImage:
        """Return one block; its arrays are read-only, and views of its files where its chain is one whole file.

        ``checked`` skips the checksums, after ``verify``. CorruptCheckpoint names the file, what is wrong with it, and the
        next older cut that does not need it.
        """
        return self._load(manifest, entry, lambda file: self._read(manifest.cut, entry, file, checked))

    def map_block(self, manifest: Manifest, entry: BlockEntry, *, checked: bool = False) -> BlockImage | None:
        """Return one block as views of its file where that lies; ``checked`` skips the checksum.

        No weight is looked at, so only the checksum finds values that are not finite. None if it cannot be: the chain has
        increments, or the file is compressed, or not of this machine.
        """
        links = self._links(manifest, entry)
        file = next(file for file in links[-1].files if file.kind in KINDS)
        if len(links) > 1:
            return None
        data = self._opened(manifest.cut, entry, file, self.files.map_file)
        if data is None:
            return None
        self._compare_size(manifest.cut, entry, file, len(data))
        if not checked:
            # In a view of its own: the pages of what is not served go with it.
            self._compare_sum(manifest.cut, entry, file, self._opened(manifest.cut, entry, file, self.files.map_file))
        image = self._link_image(manifest, entry, links[-1], None, data, check_finite=False)
        inside = np.frombuffer(data, np.uint8)
        return image if not image.rows or np.may_share_memory(image.weights, inside) else None

    def _load(self, manifest: Manifest, entry: BlockEntry, read: Callable[[FileOf], Any]) -> BlockImage:
        links = self._links(manifest, entry)
        befores = [None, *(link.seq for link in links[:-1])]
        found = [self._load_link(manifest, entry, *each, read) for each in zip(links, befores, strict=True)]
        if len(found) == 1:
            return found[0].image
        try:
            return merge(found)
        except InvalidArgument as error:
            path = f"{links[-1].folder}/{links[-1].file}"
            raise self._corrupt(manifest.cut, entry, path, error.message) from None

    def read_identity(self, manifest: Manifest, entry: BlockEntry) -> Identity:
        """Return whose file a block's newest one is, with its seq and marks, without a look at its checksum."""
        newest = self._links(manifest, entry)[-1]
        file = next(file for file in newest.files if file.kind in KINDS)
        data = self._read(manifest.cut, entry, file, checked=True)
        return self._decoded(manifest.cut, entry, file, lambda path: open_frame(data, path, KINDS).identity)

    def verify(
        self,
        manifest: Manifest,
        blocks: Iterable[BlockEntry] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Check every file (or those of ``blocks``), loading nothing. ``progress(done, total)`` is told bytes."""
        entries = list(manifest.blocks if blocks is None else blocks)
        self.check_sizes(manifest, entries)
        done, total = 0, sum(entry.total_bytes for entry in entries)
        for entry in entries:
            self.load_block(manifest, entry)
            done += entry.total_bytes
            if progress is not None:
                progress(done, total)

    def damage(
        self,
        manifest: Manifest,
        *,
        known: dict[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[CorruptCheckpoint]:
        """Yield an error for every damaged file of a cut, where ``verify`` stops at the first.

        ``known`` holds the files, by path, that were found whole under a checksum, and gets more: cuts share files.
        """
        known = {} if known is None else known
        done, total = 0, sum(entry.total_bytes for entry in manifest.blocks)
        for entry in manifest.blocks:
            files = _files(self._links(manifest, entry))
            read: dict[str, Any] = {}
            for file in files if any(known.get(file.path) != file.sha256 for file in files) else ():
                try:
                    read[file.path] = self._read(manifest.cut, entry, file)
                except CorruptCheckpoint as error:
                    yield error
            if len(read) == len(files):
                try:
                    self._load(manifest, entry, lambda file, read=read: read[file.path])  # type: ignore[misc]
                    known.update({file.path: file.sha256 for file in files})
                except CorruptCheckpoint as error:
                    yield error
            done += entry.total_bytes
            if progress is not None:
                progress(done, total)

    def _links(self, manifest: Manifest, entry: BlockEntry) -> tuple[Link, ...]:
        if entry.folder:
            return entry.links
        found = next(
            (e for e in manifest.blocks if (e.kind, e.name, e.block) == (entry.kind, entry.name, entry.block)), None
        )
        if found is None:
            raise InvalidArgument(f"{entry.where}: cut {manifest.cut} has no such block")
        return found.links

    def _load_link(
        self, manifest: Manifest, entry: BlockEntry, link: Link, after: int | None, read: Callable[[FileOf], Any]
    ) -> Increment:
        cut = manifest.cut
        files = {file.kind: file for file in link.files}
        file = files.pop(entry.kind, link.files[0])
        image = rows = self._link_image(manifest, entry, link, after, read(file))
        gone = _NOTHING
        if (file := files.get(GONE, file)).kind == GONE:
            left = read(file)
            gone = self._decoded(cut, entry, file, lambda path: decode_gone(left, rows, file=path, after=after))
        if (file := files.get(WAITING, file)).kind == WAITING:
            beside = read(file)
            image = self._decoded(cut, entry, file, lambda path: decode_waiting(beside, rows, file=path, after=after))
        return Increment(image, gone)

    def _link_image(
        self,
        manifest: Manifest,
        entry: BlockEntry,
        link: Link,
        after: int | None,
        data: Any,
        *,
        check_finite: bool = True,
    ) -> BlockImage:
        """Return what the rows' file of a link holds, which is what the manifest says of it."""
        cut = manifest.cut
        file = next(file for file in link.files if file.kind in KINDS)
        image = self._decoded(
            cut, entry, file, lambda path: decode(data, file=path, after=after, check_finite=check_finite)
        )
        have = (image.kind, image.name, image.block, image.seq, image.rows)
        if have != (entry.kind, entry.name, entry.block, link.seq, link.rows):
            told = f"it holds {image.where} with seq {image.seq} and {image.rows} rows"
            raise self._corrupt(
                cut, entry, file.path, f"{told}; the manifest says {entry.where}, {link.seq}, {link.rows}"
            )
        if image.kind == "rows" and image.weights.shape[1] != manifest.table_specs()[image.name].dim:
            raise self._corrupt(
                cut, entry, file.path, f"its rows have {image.weights.shape[1]} weights, unlike the spec"
            )
        return image

    def _decoded(self, cut: int, entry: BlockEntry, file: FileOf, make: Callable[[str], Result]) -> Result:
        try:
            return make(file.path)
        except CorruptCheckpoint as error:
            raise self._corrupt(cut, entry, file.path, error.message.removeprefix(f"{file.path}: ")) from None

    def _read(self, cut: int, entry: BlockEntry, file: FileOf, checked: bool = False) -> Any:
        """Return a file's bytes, which must have the checksum of the manifest, unless that is known already."""
        data = self._opened(cut, entry, file, self.files.read_file)
        self._compare_size(cut, entry, file, len(data))
        if not checked:
            self._compare_sum(cut, entry, file, data)
        return data

    def _compare_sum(self, cut: int, entry: BlockEntry, file: FileOf, data: Any) -> None:
        if hashlib.sha256(data).hexdigest() != file.sha256:
            columns = damaged_columns(data)
            where = f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}: " if columns else ""
            raise self._corrupt(cut, entry, file.path, f"altered: {where}its checksum does not fit", columns=columns)

    def _opened(self, cut: int, entry: BlockEntry, file: FileOf, read: Callable[[str], Any]) -> Any:
        try:
            return read(file.path)
        except FileNotFoundError:
            raise self._corrupt(cut, entry, file.path, "missing") from None
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise self._corrupt(cut, entry, file.path, f"cannot be read: {error.strerror}") from None

    def check_sizes(self, manifest: Manifest, entries: Iterable[BlockEntry]) -> None:
        """Raise CorruptCheckpoint for the first file of ``entries`` that is missing or has another length; none is read."""
        known: dict[str, dict[str, int]] = {}
        for entry in entries:
            for link in self._links(manifest, entry):
                if link.folder not in known:
                    known[link.folder] = self.files.sizes(link.folder)
                for file in link.files:
                    if known[link.folder].get(file.path.rpartition("/")[2]) != file.bytes:
                        self._check_size(manifest.cut, entry, file)

    def _check_size(self, cut: int, entry: BlockEntry, file: FileOf) -> None:
        try:
            size = self.files.size(file.path)
        except FileNotFoundError:
            raise self._corrupt(cut, entry, file.path, "missing") from None
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise self._corrupt(cut, entry, file.path, f"cannot be read: {error.strerror}") from None
        self._compare_size(cut, entry, file, size)

    def _compare_size(self, cut: int, entry: BlockEntry, file: FileOf, size: int) -> None:
        if size != file.bytes:
            what = "truncated" if size < file.bytes else "too long"
            raise self._corrupt(cut, entry, file.path, f"{what}: it has {size} of {file.bytes} bytes")

    def _corrupt(
        self, cut: int, entry: BlockEntry, path: str, problem: str, columns: Iterable[str] = ()
    ) -> CorruptCheckpoint:
        older = self._older_without(cut, path)
        advice = "no older cut can be read" if older is None else f"cut {older} is the next older one"
        if older is not None and not path.startswith(f"{cut_folder(cut)}/"):
            advice += " without it"
        details: dict[str, Any] = {"file": path, "cut": cut, "older": older, "columns": list(columns)}
        return CorruptCheckpoint(f"{path}: {problem} ({entry.where}); {advice}", **details)

    def _older_without(self, cut: int, path: str) -> int | None:
        try:
            for other in reversed(self.cuts()):
                older = self.newest([other]) if other < cut else None
                if older is not None and all(file.path != path for e in older.blocks for file in _files(e.links)):
                    return older.cut
        except (OSError, VersionMismatch):
            return None
        return None


def _files(links: Iterable[Link]) -> list[FileOf]:
    return [file for link in links for file in link.files]
