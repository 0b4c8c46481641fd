# SPDX-License-Identifier: Apache-2.0
"""Gradients that their owner keeps as they are travel from where they lie; all others are copied before a push is sent."""

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.proto.arrays import unpack
from oarlock.proto.errors import Unavailable

KEYS = 3000


def made(job, client, kept):
    keys = rig.group_keys(job.layout, client.routes, "user", range(KEYS))
    gradients = -np.repeat(keys.keys.astype(np.float32)[:, None], 2, axis=1)
    occurrences = np.ones(KEYS, np.uint32)
    return keys, RowGradients(keys, gradients, 1.0, occurrences, np.zeros(KEYS, np.float32), kept=kept)


@pytest.mark.parametrize("kept", [False, True])
def test_a_message_shares_memory_with_what_is_kept_alone(job, spy, kept):
    part = made(job, Client(job.member(spy)), kept)[1]
    messages = cut_push(job.layout, job.routes(), PushIdentity(0, 0), {"user": part}, None, 0.0)
    assert len(messages) == 3
    for message in messages:
        (table,) = message.request.tables
        found = unpack(table.gradients, np.float32, "gradients", dims=2, parts=message.parts)
        assert np.shares_memory(found, part.gradients) == kept
        for sent, own in ((table.occurrences, part.occurrences), (table.clicks, part.clicks)):
            assert np.shares_memory(message.parts[sent.part - 1], own) == kept


@pytest.mark.parametrize("kept", [False, True])
def test_a_push_whose_answers_are_lost_and_whose_blocks_move_is_applied_once(job, spy, kept):
    """Each block's bytes are as they were, whichever message they go out in; what is not kept is used for something else."""
    lost = [True, True]
    spy.answers.append(lambda a, m, r: Unavailable("lost") if m == "Shard.Push" and lost and lost.pop() else None)

    async def body():
        client = Client(job.member(spy))
        keys, part = made(job, client, kept)
        pushing = client.push(0, 0, {"user": part})
        for number in range(0, 8, 3):
            job.move(number, (int(job.owners[number]) + 1) % 3)
        if not kept:
            part.gradients.fill(1e9)
        counts = await pushing
        rows = np.full((KEYS, 2), np.nan, np.float32)
        await client.pull({"user": keys}, {"user": rows})
        return keys, rows, counts

    (keys, rows, counts), _ = rig.run(body())
    assert counts.applied + counts.skipped == 8
    assert np.array_equal(rows, np.repeat(keys.keys.astype(np.float32)[:, None], 2, axis=1))
