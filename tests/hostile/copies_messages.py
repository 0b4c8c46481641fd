# SPDX-License-Identifier: Apache-2.0
"""Good messages about copies, for a shard that owns all blocks of a small job but one, of which it has a copy."""

import numpy as np

from oarlock.client.closed import ClosedSet
from oarlock.client.router import Changes, pack_changes
from oarlock.proto.arrays import pack
from oarlock.proto.shard_pb2 import (
    AdoptRequest,
    CopyRequest,
    HandOverRequest,
    HeldRequest,
    ReopenRequest,
    ReplicateRequest,
)
from oarlock.ps.images import image_of
from oarlock.ps.operations import Operation, Pushed, Swept, Undone, encode, sequences_of
from oarlock.ps.request import Keys, RowPush

# A block of table user that shard 1 owns and shard 0 has a copy of.
COPIED = 3
SENDER = 101


def change_of(job, owner=1, members=(1, 0)):
    """Return the order by which the block becomes shard 1's, with a copy on shard 0."""
    job.generation += 1
    one = np.array([COPIED], np.int32)
    generations = np.array([job.generation], np.int64)
    told = Changes(
        job.generation,
        job.generation - 1,
        False,
        one,
        np.array([owner], np.int32),
        generations,
        np.array([members], np.int32),
        job.addresses,
    )
    return AdoptRequest(
        header=job.header(0),
        placement=pack_changes(told),
        closed=ClosedSet().pack(),
        create=pack(np.empty(0, np.int32)),
    )


def messages(job, keyset):
    """Return (method, messages) of each method about copies; ``keyset``: of table user."""
    shard, header = job.shards[0], job.header(0)
    at = keyset.blocks.tolist().index(COPIED)
    first, count = int(keyset.counts[:at].sum()), int(keyset.counts[at])
    one = np.array([COPIED], np.int32)
    keys = Keys(0, keyset.keys[first : first + count], one, np.array([count], np.int32), one)
    none = np.empty(0, np.uint32), np.empty(0, np.float32)
    gradients = np.ones((count, job.layout.tables[0].dim), np.float32)
    pushed = Pushed(1, 2, 5, (RowPush(keys, gradients, 0.1, *none),), (), tick=7)
    swept = Swept(keys.keys[:1], np.empty(0, np.uint64))
    generations, now = np.array([job.generation], np.int64), sequences_of(shard, one)

    def replicate(first, *does):
        operations = [Operation(one, now + 1 + i, each) for i, each in enumerate(does)]
        made = [encode(job.layout, operation, generations, None) for operation in operations]
        return ReplicateRequest(header=job.header(0, sender=SENDER), stream=7, first=first, operations=made)

    named = {"blocks": pack(np.array([1, 2], np.int32)), "generations": pack(np.array([1, 1], np.uint64))}
    return {
        "Shard.Replicate": [
            replicate(0, pushed),
            replicate(0, pushed, Undone(keys, 1), swept),
            replicate(0, image_of(shard, COPIED)),
            replicate(0, image_of(shard, job.layout.dense_base)),
        ],
        "Shard.Copy": [CopyRequest(header=header, shard=1, **named)],
        "Shard.HandOver": [HandOverRequest(header=header, shard=1, order=2, **named)],
        "Shard.Reopen": [ReopenRequest(header=header, term=1, order=2, **named)],
        "Shard.Held": [HeldRequest(header=header, blocks=pack(np.array([0, COPIED], np.int32)))],
    }
