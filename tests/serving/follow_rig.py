# SPDX-License-Identifier: Apache-2.0
"""A job of shards in this process, and what follows it. Loaded by conftest under the name ``follow_rig``."""

import json

import numpy as np
import rig
import rows_rig

from oarlock.checkpoint.store import open_store
from oarlock.embedding.policy import Admission, Eviction, Guard
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec
from oarlock.proto.bulk import inlined
from oarlock.proto.coordinator_pb2 import StatusReply
from oarlock.proto.errors import Unavailable
from oarlock.proto.methods import METHODS
from oarlock.proto.shard_pb2 import UNDO, PullRequest, RowsRequest
from oarlock.serving.follow import Following

UNIFORM = Initializer("uniform", 0.1, 0.2)
PARTS = (Part(1, OptimizerSpec("sgd"), UNIFORM), Part(2, OptimizerSpec("adagrad"), UNIFORM))
SPECS = {
    "plain": TableSpec("user", 2, OptimizerSpec("adagrad"), UNIFORM, 8, guard=Guard(undo=3), eviction=Eviction(age=3)),
    "zeros": TableSpec(
        "user",
        3,
        rig.SGD,
        UNIFORM,
        8,
        absent="zeros",
        admission=Admission("count", occurrences=2),
        eviction=Eviction(age=3),
    ),
    "bfloat16": TableSpec("user", 5, OptimizerSpec("adagrad"), UNIFORM, 4, dtype="bfloat16", eviction=Eviction(age=3)),
    "int8": TableSpec("user", 5, OptimizerSpec("adam"), UNIFORM, 4, dtype="int8", eviction=Eviction(age=3)),
    "expanding": TableSpec("user", 3, parts=PARTS, blocks=4, expand_score=0.5, eviction=Eviction(age=3)),
    "spilling": TableSpec("user", 16, OptimizerSpec("adagrad"), UNIFORM, 2, memory_bytes=1, eviction=Eviction(age=3)),
    "budget": TableSpec("user", 2, rig.SGD, UNIFORM, 2, eviction=Eviction(max_bytes=2000)),
}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Job:
    """Shards with a table ``user`` (``SPECS``) and a table ``item``; what is asked of the coordinator is answered here."""

    def __init__(self, spec="plain", shards=2, **changes):
        self.inner = rows_rig.job_of(
            shards, tables=(SPECS[spec], TableSpec("item", 3, rig.SGD, rig.ZEROS, 4)), **changes
        )
        self.spec = self.inner.spec
        self.step = 0
        self.status = {"phase": "training", "events": [], "checkpoints": []}
        self.silent = set()
        self.calls = []
        self.clock = Clock()
        for service in self.inner.services.values():
            self.tune(service)

    def tune(self, service):
        shard = service._joined[1]
        shard.feed._clock = shard.changes._clock = self.clock

    def call(self, address, method, request, *, timeout_seconds):
        self.calls.append((address, method))
        if address in self.silent:
            raise Unavailable(f"{address} does not answer")
        if address == "coordinator" and method == "Coordinator.Status":
            return StatusReply(status=json.dumps(self.status))
        if address == "coordinator":
            return self.inner.coordinator.describe(request)
        number = int(address.split("-")[1])
        message = METHODS[method].request.FromString(request.SerializeToString())
        reply = getattr(self.inner.services[number], METHODS[method].attribute)(message)
        return METHODS[method].reply.FromString(reply.SerializeToString())

    def follower(self, folder, **options):
        made = Following(
            open_store(folder), self.call, lambda: "coordinator", self.spec.job, clock=self.clock, **options
        )
        made.look()
        return made

    def train(self, raw, value=1.0, *, name="user", dense=None):
        """Push gradients of ``value`` for some rows, and ``dense`` float32[P], if there is any."""
        self.step += 1
        spec = self.spec.tables[0 if name == "user" else 1]
        keyset = rig.group_keys(self.inner.layout, self.inner.routes(), name, np.asarray(raw, np.uint64))
        gradients = np.full((len(keyset.keys), spec.dim), value, np.float32)
        rows = {name: rig.RowGradients(keyset, gradients, 0.5)}
        identity = rig.PushIdentity(1, self.step)
        for message in rig.cut_push(self.inner.layout, self.inner.routes(), identity, rows, dense, 1.0):
            request = inlined(message.bulk)
            request.step = self.step
            request.header.CopyFrom(self.inner.header(message.shard.id))
            self.inner.services[message.shard.id].push(request)

    def take_step(self, number, raw, value=1.0):
        """Have the one rank of a sync job push its part of a step, and commit it."""
        request = rig.request_of(self.inner, 0, 0, raw=raw, value=value)
        request.rank, request.step = 1, number - 1
        self.inner.services[0].push(request)
        commit = PullRequest(header=self.inner.header(0), rank=1, state=number, samples=1)
        self.inner.services[0].pull(commit)

    def sweep(self):
        for shard in self.inner.shards.values():
            while shard.sweep_some():
                pass

    def undo(self, raw, number):
        for shard, service in self.inner.services.items():
            keys = rows_rig.keys_of(self.inner, raw)
            blocks = np.frombuffer(keys.blocks.data, np.int32)
            mine = self.inner.owners[blocks] == shard
            if mine.any():
                counts = np.frombuffer(keys.counts.data, np.int32)
                rows = np.repeat(mine, counts)
                keys.blocks.CopyFrom(rows_rig.pack(blocks[mine]))
                keys.counts.CopyFrom(rows_rig.pack(counts[mine]))
                keys.keys.CopyFrom(rows_rig.pack(np.frombuffer(keys.keys.data, np.uint64)[rows]))
                request = RowsRequest(header=self.inner.header(shard), verb=UNDO, keys=keys, steps=1, number=number)
                service.rows(request)

    def catch_up(self, following, rounds=30):
        """Ask all shards until there is nothing more to ask for."""
        for _ in range(rounds):
            self.clock.now += 1.0
            shards = list(following._routes.shards.values())
            more = [following.poll(shard) for shard in shards]
            if following._wake.is_set():
                following._wake.clear()
                following.look()
                more = [True]
            if not any(more):
                return
        raise AssertionError("it never ends")


def served(following, name, keys):
    table = following.current.table(name)
    out = np.full((len(keys), table.spec.dim), np.nan, np.float32)
    missing = table.lookup(np.asarray(keys, np.uint64), out)
    return out, missing
