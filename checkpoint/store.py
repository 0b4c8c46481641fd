# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a folder: ``cut-000012/`` holds a cut's block files, and its ``manifest.json`` makes them exist.

Invariant: a cut exists from the moment its manifest has its name, complete, and not before; no operation, failed or
interrupted anywhere, changes a cut that exists (``keep_last`` apart). Every shard process calls ``write_block`` and
``load_block`` for its own blocks; the coordinator alone calls ``commit``, ``keep_last`` and ``discard_incomplete``. No
state is kept between calls, so any thread may call. An OSError of the disk passes through when writing.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage, encode_pieces
from oarlock.checkpoint.collection import collect
from oarlock.checkpoint.compaction import compact
from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.entry import BlockEntry, Link
from oarlock.checkpoint.files import Files, LocalFiles
from oarlock.checkpoint.format import GONE, MANIFEST, WAITING, block_file_name, cut_folder
from oarlock.checkpoint.frame import COMPRESSIONS
from oarlock.checkpoint.gone_file import encode_gone
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.checkpoint.waiting_file import encode_waiting, knows_waiting
from oarlock.proto.errors import InvalidArgument

logger = logging.getLogger(__name__)

NONE_GONE: NDArray[np.uint64] = np.empty(0, np.uint64)
NONE_GONE.flags.writeable = False


class CheckpointStore(Reading):
    """All checkpoints of one job, kept in ``files``. ``compress``: None, or ``"zstd"`` for the files that it writes."""

    def __init__(self, files: Files, *, compress: str | None = None) -> None:
        if compress not in COMPRESSIONS:
            raise InvalidArgument(f"compress = {compress!r}: choose zstd, or None")
        super().__init__(files)
        self.compress = compress

    def write_block(
        self, cut: int, image: BlockImage, *, after: BlockEntry | None = None, gone: NDArray[np.uint64] = NONE_GONE
    ) -> BlockEntry:
        """Write one block of a cut that is not committed yet; return its line of the manifest.

        ``after``: the block's entry in an older cut. ``image`` then has only the rows and waiting keys that changed since,
        and ``gone: uint64[g]`` the keys that left; seq and marks are those of now. A dense block is always whole, so for one
        ``after`` says nothing. Written again, the files are replaced. InvalidArgument names a key with a value that is not
        finite. The image's arrays must not change before it returns.
        """
        if image.kind != "rows":
            after = None
        _check_increment(cut, image, after, gone)
        if self.is_committed(cut):
            raise InvalidArgument(f"cut {cut} is committed and cannot change: write to a higher number", cut=cut)
        return self.write_files(cut_folder(cut), image, after=after, gone=gone)

    def write_files(
        self, folder: str, image: BlockImage, *, after: BlockEntry | None = None, gone: NDArray[np.uint64] = NONE_GONE
    ) -> BlockEntry:
        """Write a block's files into a folder that no cut has; see ``write_block``."""
        name = block_file_name(image.kind, image.name, image.block)
        seq = None if after is None else after.seq
        # All are made before any is written: what cannot be written leaves nothing.
        data = encode_pieces(image, after=seq, compress=self.compress)
        values: dict[str, object] = {}
        waiting = left = None
        if knows_waiting(image):
            waiting = encode_waiting(image, after=seq, compress=self.compress)
            values |= {"waiting_bytes": waiting.size, "waiting_sha256": hashlib.sha256(waiting).hexdigest()}
        if len(gone) and seq is not None:
            left = encode_gone(image, gone, after=seq, compress=self.compress)
            values |= {"gone_bytes": left.size, "gone_sha256": hashlib.sha256(left).hexdigest()}
        for kind, beside in ((GONE, left), (WAITING, waiting)):
            if beside is not None:
                self.files.write_file(f"{folder}/{block_file_name(kind, image.name, image.block)}", [beside])
        digest = hashlib.sha256()

        def hash_all() -> None:
            for piece in data:
                digest.update(piece)

        self.files.write_file(f"{folder}/{name}", data, meanwhile=hash_all)
        values |= {"file": name, "bytes": sum(map(len, data)), "rows": image.rows, "seq": image.seq}
        link = Link(folder=folder, sha256=digest.hexdigest(), **values)  # type: ignore[arg-type]
        return BlockEntry(
            kind=image.kind,
            name=image.name,
            block=image.block,
            base=() if after is None else after.links,
            **link.__dict__,
        )

    def commit(self, manifest: Manifest) -> None:
        """Make the cut exist, in one atomic step. Committing the same manifest again changes nothing."""
        folder, data = cut_folder(manifest.cut), manifest.encode()
        # The same again is written again: it may be visible from before a crash, but not durable yet.
        if self.is_committed(manifest.cut) and bytes(self.files.read_file(f"{folder}/{MANIFEST}")) != data:
            raise InvalidArgument(f"cut {manifest.cut} is committed already: a cut's number is never used twice")
        self.check_sizes(manifest, manifest.blocks)
        try:
            self.files.commit_file(f"{folder}/{MANIFEST}", data)
        except FileExistsError:
            raise InvalidArgument(
                f"cut {manifest.cut} was committed by another coordinator: a cut's number is never used twice"
            ) from None
        new = [entry for entry in manifest.blocks if entry.folder == folder]
        logger.info(
            "checkpoint_committed cut=%d run=%d blocks=%d increments=%d bytes=%d",
            manifest.cut,
            manifest.run,
            len(manifest.blocks),
            sum(1 for entry in new if entry.base),
            sum(entry.bytes + entry.waiting_bytes + entry.gone_bytes for entry in new),
        )

    def compact(
        self,
        manifest: Manifest,
        blocks: Iterable[BlockEntry] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[BlockEntry]:
        """Write a whole file for every block (or those of ``blocks``) that has increments; return those files' entries.

        No cut changes by it; ``chain.rebase`` lets a later cut's increments follow one of them. ``progress(done, total)`` is
        told bytes of chains.
        """

        def write(folder: str, image: BlockImage) -> BlockEntry:
            return self.write_files(folder, image)

        return compact(self, write, manifest, manifest.blocks if blocks is None else blocks, progress)

    def keep_last(self, n: int, *, pinned: Collection[int] = ()) -> list[int]:
        """Delete all but the ``n`` newest whole cuts and the ``pinned`` ones; return what was deleted.

        Manifests go first, then the files that no manifest names any more, so a cut that is half deleted does not exist, and
        what a newer cut needs of an older one stays. A damaged manifest is left for a person, with all that it may name.
        """
        if n < 1:
            raise InvalidArgument(f"keep_last({n}): at least one cut must stay")
        whole = [cut for cut in self.cuts() if self.newest([cut]) is not None]
        gone = [cut for cut in whole[:-n] if cut not in pinned]
        for cut in gone:
            self.files.delete(f"{cut_folder(cut)}/{MANIFEST}", durable=True)
            logger.info("checkpoint_deleted cut=%d", cut)
        if whole:
            collect(self, below=whole[-1] + 1)
        return gone

    def best_cuts(
        self, n: int, metric: str, *, smallest: bool = False, merit: Callable[[float], float] | None = None
    ) -> list[int]:
        """Return the ``n`` whole cuts with the largest (or smallest) value of a metric, best first: to be ``pinned``.

        ``merit`` says how good a value is, the higher the better, where neither is what is wanted. Cuts without a number of
        that name in their metrics are none of them; of equal ones the newest.
        """
        found = []
        for cut in self.cuts():
            manifest = self.newest([cut])
            value = None if manifest is None else manifest.metrics.get(metric)
            if isinstance(value, int | float) and not isinstance(value, bool):
                good = merit(value) if merit is not None else -value if smallest else value
                found.append((-good, -cut))
        return [-cut for _, cut in sorted(found)[: max(0, n)]]

    def discard_incomplete(self, *, below: int | None = None) -> list[int]:
        """Delete what attempts have left that were never committed (with a number under ``below``); return their numbers.

        Files that a manifest names stay wherever they are. Call it when no cut is being written, or give ``below`` the number
        of the one that is.
        """
        return collect(self, below=below)


def _check_increment(cut: int, image: BlockImage, after: BlockEntry | None, gone: NDArray[np.uint64]) -> None:
    if not isinstance(gone, np.ndarray) or gone.dtype != np.uint64 or gone.ndim != 1:
        raise InvalidArgument(f"{image.where}: gone: give a uint64 array of one axis")
    if after is None:
        if len(gone) and image.kind == "rows":
            raise InvalidArgument(f"{image.where}: keys have left, but what they have left is not said: give after")
        return
    if (after.kind, after.name, after.block) != (image.kind, image.name, image.block):
        raise InvalidArgument(f"{image.where}: after is the chain of {after.where}")
    if not after.folder:
        raise InvalidArgument(
            f"{image.where}: after has no folder: take the entry that write_block or a manifest gives"
        )
    if after.links[-1].number >= cut:
        raise InvalidArgument(f"{image.where}: after is in {after.folder}, which is not older than cut {cut}")
    if after.seq > image.seq:
        raise InvalidArgument(f"{image.where}: after has {after.seq} operations, the increment only {image.seq}")


class LocalStore(CheckpointStore):
    """Checkpoints in a folder of this machine, or of a file system that every shard has mounted."""

    def __init__(self, root: str | Path, *, compress: str | None = None) -> None:
        super().__init__(LocalFiles(root), compress=compress)


def open_store(
    path: str | Path, *, compress: str | None = None, options: Mapping[str, Any] | None = None
) -> CheckpointStore:
    """Return the store of a folder of checkpoints: a path, or a URL that fsspec knows. Nothing is read yet.

    ``options`` are those of the URL's file system. ``file://`` is a path: its files are made durable, as fsspec would not.
    """
    text = str(path)
    if not is_url(text):
        return LocalStore(path, compress=compress)
    parts = urlsplit(text)
    if parts.scheme == "file" and not options:
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidArgument(f"{text}: give a path of this machine, such as file:///data/checkpoints")
        return LocalStore(unquote(parts.path), compress=compress)
    # It is loaded where it is used: S3's client takes half a second.
    from oarlock.checkpoint.fsspec_files import FsspecFiles

    return CheckpointStore(FsspecFiles(text, options), compress=compress)


def open_checkpoint(path: str | Path, *, options: Mapping[str, Any] | None = None) -> tuple[CheckpointStore, Manifest]:
    """Return the store and manifest that a path or URL means.

    A folder of checkpoints means its newest cut, ``PATH@12`` and one cut's folder that cut. ``options``: see ``open_store``.
    """
    store, cut = locate(path, options=options)
    return store, store.load_manifest(cut)


def locate(path: str | Path, *, options: Mapping[str, Any] | None = None) -> tuple[CheckpointStore, int | None]:
    """Return the store that a path or URL means, and the cut, if it names one. Nothing is read; see ``open_checkpoint``."""
    text = str(path)
    # A folder's own name may end so.
    as_it_is = not is_url(text) and "@" in Path(text).name and Path(text).is_dir()
    folder, cut = (text, None) if as_it_is else split_cut(text)
    return open_store(folder, options=options), cut


def is_url(path: str) -> bool:
    """Tell whether ``path`` is a URL, such as ``s3://bucket/checkpoints``."""
    return "://" in path
