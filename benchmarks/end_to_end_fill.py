# SPDX-License-Identifier: Apache-2.0
"""Rows that exist before anything is timed: pushed with gradients of zero, by a worker that takes one split and trains nothing.

Invariant: a row has its first value and an unused optimizer state afterwards, as any row that was just created. One event loop.
"""

import random
from pathlib import Path

import numpy as np

from oarlock.client.client import Client
from oarlock.client.membership import Membership
from oarlock.client.push import RowGradients
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.coordinator_pb2 import TRAIN, WORKER, CloseSplitRequest, LeaseRequest
from oarlock.proto.transport import Transport

KEYS_PER_PUSH = 1 << 17


async def fill(transport: Transport, coordinator: str, data: Path) -> int:
    """Create the rows of ``existing-TABLE.npy`` in ``data``, once the coordinator leases a split; return how many."""
    member = Membership(transport, coordinator, WORKER, rng=random.SystemRandom(), reader="arrow")
    spec = await member.join()
    created = 0
    async with member.kept(dict):
        routes = await member.newer_routes(1)
        client, sorter = Client(member), KeySorter()
        held: list[int] = []
        question = 0
        while not held:
            question += 1
            reply = await member.call("Coordinator.Lease", LeaseRequest(wanted=1, number=question))
            held = list(reply.splits) if reply.work == TRAIN else []
        member.about = lambda request: request.held.extend(held)
        group = 0
        for number, table in enumerate(member.layout.tables):
            keys = np.load(data / f"existing-{table.name}.npy", mmap_mode="r")
            for begin in range(0, len(keys), KEYS_PER_PUSH):
                part = np.array(keys[begin : begin + KEYS_PER_PUSH])
                bits = table.blocks.bit_length() - 1
                found = sorter.build(part, table_salt(table.name), bits, routes.ranks[number])
                zeros = np.zeros((len(found.keys), table.dim), np.float32)
                await client.push(held[0], group, {table.name: RowGradients(found, zeros, 0.01)})
                created += len(found.keys)
                group += 1
        request = CloseSplitRequest(work=TRAIN, split=held[0], samples=0, loss_sum=0.0, groups=group)
        await member.call("Coordinator.CloseSplit", request)
    assert spec.splits
    await member.leave()
    return created
