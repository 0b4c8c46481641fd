# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a folder: ``cut-000012/`` holds a cut's block files, and its ``manifest.json`` makes them exist.

Invariant: a cut exists from the moment its manifest has its name, complete, and not before; no operation, failed or
interrupted anywhere, changes a cut that exists (``keep_last`` apart). Every shard process calls ``write_block`` and
``load_block`` for its own blocks; the coordinator alone calls ``commit``, ``keep_last`` and ``discard_incomplete``. No
state is kept between calls, so any thread may call. An OSError of the disk passes through when writing.
"""

import errno
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.block_file import BlockImage, decode, encode
from oarlock.checkpoint.files import Files, LocalFiles
from oarlock.checkpoint.format import MANIFEST, block_file_name, cut_folder, folder_cut
from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.waiting_file import decode_waiting, encode_waiting, knows_waiting
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, VersionMismatch

logger = logging.getLogger(__name__)

# What the system says where a plain file was expected and there is none, or a link, a folder, a device.
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL)


class CheckpointStore:
    """All checkpoints of one job, kept in ``files``."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def write_block(self, cut: int, image: BlockImage) -> BlockEntry:
        """Write one block of a cut that is not committed yet; return its line of the manifest.

        Written again, the file is replaced. InvalidArgument names a key with a value that is not finite.
        """
        name = block_file_name(image.kind, image.name, image.block)
        if self._is_committed(cut):
            raise InvalidArgument(f"cut {cut} is committed and cannot change: write to a higher number", cut=cut)
        data = encode(image)
        # Both are made before either is written: what cannot be written leaves nothing.
        waiting = encode_waiting(image) if knows_waiting(image) else None
        self.files.write_file(f"{cut_folder(cut)}/{name}", data)
        digest = hashlib.sha256(data).hexdigest()
        entry = BlockEntry(image.kind, image.name, image.block, name, data.size, image.rows, image.seq, digest)
        if waiting is None:
            return entry
        entry = replace(entry, waiting_bytes=waiting.size, waiting_sha256=hashlib.sha256(waiting).hexdigest())
        self.files.write_file(f"{cut_folder(cut)}/{entry.waiting_file}", waiting)
        return entry

    def commit(self, manifest: Manifest) -> None:
        """Make the cut exist, in one atomic step. Committing the same manifest again changes nothing."""
        folder, data = cut_folder(manifest.cut), manifest.encode()
        # The same again is written again: it may be visible from before a crash, but not durable yet.
        if self._is_committed(manifest.cut) and bytes(self.files.read_file(f"{folder}/{MANIFEST}")) != data:
            raise InvalidArgument(f"cut {manifest.cut} is committed already: a cut's number is never used twice")
        for entry in manifest.blocks:
            self._check_size(manifest.cut, entry)
        self.files.commit_file(f"{folder}/{MANIFEST}", data)
        size = sum(entry.bytes + entry.waiting_bytes for entry in manifest.blocks)
        logger.info(
            "checkpoint_committed cut=%d run=%d blocks=%d bytes=%d",
            manifest.cut,
            manifest.run,
            len(manifest.blocks),
            size,
        )

    def cuts(self) -> list[int]:
        """Return the numbers of all cuts that have a manifest, ascending; none of them has been read."""
        return [cut for cut in self._folders() if self._is_committed(cut)]

    def latest(self) -> Manifest | None:
        """Return the newest whole manifest, None if there is none. One that is damaged counts as never committed.

        A manifest of a newer format is not passed over: it raises VersionMismatch.
        """
        return self._newest(reversed(self.cuts()))

    def load_manifest(self, cut: int | None = None) -> Manifest:
        """Return the manifest of ``cut``, by default of the newest; NotFound says which cuts there are."""
        if cut is None:
            found = self.latest()
            if found is None:
                raise NotFound(f"no checkpoint in {self.files.root}")
            return found
        if not self._is_committed(cut):
            have = ", ".join(str(other) for other in self.cuts()) or "none"
            raise NotFound(f"no committed cut {cut} in {self.files.root}; there is: {have}", cut=cut)
        return self._read_manifest(cut)

    def load_block(self, manifest: Manifest, entry: BlockEntry, *, checked: bool = False) -> BlockImage:
        """Return one block, its arrays read-only views of its files. ``checked`` skips the checksums, after ``verify``.

        CorruptCheckpoint names the file, what is wrong with it, and the next older cut.
        """
        cut = manifest.cut
        self._check_size(cut, entry)
        data = self._read(cut, entry, entry.file, "" if checked else entry.sha256)
        image = self._decoded(cut, entry, entry.file, lambda file: decode(data, file=file))
        have = (image.kind, image.name, image.block, image.seq, image.rows)
        want = (entry.kind, entry.name, entry.block, entry.seq, entry.rows)
        if have != want:
            told = f"it holds {image.where} with seq {image.seq} and {image.rows} rows"
            raise self._corrupt(
                cut, entry, entry.file, f"{told}; the manifest says {entry.where}, {entry.seq}, {entry.rows}"
            )
        if image.kind == "rows" and image.weights.shape[1] != manifest.table_specs()[image.name].dim:
            raise self._corrupt(
                cut, entry, entry.file, f"its rows have {image.weights.shape[1]} weights, unlike the spec"
            )
        if entry.waiting_file:
            beside = self._read(cut, entry, entry.waiting_file, "" if checked else entry.waiting_sha256)
            rows = image
            image = self._decoded(cut, entry, entry.waiting_file, lambda file: decode_waiting(beside, rows, file=file))
        return image

    def _decoded(self, cut: int, entry: BlockEntry, name: str, make: Callable[[str], BlockImage]) -> BlockImage:
        file = f"{cut_folder(cut)}/{name}"
        try:
            return make(file)
        except CorruptCheckpoint as error:
            raise self._corrupt(cut, entry, name, error.message.removeprefix(f"{file}: ")) from None

    def _read(self, cut: int, entry: BlockEntry, name: str, digest: str) -> Any:
        """Return a file's bytes; ``digest``: the SHA-256 that they must have, empty if that is known."""
        try:
            data = self.files.read_file(f"{cut_folder(cut)}/{name}")
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise self._corrupt(cut, entry, name, f"cannot be read: {error.strerror}") from None
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise self._corrupt(cut, entry, name, "altered: its checksum does not fit")
        return data

    def verify(
        self,
        manifest: Manifest,
        blocks: Iterable[BlockEntry] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Check every file (or those of ``blocks``), loading nothing. ``progress(done, total)`` is told bytes."""
        entries = list(manifest.blocks if blocks is None else blocks)
        for entry in entries:
            self._check_size(manifest.cut, entry)
        done, total = 0, sum(entry.bytes + entry.waiting_bytes for entry in entries)
        for entry in entries:
            self.load_block(manifest, entry)
            done += entry.bytes + entry.waiting_bytes
            if progress is not None:
                progress(done, total)

    def keep_last(self, n: int, *, pinned: Collection[int] = ()) -> list[int]:
        """Delete all but the ``n`` newest whole cuts and the ``pinned`` ones; return what was deleted.

        A manifest goes first, so a cut that is half deleted does not exist. A damaged manifest is left for a person.
        """
        if n < 1:
            raise InvalidArgument(f"keep_last({n}): at least one cut must stay")
        whole = [cut for cut in self.cuts() if self._newest([cut]) is not None]
        gone = [cut for cut in whole[:-n] if cut not in pinned]
        for cut in gone:
            self.files.delete(f"{cut_folder(cut)}/{MANIFEST}", durable=True)
            self._delete_folder(cut)
            logger.info("checkpoint_deleted cut=%d", cut)
        return gone

    def discard_incomplete(self, *, below: int | None = None) -> list[int]:
        """Delete the folders of cuts that were never committed (with a number under ``below``); return their numbers.

        Call it when no cut is being written, or give ``below`` the number of the one that is.
        """
        left = [cut for cut in self._folders() if not self._is_committed(cut) and (below is None or cut < below)]
        for cut in left:
            self._delete_folder(cut)
            logger.info("checkpoint_discarded cut=%d", cut)
        return left

    def _folders(self) -> list[int]:
        return sorted(cut for name in self.files.folders() if (cut := folder_cut(name)) is not None)

    def _is_committed(self, cut: int) -> bool:
        try:
            self.files.size(f"{cut_folder(cut)}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # Something of that name is there; whether it is a manifest is said when it is read.
            return True
        return True

    def _read_manifest(self, cut: int) -> Manifest:
        path = f"{cut_folder(cut)}/{MANIFEST}"
        try:
            data = bytes(self.files.read_file(path))
        except OSError as error:
            # A disk that fails for the moment must not look like a cut that never was.
            if error.errno not in _NO_FILE:
                raise
            raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}", file=path) from None
        manifest = Manifest.decode(data, file=path)
        if manifest.cut != cut:
            raise CorruptCheckpoint(f"{path}: it is the manifest of cut {manifest.cut}", file=path)
        return manifest

    def _newest(self, cuts: Iterable[int]) -> Manifest | None:
        for cut in cuts:
            try:
                return self._read_manifest(cut)
            except CorruptCheckpoint as error:
                logger.warning("checkpoint_ignored cut=%d reason=%r", cut, error.message)
        return None

    def _check_size(self, cut: int, entry: BlockEntry) -> None:
        for name, wanted in ((entry.file, entry.bytes), (entry.waiting_file, entry.waiting_bytes)):
            if not name:
                continue
            try:
                size = self.files.size(f"{cut_folder(cut)}/{name}")
            except FileNotFoundError:
                raise self._corrupt(cut, entry, name, "missing") from None
            except OSError as error:
                if error.errno not in _NO_FILE:
                    raise
                raise self._corrupt(cut, entry, name, f"cannot be read: {error.strerror}") from None
            if size != wanted:
                what = "truncated" if size < wanted else "too long"
                raise self._corrupt(cut, entry, name, f"{what}: it has {size} of {wanted} bytes")

    def _corrupt(self, cut: int, entry: BlockEntry, name: str, problem: str) -> CorruptCheckpoint:
        file = f"{cut_folder(cut)}/{name}"
        try:
            older = self._newest(other for other in reversed(self.cuts()) if other < cut)
        except (OSError, VersionMismatch):
            older = None
        advice = "no older cut can be read" if older is None else f"cut {older.cut} is the next older one"
        details: dict[str, Any] = {"file": file, "cut": cut, "older": None if older is None else older.cut}
        return CorruptCheckpoint(f"{file}: {problem} ({entry.where}); {advice}", **details)

    def _delete_folder(self, cut: int) -> None:
        folder = cut_folder(cut)
        for name in self.files.list(folder):
            self.files.delete(f"{folder}/{name}")
        self.files.delete_folder(folder)


class LocalStore(CheckpointStore):
    """Checkpoints in a folder of this machine, or of a file system that every shard has mounted."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(LocalFiles(root))


def open_checkpoint(path: str | Path) -> tuple[LocalStore, Manifest]:
    """Return the store and manifest that ``path`` means: a folder of checkpoints (its newest) or one cut's folder."""
    path = Path(path).absolute()
    cut = folder_cut(path.name)
    store = LocalStore(path if cut is None else path.parent)
    return store, store.load_manifest(cut)
