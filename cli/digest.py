# SPDX-License-Identifier: Apache-2.0
"""`oarlock digest`: one number for all rows and dense values of a checkpoint, equal for equal models (embedding/digest.py).

Invariant: it reads block by block, so it needs the memory of one block, and changes nothing. A job that runs is asked for that
of one moment (--live), as a cut would have it.
"""

import argparse
import json
import time

from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import CheckpointStore
from oarlock.cli.jobs import ask, asking, live
from oarlock.client.job import OVER
from oarlock.embedding.digest import Digest
from oarlock.launch.folder import locate
from oarlock.launch.place import find_cut
from oarlock.proto.coordinator_pb2 import LiveDigestReply, LiveDigestRequest
from oarlock.proto.errors import Unavailable

LOOK_SECONDS = 0.1


def digest_of(store: CheckpointStore, manifest: Manifest) -> Digest:
    """Return the digest of a checkpoint."""
    found = Digest()
    for entry in manifest.blocks:
        image = store.load_block(manifest, entry)
        if image.kind == "dense":
            found.add_dense(image.name, image.block, image.weights, image.state)
        else:
            found.add_rows(
                image.name,
                image.block,
                image.keys,
                image.weights,
                image.state,
                image.counters,
                image.waiting,
                image.waited,
                image.sketch,
            )
    return found


def _live(options: argparse.Namespace) -> int:
    """Ask a running job, at one moment of all its blocks."""
    folder, address = locate(options.target)
    security = asking(options, folder)
    status = live(folder, address, security)
    if status is None or status["phase"] in OVER or address is None:
        raise Unavailable(
            f"job {options.target} does not run as processes: without --live its newest checkpoint is read"
        )
    reply: LiveDigestReply = ask(address, "Coordinator.LiveDigest", LiveDigestRequest(), security)
    while not status["digest"].get("number", 0) > reply.last:
        if status["phase"] in OVER:
            raise Unavailable(f"job {options.target} is {status['phase']}: its last checkpoint has all that it holds")
        time.sleep(LOOK_SECONDS)
        status = live(folder, address, security)
        if status is None:
            raise Unavailable(f"job {options.target} does not answer any more")
    found = status["digest"]
    if "error" in found:
        raise Unavailable(f"no digest was found, training goes on: {found['error']}")
    print(json.dumps(found) if options.json else found["digest"])
    return 0


def digest(options: argparse.Namespace) -> int:
    """Print the digest of a checkpoint, or of a job's newest one."""
    if options.live:
        return _live(options)
    store, manifest = find_cut(options.target)
    found = digest_of(store, manifest)
    if options.json:
        rows = sum(entry.rows for entry in manifest.blocks if entry.kind == "rows")
        told = {"digest": str(found), "cut": manifest.cut, "run": manifest.run, "epoch": manifest.epoch, "rows": rows}
        print(json.dumps(told))
    else:
        print(found)
    return 0
