# SPDX-License-Identifier: Apache-2.0
"""A job of real servers with tokens is followed by threads: with role read, and on when its coordinator comes back."""

import json
import time

import follow_rig
import numpy as np
import pytest
from security_rig import texts_of, write_tokens

from oarlock.checkpoint.store import open_store
from oarlock.client.router import ShardAddress
from oarlock.proto.coordinator_pb2 import StatusReply
from oarlock.proto.errors import Unauthenticated
from oarlock.proto.rpc import BlockingTransport, GrpcServer
from oarlock.proto.security import Security, SecuritySpec
from oarlock.serving import Client
from oarlock.serving.follow import Following
from oarlock.serving.recall import RecallSpec

KEYS = np.arange(150, dtype=np.uint64)
SECONDS = 60.0


class Coordinator:
    """What is asked of one, by gRPC."""

    def __init__(self, job):
        self.describe = job.inner.coordinator.describe
        self.status = lambda request: StatusReply(status=json.dumps(job.status))


class Servers:
    """Shards and the coordinator of a job, with tokens."""

    def __init__(self, folder):
        tokens = write_tokens(folder / "tokens")
        self.security = Security(SecuritySpec(token_file=str(tokens))).open()
        read = write_tokens(folder / "read", f'read = "{texts_of(tokens)["read"]}"')
        self.reading = Security(SecuritySpec(token_file=str(read))).open()
        self.job = follow_rig.Job()
        for service in self.job.inner.services.values():
            shard = service._joined[1]
            shard.feed._clock = shard.changes._clock = time.monotonic
        self.running = []
        for number, service in self.job.inner.services.items():
            address = self.start(service, "Shard")
            self.job.inner.addresses[number] = ShardAddress(number, address, 100 + number)
        self.job.inner.place()
        self.address = self.start(Coordinator(self.job), "Coordinator")

    def start(self, service, name):
        server = GrpcServer(service, name, listen="127.0.0.1:0", security=self.security)
        self.running.append(server)
        return server.start()

    def stop(self):
        for server in self.running:
            server.stop()


@pytest.fixture
def servers(tmp_path):
    made = Servers(tmp_path)
    yield made
    made.stop()


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


def test_it_is_followed_with_the_role_read(servers, tmp_path, serve):
    job = servers.job
    job.train(range(100))
    transport = BlockingTransport(security=servers.reading)
    following = Following(
        open_store(tmp_path),
        transport.call,
        lambda: servers.address,
        job.spec.job,
        look_seconds=0.05,
        poll_seconds=0.02,
        recall=[RecallSpec("user", ann=False)],
    )
    try:
        following.load()
        _, address = serve(following)
        with Client(address) as client:

            def is_served():
                rows = client.lookup({"user": KEYS})["user"]
                return rows.tobytes() == job.inner.rows("user", KEYS).tobytes()

            until(is_served)
            job.train(range(50, 150))
            until(is_served)

            def is_found():
                found = client.nearest("user", np.ones(2, np.float32), 200)
                sums = np.sort(job.inner.rows("user", KEYS).sum(axis=1))[::-1]
                return found.counts[0] == len(KEYS) and np.allclose(found.scores[0, : len(KEYS)], sums)

            until(is_found)
            assert following.problem == ""
            servers.running[-1].stop()
            until(lambda: "the coordinator" in following.problem)
            # Shards tell on.
            job.train(range(10, 60), 2.0)
            until(is_served)
            servers.address = servers.start(Coordinator(job), "Coordinator")
            until(lambda: following.problem == "")
            assert client.describe().version.seconds_since < SECONDS
            assert client.lookup({"user": KEYS}).version[:2] == (1, 0)
    finally:
        following.close()
        transport.close()


def test_without_a_token_it_says_so(servers, tmp_path):
    transport = BlockingTransport()
    following = Following(open_store(tmp_path), transport.call, lambda: servers.address, servers.job.spec.job)
    with pytest.raises(Unauthenticated):
        following.load()
    following.close()
    transport.close()
