# SPDX-License-Identifier: Apache-2.0
"""Values of an answer that a transport receives where they belong: all of them, and only those that have one place."""

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.proto.bulk import Bulk
from oarlock.proto.errors import Malformed

KEYS = 2000


class Landed(rig.Spy):
    """Passes requests on, and puts the parts of their answers where they are told to lie."""

    def __init__(self, inner):
        super().__init__(inner)
        self.landed = self.elsewhere = 0
        self.change = lambda reply, parts: None

    async def call(self, address, method, request, *, timeout_seconds):
        reply = await super().call(address, method, request, timeout_seconds=timeout_seconds)
        if not isinstance(request, Bulk) or request.landing is None:
            return reply
        parts = [memoryview(part).cast("B") for part in reply.parts]
        self.change(reply.message, parts)
        lengths = [part.nbytes for part in parts]
        for n, view in enumerate(request.landing(reply.message, lengths)):
            self.landed += view is not None
            self.elsewhere += view is None
            if view is not None:
                view[:] = parts[n]
                parts[n] = view
        return Bulk(reply.message, parts)


def big():
    dense = (
        rig.DenseSpec("w", (50, 40), rig.SGD, rig.ZEROS, slice=500),
        rig.DenseSpec("b", (400,), rig.SGD, rig.ZEROS, slice=400),
    )
    return rig.spec_of(dense=dense)


async def pulled(client, job, keys):
    rows = {t.name: np.full((KEYS, t.dim), np.nan, np.float32) for t in job.layout.tables}
    dense = np.full(job.layout.dense_size, np.nan, np.float32)
    await client.pull(keys, rows, dense=dense)
    return rows, dense


def keys_of(job, client):
    return {name: rig.group_keys(job.layout, client.routes, name, range(KEYS)) for name in ("user", "item")}


def push_all(client, job, keys):
    gradients = {
        name: rig.RowGradients(k, -np.repeat(k.keys.astype(np.float32)[:, None], job.layout.tables[n].dim, axis=1), 1.0)
        for n, (name, k) in enumerate(keys.items())
    }
    return client.push(0, 0, gradients, dense=-np.arange(job.layout.dense_size, dtype=np.float32), dense_rate=1.0)


def check(job, keys, rows, dense):
    for name, found in rows.items():
        assert np.array_equal(found, np.repeat(keys[name].keys.astype(np.float32)[:, None], found.shape[1], axis=1))
    assert np.array_equal(dense, np.arange(job.layout.dense_size))


@pytest.mark.parametrize("shards", [1, 3])
def test_what_has_one_place_is_received_there(shards):
    """Rows of every shard; dense values only of one that has neighbours alone."""
    job = rig.Job(big(), shards).place()
    landed = Landed(job.transport)

    async def body():
        client = Client(job.member(landed))
        keys = keys_of(job, client)
        await push_all(client, job, keys)
        return keys, *await pulled(client, job, keys)

    (keys, rows, dense), _ = rig.run(body())
    check(job, keys, rows, dense)
    # Of three shards, one has one dense block alone.
    assert (landed.landed, landed.elsewhere) == ((3, 0) if shards == 1 else (2 * shards + 1, 2))


def test_rows_that_lie_scattered_are_put_in_their_places():
    """As after blocks moved, when the keys were grouped by the old placement; and rows of an array that is not contiguous."""
    job = rig.Job(big(), 2).place()
    landed = Landed(job.transport)

    async def body():
        client = Client(job.member(landed))
        keys = keys_of(job, client)
        await push_all(client, job, keys)
        for number in range(0, 12, 3):
            job.move(number, 1 - int(job.owners[number]))
        found = await pulled(client, job, keys)
        # The keys of one piece are side by side at most by chance.
        wide = {t.name: np.zeros((KEYS, t.dim + 1), np.float32) for t in job.layout.tables}
        before = landed.landed
        await client.pull(keys, {name: values[:, :-1] for name, values in wide.items()})
        assert landed.landed == before
        assert all(np.array_equal(wide[name][:, :-1], found[0][name]) for name in wide)
        return keys, *found

    (keys, rows, dense), _ = rig.run(body())
    check(job, keys, rows, dense)
    assert landed.elsewhere > 0


@pytest.mark.parametrize("part", [0, 1, 3, 2**31])
def test_an_answer_whose_parts_are_confused_is_malformed(part):
    """The rows of both tables in one part, or in one that is none: nothing is believed because it has landed."""
    job = rig.Job(big(), 1).place()
    landed = Landed(job.transport)

    def change(reply, parts):
        reply.rows[1].part = part

    landed.change = change

    async def body():
        client = Client(job.member(landed))
        with pytest.raises(Malformed):
            await pulled(client, job, keys_of(job, client))

    rig.run(body())
