# SPDX-License-Identifier: Apache-2.0
"""The sockets for frames and people who do not speak as they should: each meets an answer or a closed connection, and training
goes on. Messages with parts that do not fit change nothing."""

import asyncio
import contextlib
import random
import resource
import socket

import mutate
import numpy as np
import ports
import pytest
import rig
from ports import beside, joined

from oarlock.client.client import Client
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.client.retry import Retry
from oarlock.proto import frames
from oarlock.proto.arrays import PART_BYTES, unpack
from oarlock.proto.bulk import Bulk, Parts
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import Internal, Malformed, PSError
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.rpc.connection import Connection
from oarlock.proto.rpc.sockets import connect
from oarlock.proto.shard_pb2 import PullReply, PullRequest, PushRequest, TableKeys

# Twelve places, which are free again soon.
SMALL = {"threads": 16, "stall_seconds": 0.05}


@pytest.fixture
def port():
    made = ports.Port(**SMALL)
    yield made
    made.stop()


@pytest.fixture
def dial(port):
    made = ports.Dialer(port)
    yield made
    made.close()


def mutated(rng, message, parts):
    """Change the message, its parts, or who names which."""
    kind = rng.randrange(7)
    if kind == 0:
        mutate.message_of(rng, message)
    elif kind == 1 and parts:
        at = rng.randrange(len(parts))
        parts[at] = mutate.bytes_of(rng, parts[at])
    elif kind == 2 and parts:
        del parts[rng.randrange(len(parts))]
    elif kind == 3 and parts:
        parts[rng.randrange(len(parts))] = rng.choice((b"", b"\0" * 7, bytes(4 * PART_BYTES)))
    elif kind == 4:
        rng.shuffle(parts)
    else:
        arrays = []

        def collect(each):
            for field, value in each.ListFields():
                if field.message_type is not None:
                    for one in value if field.is_repeated else (value,):
                        if isinstance(one, Array):
                            arrays.append(one)
                        else:
                            collect(one)

        collect(message)
        one = rng.choice(arrays)
        one.part = rng.choice((0, 1, len(parts), len(parts) + 1, rng.choice(arrays).part, (1 << 32) - 1))
        if kind == 6:
            one.data = b"\0" * rng.choice((0, 1, 8, 320))


def test_mutated_frames(port, dial, seed):
    """Of their bytes, and of the messages and parts in them."""
    rng = random.Random(seed)
    answered = 0
    for turn in range(240):
        message = port.pull_request()
        parts = beside(message)
        if turn % 2:
            mutated(rng, message, parts)
        data = joined(frames.encode(frames.PULL | rng.choice((0, frames.BESIDE)), message.SerializeToString(), parts))
        if not turn % 2:
            data = mutate.bytes_of(rng, data)
        one = dial(unix=bool(turn % 3))
        with contextlib.suppress(ConnectionError), one:
            one.sendall(data)
            # It may be at its end already.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_WR)
            while got := one.recv(1 << 16):
                answered += got.startswith(b"OARF")
        if turn % 40 == 0:
            assert port.trains(1)
    # The first word of each is the answer to its hello.
    assert answered > 100
    assert port.trains(2)


def test_an_exchange_answers_a_mutation_and_the_next_one_is_good(port, dial, seed):
    rng = random.Random(seed)
    one = dial()
    reader = frames.Receiver(one)
    assert reader.receive().kind == frames.REPLY
    good = port.pull_request().SerializeToString()
    refused = 0
    for _ in range(200):
        message = port.pull_request()
        parts = beside(message)
        mutated(rng, message, parts)
        frames.send(one, frames.encode(frames.PULL | frames.BESIDE, message.SerializeToString(), parts))
        reply = PullReply.FromString(reader.receive().message)
        assert reply.failure.code != Internal.code
        refused += reply.HasField("failure")
        frames.send(one, frames.encode(frames.PULL, good))
        assert len(PullReply.FromString(reader.receive().message).rows) == 1
    assert refused > 60


def push_of(job, rng):
    """Return a push to all blocks, its arrays beside it."""
    gradients = {}
    for name, dim in (("user", 2), ("item", 3)):
        keyset = rig.group_keys(job.layout, job.routes(), name, range(40))
        gradients[name] = RowGradients(keyset, np.ones((len(keyset.keys), dim), np.float32), 1.0)
    dense = np.ones(job.layout.dense_size, np.float32)
    (made,) = cut_push(job.layout, job.routes(), PushIdentity(0, 0), gradients, dense, 1.0)
    request = PushRequest.FromString(made.bulk.SerializeToString())
    request.header.CopyFrom(job.header(0))
    return request, beside(request)


def test_mutated_pushes_with_parts_are_applied_whole_or_not_at_all(seed):
    rng = random.Random(seed)

    def fresh():
        job = rig.Job(rig.spec_of(), shards=1)
        return job.place(), rig.state(job)

    job, before = fresh()
    applied = refused = 0
    for _ in range(700):
        request, parts = push_of(job, rng)
        mutated(rng, request, parts)
        try:
            job.services[0].push(Bulk(request, Parts(parts)))
        except PSError as error:
            failed = error
            refused += 1
        else:
            failed = None
            applied += 1
            job, before = fresh()
        assert not isinstance(failed, Internal)
        assert rig.state(job) == before
    assert applied > 30
    assert refused > 200


@pytest.mark.parametrize("part", [0, 1, 2, 3, 4, 1 << 31])
def test_parts_that_other_arrays_name(part):
    """The keys of a pull in the part of its counts, in none, in one that there is not."""
    job = rig.Job(rig.spec_of(), shards=1).place()
    keyset = rig.group_keys(job.layout, job.routes(), "user", range(40))
    request = PullRequest(header=job.header(0), tables=[TableKeys(table=0)])
    table, parts = request.tables[0], [keyset.keys, keyset.blocks, keyset.counts]
    arrays = zip((table.keys, table.blocks, table.counts), (1, 2, 2), parts, strict=True)
    for number, (array, dtype, values) in enumerate(arrays, 1):
        array.dtype, array.part = dtype, number
        array.shape.append(len(values))
    table.keys.part = part
    sent = Bulk(request, Parts(parts))
    if part == 1:
        reply = job.services[0].pull(sent)
        assert not np.any(unpack(reply.message.rows[0], np.float32, "rows", dims=2, parts=reply.parts))
    else:
        with pytest.raises(Malformed):
            job.services[0].pull(sent)


@pytest.mark.parametrize("said", [0, 3, 200])
@pytest.mark.parametrize("unix", [True, False])
def test_slow_senders_keep_nobody_out(port, dial, unix, said):
    """Forty of them, on a server of twelve places: nothing said, half a head, half a frame."""
    data = joined(frames.encode(frames.PULL, port.pull_request().SerializeToString() + bytes(500)))
    for turn in range(40):
        one = dial(unix=unix, hello=turn % 2 == 0)
        with contextlib.suppress(ConnectionError):
            one.sendall(data[:said])
    assert port.trains(3)


def test_answers_that_nobody_reads_keep_nobody_out(port, dial):
    request = joined(frames.encode(frames.PULL, port.pull_request().SerializeToString()))
    for _ in range(40):
        one = dial()
        one.settimeout(0)
        with contextlib.suppress(OSError):
            while True:
                one.send(request * 1000)
    assert port.trains(3)


class Dying(Connection):
    """Breaks off now and then: before the request is sent, in the midst of it, or once the other side has answered."""

    rng = random.Random(0)
    broken = 0

    async def exchange(self, buffers, *more):
        kind = self.rng.randrange(8)
        if kind > 2:
            return await super().exchange(buffers, *more)
        Dying.broken += 1
        if kind == 1:
            with self._shared.used() as connection:
                connection.send(joined(buffers)[: self.rng.randrange(200)])
        elif kind == 2:
            await super().exchange(buffers, *more)
        raise ConnectionResetError("broken off")


def test_pushes_over_connections_that_die_are_applied_exactly_once(port, monkeypatch, seed):
    Dying.rng, Dying.broken = random.Random(seed), 0
    monkeypatch.setattr("oarlock.proto.rpc.frame_client.Connection", Dying)
    job = port.job

    async def body():
        transport = GrpcTransport()
        inner = job.transport

        class Both:
            """The coordinator is in this process."""

            async def call(self, address, method, request, *, timeout_seconds):
                through = inner if address == "coordinator" else transport
                return await through.call(address, method, request, timeout_seconds=timeout_seconds)

        client = Client(job.member(Both(), retry=Retry(first_seconds=0.0001, most_seconds=0.0002)))
        try:
            counted = 0
            for group in range(60):
                counts = await rig.push(client, job, group=group)
                assert counts.applied + counts.skipped > 0
                counted += counts.skipped > 0
            _, rows, _ = await rig.pull_all(client, job)
            assert np.all(rows["user"] == -60)
            return counted
        finally:
            await transport.close()

    skipped = asyncio.run(body())
    assert Dying.broken > 10
    # Some were answered, the answer was lost, and they came again.
    assert skipped > 0


@pytest.mark.slow
def test_a_thousand_connections(monkeypatch):
    """Half of them say nothing at all, the others no more than hello; a hundred of them announce the largest frame."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this machine lets a process have no 4096 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    port = ports.Port()
    try:
        assert port.trains(20)
        before = ports.resident()
        token, addresses = port.server._frames.token, port.server._frames.addresses
        with contextlib.ExitStack() as stack:
            for turn in range(1000):
                one = stack.enter_context(connect(addresses[turn % 2], port.address))
                if turn % 2:
                    with contextlib.suppress(ConnectionError):
                        one.sendall(joined(frames.encode(frames.HELLO, token)))
                        if turn % 20 == 1:
                            one.sendall(frames._HEAD.pack(b"OARF", 1, frames.PUSH, 0, 1000, 128 << 20, 0) + bytes(5000))
                if turn % 250 == 0:
                    assert port.trains(3)
            assert port.trains(10)
            grown = ports.resident() - before
            print(f"1000 connections: {grown >> 20} MiB")
            assert grown < 200 << 20
        assert port.trains(10)
    finally:
        port.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
