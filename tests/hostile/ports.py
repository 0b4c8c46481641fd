# SPDX-License-Identifier: Apache-2.0
"""A real shard and a real coordinator behind real ports, and a worker that goes on training whatever else they are sent.

Invariant: ``Port.trains`` checks every answer: each push applied once to each block, and each pull exactly what was pushed.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import cluster_rig
import numpy as np
import rig

from oarlock.client.router import ShardAddress
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto import frames
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Array, HelloRequest, SocketsRequest
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.rpc.sockets import ABSTRACT, connect
from oarlock.proto.shard_pb2 import CloseRequest, PullRequest, TableKeys


def resident():
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def again(call, seconds=30):
    """Return what ``call()`` returns, asked again as a member would while the error says that it may come right."""
    end = time.monotonic() + seconds
    while True:
        try:
            return await call()
        except PSError as error:
            if not error.retryable or time.monotonic() > end:
                raise
        await asyncio.sleep(0.02)


class Port:
    """A shard that owns all of a small job, served over TCP."""

    def __init__(self, *, dense=None, **server):
        self.job = rig.Job(rig.spec_of(dense=dense), shards=1)
        self.server = GrpcServer(self.job.services[0], "Shard", listen="127.0.0.1:0", **server)
        self.address = self.server.start()
        self.job.addresses[0] = ShardAddress(0, self.address, 100)
        self.job.place()
        self.groups = 0

    def stop(self):
        self.server.stop(0)

    def pull_request(self):
        """Return the pull of all dense values and some rows."""
        job = self.job
        keyset = rig.group_keys(job.layout, job.routes(), "user", range(40))
        part = TableKeys(table=0, keys=pack(keyset.keys), blocks=pack(keyset.blocks), counts=pack(keyset.counts))
        dense = np.arange(job.layout.dense_base, job.layout.blocks, dtype=np.int32)
        return PullRequest(header=job.header(0), tables=[part], dense=pack(dense))

    async def train(self, transport, groups=5):
        """Push groups and pull after each; every number must be right. Now and then an order comes between."""
        pull = self.pull_request()
        for _ in range(groups):
            push = rig.request_of(self.job, 0, self.groups)
            reply = await again(lambda p=push: transport.call(self.address, "Shard.Push", p, timeout_seconds=20))
            # A push that was answered into a broken connection is skipped when it comes again.
            assert reply.applied + reply.skipped == self.job.layout.blocks
            self.groups += 1
            answer = await again(lambda: transport.call(self.address, "Shard.Pull", pull, timeout_seconds=20))
            assert np.all(unpack(answer.rows[0], np.float32, "rows", dims=2) == -self.groups)
            assert np.all(unpack(answer.dense, np.float32, "dense") == -self.groups)
            assert answer.pushes == self.groups
            order = CloseRequest(header=self.job.header(0))
            await again(lambda o=order: transport.call(self.address, "Shard.Close", o, timeout_seconds=20))

    def trains(self, groups=5):
        async def body():
            transport = GrpcTransport()
            try:
                await self.train(transport, groups)
            finally:
                await transport.close()

        asyncio.run(body())
        return True


class Dialer:
    """Opens connections for frames by hand, to a Port; ``close`` closes them all."""

    def __init__(self, port):
        self.port = port
        self.made = []

        async def ask():
            transport = GrpcTransport()
            try:
                request = SocketsRequest(protocol=PROTOCOL)
                return await transport.call(port.address, "Wire.Sockets", request, timeout_seconds=20)
            finally:
                await transport.close()

        self.offer = asyncio.run(ask())

    def __call__(self, *, unix=True, hello=True):
        (address,) = [a for a in self.offer.addresses if a.startswith(ABSTRACT) == unix]
        made = connect(address, self.port.address)
        self.made.append(made)
        made.settimeout(20)
        if hello:
            # All places may be held by those that came a moment ago.
            with contextlib.suppress(ConnectionError):
                made.sendall(joined(frames.encode(frames.HELLO, self.offer.token)))
        return made

    def close(self):
        for one in self.made:
            one.close()


def joined(buffers):
    return b"".join(bytes(b) for b in buffers)


def beside(message):
    """Return the parts of all arrays of a message, however small, which it names from now on."""
    parts = []

    def move(each):
        for field, value in each.ListFields():
            if field.message_type is not None:
                for one in value if field.is_repeated else (value,):
                    if isinstance(one, Array):
                        parts.append(one.data)
                        one.data, one.part = b"", len(parts)
                    else:
                        move(one)

    move(message)
    return parts


class CoordinatorPort:
    """A coordinator with two shards and two workers, served over TCP."""

    def __init__(self, path, **server):
        self.cluster = cluster_rig.Cluster(path).start()
        self.cluster.shards()
        self.worker = self.cluster.workers()[0]
        self.server = GrpcServer(self.cluster.service, "Coordinator", listen="127.0.0.1:0", **server)
        self.address = self.server.start()

    def stop(self):
        self.server.stop(0)
        self.cluster.kill()

    def trains(self, beats=5):
        """Send heartbeats as a worker does."""

        async def body():
            transport = GrpcTransport()
            header = self.cluster.header(self.worker, term=self.cluster.coordinator.term)
            beat = pb.HeartbeatRequest(header=header)
            hello = HelloRequest(protocol=PROTOCOL)
            try:
                for _ in range(beats):
                    for method, request in (("Hello", hello), ("Heartbeat", beat)):
                        name = f"Coordinator.{method}"
                        await again(lambda n=name, r=request: transport.call(self.address, n, r, timeout_seconds=20))
            finally:
                await transport.close()

        asyncio.run(body())
        return True
