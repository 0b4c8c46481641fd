# SPDX-License-Identifier: Apache-2.0
"""What people mean by a checkpoint: a job, a folder or a URL, each perhaps with ``@12`` behind it.

Invariant: a job's checkpoints are looked for where its job file says, with the options that stand there. Nothing is read but
job files.
"""

from pathlib import Path

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.store import CheckpointStore, is_url, locate
from oarlock.launch.folder import read_spec
from oarlock.launch.origin import RUNS


def find(target: str) -> tuple[CheckpointStore, int | None]:
    """Return the store that ``target`` means, and the cut if it names one."""
    name, cut = split_cut(target) if "@" in target else (target, None)
    folder = None if is_url(target) else _job(target) or _job(name)
    if folder is None:
        return locate(target)
    return place_of(read_spec(folder)).open(folder), None if _job(target) else cut


def find_cut(target: str) -> tuple[CheckpointStore, Manifest]:
    """Return the store and the cut that ``target`` means: the newest one if it names none."""
    store, cut = find(target)
    return store, store.load_manifest(cut)


def _job(name: str) -> Path | None:
    """Return the folder of the job that ``name`` means: that itself, or of that name; a folder that is no job's is none."""
    for folder in (Path(name), RUNS / name):
        if (folder / "job.json").is_file():
            return folder
        if folder.is_dir():
            return None
    return None
