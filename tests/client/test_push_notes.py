# SPDX-License-Identifier: Apache-2.0
"""What a worker notes of its pushes is what shards answered: a block that had moved is done where it went, not where it was."""

import numpy as np
import rig

from oarlock.client.client import Client
from oarlock.client.push import RowGradients
from oarlock.client.push_notes import PushNotes, blocks_done, read_notes


def test_blocks_are_done_where_their_owners_say_so(job, spy, tmp_path):
    async def body():
        member = job.member(spy)
        member.push_notes = PushNotes(tmp_path, job.layout.blocks, 77).open()
        client = Client(member)
        keys = rig.group_keys(job.layout, client.routes, "user", range(3000))
        before = job.owners.copy()
        pushing = client.push(5, 2, {"user": RowGradients(keys, np.ones((3000, 2), np.float32), 1.0)})
        job.move(0, (int(job.owners[0]) + 1) % 3)
        await pushing
        member.push_notes.close()
        return before

    before, _ = rig.run(body())
    found = read_notes(tmp_path, job.layout.blocks)
    assert set(found["worker"].tolist()) == {77}
    assert (set(found["split"].tolist()), set(found["group"].tolist())) == ({5}, {2})
    assert (found["told"] >= found["sent"]).all()
    done = blocks_done(found, job.layout.blocks)
    pushed = np.flatnonzero(done.any(axis=0))
    assert (done.sum(axis=0)[pushed] == 1).all(), "each block is done once"
    assert 0 in pushed
    own = {n: found["shard"][done[:, n].argmax()] for n in pushed.tolist()}
    same = [n for n in own if n != 0 and before[n] == before[0]]
    assert same
    assert own[0] != own[same[0]], "it was done by the one that it had moved to"
