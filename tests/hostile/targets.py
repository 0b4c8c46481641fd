# SPDX-License-Identifier: Apache-2.0
"""A shard as it stands behind its port, with good messages for each method and a way to attack it; the coordinator has a file of
its own.

Invariant: ``attack`` gives bytes to what the gRPC server gives them to, and checks what must hold after any bytes at all: an
answer or a PSError that is no Internal and can itself be sent; what was refused changed nothing; nothing outgrows its bound.
"""

import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import ClassVar

import copies_messages
import mutate
import numpy as np
import rig

from oarlock.client.closed import SPLIT_WINDOW, ClosedSet
from oarlock.client.packed import CHUNK, encode_dense, encode_rows, packed, read_form
from oarlock.embedding.policy import Guard
from oarlock.embedding.spec import CacheSpec, DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import HelloRequest
from oarlock.proto.errors import DeadlineExceeded, Internal, Malformed, PSError
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.rpc import GrpcServer, to_status
from oarlock.proto.shard_pb2 import (
    EXPLAIN,
    EXPORT,
    GET,
    QUARANTINE,
    UNDO,
    AbortRequest,
    ChangesRequest,
    CloseRequest,
    Codec,
    CutRequest,
    DigestRequest,
    MarksRequest,
    PullRequest,
    RanksRequest,
    ReplaceRequest,
    RowsRequest,
    ShardStatsRequest,
    TableKeys,
    WriteRequest,
)
from oarlock.proto.work import Work
from oarlock.ps.feed import NOTED_KEYS, RING_BYTES
from oarlock.ps.rows import ANSWERS_KEPT

# Of who waits for an answer: some thousands of a million wait for copies that a forged record names.
PATIENCE_SECONDS = 0.02

READ_ONLY = (
    "Shard.Held",
    "Shard.Hello",
    "Shard.Pull",
    "Shard.Marks",
    "Shard.Stats",
    "Coordinator.Hello",
    "Coordinator.Status",
    "Coordinator.Describe",
)


class Target:
    """What is attacked. ``inputs`` counts the attacks, ``refused`` and ``answered`` what came of them."""

    service = ""
    # How often each method is tried; what writes files or ends the job comes seldom.
    weights: ClassVar[dict[str, int]] = {}

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.inputs = self.refused = self.answered = self.waited = 0
        self.renew()

    def renew(self):
        """Begin a new life: what forged orders have spoilt is gone."""
        self.build()
        self.server = GrpcServer(self.handler, self.service, listen="127.0.0.1:0")
        self.good = {m: [g.SerializeToString() for g in messages] for m, messages in self.messages().items()}
        assert set(self.good) == {m for m in METHODS if m.startswith(self.service + ".")}
        self.state = self.fingerprint()

    def next_input(self):
        """Return (method, bytes) of the next attack."""
        rng = self.rng
        (method,) = rng.choices(list(self.weights), list(self.weights.values()))
        kind = rng.random()
        data = rng.choice(self.good[method])
        if kind < 0.05:
            return method, mutate.any_bytes(rng)
        if kind < 0.10:
            # A good message of another method.
            other = rng.choice(list(self.good))
            return method, rng.choice(self.good[other])
        if kind < 0.15:
            return method, data
        if kind < 0.40:
            return method, mutate.bytes_of(rng, data)
        message = METHODS[method].request.FromString(data)
        mutate.message_of(rng, message)
        return method, message.SerializeToString()

    def attack(self, method, data):
        """Send the bytes; return the error that they met, None if they were answered."""
        self.inputs += 1
        data = self.fenced(method, data)
        error = None
        term = self.term()
        try:
            with Work(self.server.memory, method, seconds=PATIENCE_SECONDS) as work:
                self.server._begun(METHODS[method], data, work)()
        except DeadlineExceeded:
            # It was done, and waits for copies that a forged record names.
            self.waited += 1
        except PSError as refusal:
            error = refusal
        now = self.fingerprint()
        # A refused order tells who is in charge, unless it is one that nobody meant.
        assert self.term() == term or not isinstance(error, Malformed)
        if error is None:
            self.answered += 1
            assert method not in READ_ONLY or now == self.state, f"{method} changed something"
        else:
            self.refused += 1
            assert type(error) is not Internal, repr(error.__cause__)
            assert to_status(error)
            assert len(error.message) < 10_000
            assert now == self.state, f"refused as {error!r}, and something changed"
        self.state = now
        self.check_bounds()
        return error

    def fenced(self, method, data):
        return data

    def term(self):
        return 0

    def run(self, inputs, *, life=400):
        """Make ``inputs`` attacks; on a failure say what is needed to repeat the last one."""
        for i in range(inputs):
            if i % life == life - 1:
                self.renew()
            method, data = self.next_input()
            try:
                self.attack(method, data)
            except Exception as error:
                raise AssertionError(f"input {i}, {method} {data.hex()}: {type(error).__name__}: {error}") from error


# In which forms pushes come beside float32.
PACKED = (Codec(codec=1, zstd=True), Codec(codec=2), Codec(codec=3), Codec(codec=4, k=1), Codec(zstd=True))


def packed_push(job, split, group, codec):
    """Return a right push of some rows and all dense blocks in a form."""
    request = rig.request_of(job, split, group, raw=range(8))
    for part in request.tables:
        values = unpack(part.gradients, np.float32, "rows", dims=2)
        form = read_form(codec, values.shape[1], "rows")
        part.packed.CopyFrom(packed(form, encode_rows(form, values), values.size, None))
        part.ClearField("gradients")
    for part in request.dense:
        values = unpack(part.gradients, np.float32, "dense")
        form, lengths = read_form(codec, CHUNK, "dense"), [block.length for block in job.layout.dense_blocks]
        part.packed.CopyFrom(packed(form, encode_dense(form, values, lengths), values.size, None))
        part.ClearField("gradients")
    return request


def small_spec():
    """Return a job of two tables and two dense parameters in eleven blocks, half of it under adam."""
    adam = OptimizerSpec("adam")
    return rig.spec_of(
        tables=(
            TableSpec("user", 2, adam, Initializer("normal"), 4, guard=Guard(undo=2), cache=CacheSpec(50, 3)),
            TableSpec("item", 3, rig.SGD, rig.ZEROS, 2),
        ),
        dense=(DenseSpec("w", (3, 3), adam, rig.ZEROS, slice=4), DenseSpec("b", (5,), rig.SGD, rig.ZEROS, slice=3)),
        splits=8,
        epochs=3,
    )


class ShardTarget(Target):
    """One shard that owns all blocks of a small job, in the middle of training."""

    service = "Shard"
    weights: ClassVar = {
        "Shard.Hello": 2,
        "Shard.Pull": 25,
        "Shard.Push": 45,
        "Shard.Marks": 8,
        "Shard.Ranks": 4,
        "Shard.Adopt": 8,
        "Shard.Close": 8,
        "Shard.Cut": 1,
        "Shard.Abort": 1,
        "Shard.Write": 1,
        "Shard.Replace": 2,
        "Shard.Digest": 1,
        "Shard.Replicate": 25,
        "Shard.Copy": 4,
        "Shard.HandOver": 2,
        "Shard.Reopen": 2,
        "Shard.Held": 4,
        "Shard.Stats": 3,
        "Shard.Rows": 20,
        "Shard.Changes": 15,
    }

    def __init__(self, seed, folder: Path):
        self.folder = folder
        super().__init__(seed)

    def build(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.job = rig.Job(small_spec(), shards=2)
        self.job.place([0] * self.job.layout.blocks)
        self.handler = self.job.services[0]
        self.shard = self.job.shards[0]
        for group in range(2):
            self.handler.push(rig.request_of(self.job, 1, group, raw=range(20)))
        self.handler.adopt(copies_messages.change_of(self.job))

    def messages(self):
        job = self.job
        keyset = rig.group_keys(job.layout, job.routes(), "user", range(12))
        part = TableKeys(table=0, keys=pack(keyset.keys), blocks=pack(keyset.blocks), counts=pack(keyset.counts))
        kept = TableKeys(versions=pack(np.arange(12, dtype=np.uint32) % 4), bound=2)
        kept.MergeFrom(part)
        believed = job.header(0, generation=job.generation)
        dense = pack(np.arange(job.layout.dense_base, job.layout.blocks, dtype=np.int32))
        adoption = job.adoption(0)
        job.generation += 1
        newer = job.adoption(0, closed=ClosedSet(1, [3]).pack())
        partly = job.adoption(0)
        owners = job.owners.copy()
        owners[::3] = -1
        partly.placement.owners.CopyFrom(pack(owners))
        header = job.header(0)
        return {
            "Shard.Hello": [HelloRequest(protocol=PROTOCOL, version="1")],
            "Shard.Pull": [
                PullRequest(header=header, tables=[part], dense=dense, number=1),
                PullRequest(header=header, tables=[part], dense=dense, codecs=[Codec(codec=3)], dense_codec=PACKED[0]),
                PullRequest(header=believed, tables=[kept, part]),
            ],
            "Shard.Push": [rig.request_of(job, split, group, raw=range(8)) for split, group in ((1, 1), (1, 2), (2, 0))]
            + [packed_push(job, 2, group, codec) for group, codec in enumerate(PACKED)],
            "Shard.Marks": [MarksRequest(header=header, splits=[0, 1, 2])],
            "Shard.Adopt": [adoption, newer, partly, copies_messages.change_of(job)],
            "Shard.Close": [CloseRequest(header=header, closed=ClosedSet(1, [3]).pack())],
            "Shard.Ranks": [RanksRequest(header=header)],
            "Shard.Cut": [CutRequest(header=header, cut=3, workers=[7, 8], committed=2)],
            "Shard.Abort": [AbortRequest(header=header, cut=2)],
            "Shard.Write": [WriteRequest(header=header, cut=3, root=str(self.folder / "cuts"))],
            "Shard.Replace": [
                ReplaceRequest(header=header, table="user", path=str(self.folder / "cuts" / "cut-000003")),
                ReplaceRequest(header=header, table="user", path=str(self.folder / "cuts" / "cut-000003"), number=4),
            ],
            "Shard.Digest": [DigestRequest(header=header, cut=3)],
            **copies_messages.messages(job, keyset),
            "Shard.Stats": [ShardStatsRequest(header=header)],
            "Shard.Changes": [
                ChangesRequest(header=header, **{n: pack(a) for n, a in asked.items()})
                for asked in (
                    {"blocks": np.arange(4, dtype=np.int32), "sequences": np.zeros(4, np.uint64)},
                    {
                        "blocks": np.arange(4, dtype=np.int32),
                        "sequences": np.arange(4, dtype=np.uint64),
                        "takes": np.ones(4, np.uint64),
                        "least": np.arange(4, dtype=np.uint64),
                    },
                )
            ],
            "Shard.Rows": [
                RowsRequest(header=header, verb=GET, keys=part),
                RowsRequest(header=header, verb=EXPLAIN, keys=part, tick=9),
                RowsRequest(header=header, verb=EXPORT, keys=part),
                RowsRequest(header=header, verb=EXPORT, block=1, least=2),
                RowsRequest(header=header, verb=UNDO, keys=part, steps=1, number=7),
                RowsRequest(header=header, verb=QUARANTINE),
            ],
        }

    def fenced(self, method, data):
        """Keep what is written and read inside the test's folder."""
        fields = {"Shard.Write": "root", "Shard.Adopt": "restore", "Shard.Replace": "path"}
        if method not in fields:
            return data
        try:
            request = METHODS[method].request.FromString(data)
        except Exception:
            return data
        field = fields[method]
        path = getattr(request, field)
        if not path or "\0" in path:
            return data
        if not os.path.normpath(path).startswith(str(self.folder)) and os.path.isabs(path):
            setattr(request, field, f"{self.folder}/{zlib.crc32(path.encode())}")
        return request.SerializeToString()

    def fingerprint(self):
        """Return a digest of all that a message may change: rows, dense values, marks, sequence, closed set, placement."""
        shard = self.shard
        digest = zlib.crc32(shard.sequence.tobytes(), shard.generation)
        holdings = shard.holdings
        for held in (holdings.owned, holdings.here, holdings.generations, holdings.owners):
            digest = zlib.crc32(held.tobytes(), digest)
        for split, marks in shard.marks._marks.items():
            digest = zlib.crc32(marks.tobytes(), zlib.crc32(b"%d" % split, digest))
        for *_, keys, weights, state in rig.state(self.job):
            digest = zlib.crc32(keys + weights + state, digest)
        return digest, shard.closed.floor, tuple(shard.closed.above)

    def term(self):
        return self.handler._term

    def check_bounds(self):
        assert len(self.shard.marks._marks) <= SPLIT_WINDOW
        assert len(self.shard.closed.above) <= SPLIT_WINDOW + 8
        assert len(self.handler._rows._answers) <= ANSWERS_KEPT
        assert self.shard.feed.nbytes <= RING_BYTES
        assert self.shard.feed._keys <= NOTED_KEYS

    def renew(self):
        if self.inputs:
            # Whatever was accepted, the shard can still be written, told about and closed.
            assert rig.state(self.job) is not None
            assert json.dumps(self.shard.stats(), allow_nan=False)
            assert self.shard.closed.pack().SerializeToString() is not None
        super().renew()
