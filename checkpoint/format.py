# SPDX-License-Identifier: Apache-2.0
"""What every version of the checkpoint format shares: its version number and the names of folders and files.

Invariant: different (kind, name, block) give different file names, also on a file system that ignores case; every
name is a plain file name of at most 255 bytes. A released version's names and meaning never change. Pure functions.
"""

import re

from oarlock.embedding.spec import check_name
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, PSError, VersionMismatch

# A new minor version adds fields; an older reader refuses those it does not know. A new major one changes a meaning.
FORMAT = (1, 2)
CHAINS = (1, 2)  # increments, and checksums by column

KINDS = ("rows", "dense")
WAITING = "waiting"  # what a block of rows knows of keys without one
GONE = "gone"  # keys that left a block of rows
MANIFEST = "manifest.json"
LIMIT = 1 << 63

_VERSION = re.compile(r"(0|[1-9][0-9]{0,4})\.(0|[1-9][0-9]{0,4})")
_FOLDER = re.compile(r"(cut|compact)-([0-9]{6,18})")
# "=" is in no table's name, so the capitals behind it cannot be mistaken for a part of one.
_FILE = re.compile(r"(?:rows|dense)-[a-z_][a-z0-9_.=\-]*-[0-9]{5,}\.arrow")


def format_text(version: tuple[int, int] = FORMAT) -> str:
    """Return the version as files carry it, ``"major.minor"``."""
    return f"{version[0]}.{version[1]}"


def check_format(text: object, file: str) -> tuple[int, int]:
    """Return the version of a file; VersionMismatch when its major version is not the one that this program reads."""
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise CorruptCheckpoint(f"{file}: {text!r} is no format version such as {format_text()!r}", file=file)
    version = int(match[1]), int(match[2])
    if version[0] != FORMAT[0]:
        raise VersionMismatch(
            f"{file}: checkpoint format {format_text(version)}; this Oarlock reads {FORMAT[0]}.x: "
            f"use the version of Oarlock that wrote it{', or a newer one' if version > FORMAT else ''}",
            file=file,
        )
    return version


def unreadable(file: str, version: tuple[int, int], problem: str) -> PSError:
    """Return the error for contents that do not fit: VersionMismatch if a newer minor version may explain them."""
    if version > FORMAT:
        return VersionMismatch(
            f"{file}: {problem}; it was written in checkpoint format {format_text(version)}, "
            f"this Oarlock knows {format_text()}: use the version of Oarlock that wrote it, or a newer one",
            file=file,
        )
    return CorruptCheckpoint(f"{file}: {problem}", file=file)


def check_count(name: str, value: object) -> int:
    """Return ``value`` if it is an integer in [0, 2^63)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LIMIT:
        raise InvalidArgument(f"{name} = {value!r}: give an integer from 0 to 2^63 - 1")
    return value


def cut_folder(cut: int) -> str:
    """Return the folder of a cut, such as ``cut-000012``."""
    return f"cut-{check_count('cut', cut):06d}"


def compact_folder(cut: int) -> str:
    """Return the folder of files that stand for chains up to a cut, such as ``compact-000012``."""
    return f"compact-{check_count('cut', cut):06d}"


def folder_cut(folder: str) -> int | None:
    """Return the cut of a folder's name, None if the name is not exactly one that ``cut_folder`` gives."""
    found = parse_folder(folder)
    return found[1] if found is not None and found[0] == "cut" else None


def parse_folder(folder: object) -> tuple[str, int] | None:
    """Return ``("cut", n)`` or ``("compact", n)`` of a folder's name, None if it is no such name in its plain form."""
    match = _FOLDER.fullmatch(folder) if isinstance(folder, str) else None
    if match is None or (cut_folder if match[1] == "cut" else compact_folder)(int(match[2])) != folder:
        return None
    return match[1], int(match[2])


def block_file_name(kind: str, name: str, block: int) -> str:
    """Return the file name of a block, such as ``rows-user-00012.arrow``.

    A name with capitals gets their positions as hex bits: ``User_ID`` gives ``user_id=61`` (characters 0, 5 and 6).
    """
    if kind not in (*KINDS, WAITING, GONE):
        raise InvalidArgument(f"block kind {kind!r}: choose one of {', '.join(KINDS)}")
    check_name("dense parameter" if kind == "dense" else "table", name)
    capitals = sum(1 << i for i, letter in enumerate(name) if letter.isupper())
    stem = f"{name.lower()}={capitals:x}" if capitals else name
    return f"{kind}-{stem}-{check_count('block', block):05d}.arrow"


def is_block_file(name: object) -> bool:
    """Tell whether ``name`` looks like a block's file: a plain name without a folder, at most 255 bytes."""
    return isinstance(name, str) and len(name) <= 255 and _FILE.fullmatch(name) is not None
