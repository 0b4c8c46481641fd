# SPDX-License-Identifier: Apache-2.0
"""The fitted transforms of a job, beside its cuts: ``plan/transforms-SHA256.json``, which every manifest names by its digest.

Without them a model that was trained on raw columns cannot be asked with raw columns. They may be megabytes and never change, so
all cuts of a job share one file, which garbage collection leaves alone. Invariant: what is read has the digest that was asked
for. The coordinator writes it before a cut that needs it exists; anybody reads.
"""

import hashlib
import re

from oarlock.checkpoint.files import Files
from oarlock.checkpoint.line import PLAN
from oarlock.checkpoint.manifest import Manifest
from oarlock.proto.errors import CorruptCheckpoint, NotFound

FOLDER = "plan"
# More than a job's description can be.
MOST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(text: str) -> str:
    """Return the digest by which a manifest names transforms."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_transforms(files: Files, text: str) -> None:
    """Keep a job's transforms beside its cuts, durable, unless they are there already; empty ones are in no file."""
    data, path = text.encode(), _path(digest_of(text))
    if not data:
        return
    try:
        if files.size(path) == len(data):
            return
    except FileNotFoundError:
        pass
    files.write_file(path, [data])
    files.sync_folder(FOLDER)


def read_transforms(files: Files, manifest: Manifest) -> str:
    """Return the transforms of a cut's job. NotFound if they are not kept here, CorruptCheckpoint if they are others."""
    plan = manifest.metrics.get(PLAN)
    digest = plan.get("transforms") if isinstance(plan, dict) else None
    if digest == digest_of(""):
        return ""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise NotFound(f"cut {manifest.cut} does not say which transforms its data had", cut=manifest.cut)
    path = _path(digest)
    try:
        size = files.size(path)
        data = bytes(files.read_file(path)) if size <= MOST_BYTES else b""
    except FileNotFoundError:
        raise NotFound(f"the transforms of cut {manifest.cut} are not in {files.root}", cut=manifest.cut) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptCheckpoint(
            f"{path}: altered or truncated: its checksum is not the one in its name; the job's folder has it, too (job.json)",
            file=path,
            cut=manifest.cut,
        )
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CorruptCheckpoint(f"{path}: it is no text, though its checksum fits", file=path) from None


def _path(digest: str) -> str:
    return f"{FOLDER}/transforms-{digest}.json"
