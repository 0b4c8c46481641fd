# SPDX-License-Identifier: Apache-2.0
"""Which cuts there are: a cut exists from the moment its manifest has its name, complete, and not before.

Invariant: a damaged manifest counts as one that never was; one that cannot be read for the moment, or is of a newer format,
does not: it raises. No state is kept between calls, so any thread may call.
"""

import errno
import logging
from collections.abc import Iterable

from oarlock.checkpoint.files import Files
from oarlock.checkpoint.format import MANIFEST, cut_folder, folder_cut, parse_folder
from oarlock.checkpoint.manifest import Manifest
from oarlock.proto.errors import CorruptCheckpoint, NotFound

logger = logging.getLogger(__name__)

# What the system says where a plain file was expected and there is none, or a link, a folder, a device.
NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL)


class Cuts:
    """The cuts of one job, kept in ``files``."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def cuts(self) -> list[int]:
        """Return the numbers of all cuts that have a manifest, ascending; none of them has been read."""
        return [cut for cut in self.folders("cut") if self.is_committed(cut)]

    def latest(self) -> Manifest | None:
        """Return the newest whole manifest, None if there is none. One that is damaged counts as never committed.

        A manifest of a newer format is not passed over: it raises VersionMismatch.
        """
        return self.newest(reversed(self.cuts()))

    def load_manifest(self, cut: int | None = None) -> Manifest:
        """Return the manifest of ``cut``, by default of the newest; NotFound says which cuts there are."""
        if cut is None:
            found = self.latest()
            if found is None:
                raise NotFound(f"no checkpoint in {self.files.root}")
            return found
        if not self.is_committed(cut):
            have = ", ".join(str(other) for other in self.cuts()) or "none"
            raise NotFound(f"no committed cut {cut} in {self.files.root}; there is: {have}", cut=cut)
        return self.read_manifest(cut)

    def folders(self, kind: str) -> list[int]:
        """Return the numbers of the folders of a kind, ``cut`` or ``compact``, ascending."""
        found = (parse_folder(name) for name in self.files.folders())
        return sorted(each[1] for each in found if each is not None and each[0] == kind)

    def is_committed(self, cut: int) -> bool:
        """Tell whether the cut has a manifest; it has not been read."""
        try:
            self.files.size(f"{cut_folder(cut)}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            # Something of that name is there; whether it is a manifest is said when it is read.
            return True
        return True

    def read_manifest(self, cut: int) -> Manifest:
        """Return the manifest of ``cut``; CorruptCheckpoint if it is damaged or not there."""
        path = f"{cut_folder(cut)}/{MANIFEST}"
        try:
            data = bytes(self.files.read_file(path))
        except OSError as error:
            # A disk that fails for the moment must not look like a cut that never was.
            if error.errno not in NO_FILE:
                raise
            raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}", file=path) from None
        manifest = Manifest.decode(data, file=path)
        if manifest.cut != cut:
            raise CorruptCheckpoint(f"{path}: it is the manifest of cut {manifest.cut}", file=path)
        return manifest

    def newest(self, cuts: Iterable[int]) -> Manifest | None:
        """Return the first whole manifest of ``cuts``."""
        for cut in cuts:
            try:
                return self.read_manifest(cut)
            except CorruptCheckpoint as error:
                logger.warning("checkpoint_ignored cut=%d reason=%r", cut, error.message)
        return None


def split_cut(path: str) -> tuple[str, int | None]:
    """Return the folder of checkpoints and the cut that ``PATH``, ``PATH@cut`` or ``PATH/cut-000012`` means."""
    folder, _, name = path.rstrip("/").rpartition("/")
    cut = folder_cut(name)
    if cut is not None and folder:
        return folder, cut
    folder, _, number = path.rpartition("@")
    if folder and number.isascii() and number.isdigit() and len(number) < 19:
        return folder, int(number)
    return path, None
