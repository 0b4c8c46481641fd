# SPDX-License-Identifier: Apache-2.0
"""What the tests of client/ and ps/ run on: a loop whose time is virtual, shards in this process, and a wire with faults.

A conftest loads it as ``rig``. One thread.
"""

import asyncio
import contextlib
import random
from collections import Counter

import numpy as np

from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.membership import Membership
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.client.retry import Retry
from oarlock.client.router import ShardAddress, make_routes, pack_placement, unpack_placement
from oarlock.cluster.placement import balanced
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.proto.bulk import inlined
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import DeadlineExceeded, PSError, Unavailable
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import AdoptRequest, CutRequest, WriteRequest
from oarlock.proto.transport import InProcess
from oarlock.ps import blocks, images, view
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService
from oarlock.simulation.loop import VirtualLoop

JOB = "00112233445566778899aabbccddeeff"
SGD = OptimizerSpec("sgd")
ZEROS = Initializer("zeros")


def run(coroutine):
    """Run a coroutine on a VirtualLoop; return (its result, the virtual seconds it took)."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        begin = loop.time()
        return runner.run(coroutine), loop.time() - begin


def spec_of(tables=None, dense=None, **changes):
    """A job of two small tables and two dense parameters (five blocks), under sgd from zero."""
    if tables is None:
        tables = (TableSpec("user", 2, SGD, ZEROS, 8), TableSpec("item", 3, SGD, ZEROS, 4))
    if dense is None:
        dense = (DenseSpec("w", (3, 3), SGD, ZEROS, slice=4), DenseSpec("b", (5,), SGD, ZEROS, slice=3))
    values = {
        "job": JOB,
        "name": "test",
        "seed": 7,
        "recipe": "none:none",
        "tables": tables,
        "dense": dense,
        "files": (),
        "evaluation_files": (),
        "splits": 4,
        "evaluation_splits": 1,
        "rows_per_split": 10,
        "evaluation_rows_per_split": 10,
        "batch_rows": 2,
        "epochs": 1,
        "servers": 1,
        "workers": 1,
        "metrics": ("auc",),
    }
    return JobSpec(**{**values, **changes})


def group_keys(layout, routes, table, raw):
    """Return the KeySet of raw keys of a table, as a worker makes it."""
    number = layout.table_index[table]
    bits = layout.tables[number].blocks.bit_length() - 1
    return KeySorter().build(np.asarray(raw, np.uint64), table_salt(table), bits, routes.ranks[number])


class Coordinator:
    """Answers what a client asks: the placement, once there is one."""

    def __init__(self):
        self.message = None
        self.asked = 0

    def placement(self, request):
        self.asked += 1
        if self.message is None:
            raise Unavailable("no placement yet")
        return self.message


class Job:
    """Shards in this process behind an in-process transport."""

    def __init__(self, spec, shards=3, *, run=1):
        self.spec = spec
        self.layout = Layout(spec.tables, spec.dense)
        self.transport = InProcess()
        self.coordinator = Coordinator()
        self.transport.serve(self.coordinator, "coordinator")
        self.generation = 0
        self.run = run
        # Of the coordinator that gives orders.
        self.term = 1
        # Of pushes: the newest cut that was begun.
        self.cut = 0
        self.addresses = {s: ShardAddress(s, f"shard-{s}", 100 + s) for s in range(shards)}
        self.services = {s: ShardService() for s in range(shards)}
        self.shards = {}
        for s, service in self.services.items():
            identity = Identity(spec.job_bytes, self.run, s, self.addresses[s].incarnation)
            self.shards[s] = service.configure(spec, identity)
            self.transport.serve(service, self.addresses[s].address)
        self.owners = np.full(self.layout.blocks, -1, np.int32)

    def header(self, shard, **changes):
        values = {
            "protocol": PROTOCOL,
            "job": self.spec.job_bytes,
            "run": self.run,
            "target": 100 + shard,
            "term": self.term,
        }
        values["cut"] = self.cut
        return Header(**{**values, **changes})

    def write(self, shard, cut, root, *, workers=(), alone=False):
        """Have a shard begin the view of a cut, unless it has, and write it; return the answer."""
        service = self.services[shard]
        self.cut = max(self.cut, cut)
        service.cut(CutRequest(header=self.header(shard), cut=cut, workers=workers))
        return service.write(WriteRequest(header=self.header(shard), cut=cut, root=str(root), alone=alone))

    def routes(self):
        return make_routes(self.layout, self.generation, self.owners, self.addresses)

    def place(self, owners=None, *, closed=None, restore="", adopt=True):
        """Begin a generation of the placement (balanced by default) and have every shard adopt it."""
        self.owners = balanced(self.layout, list(self.shards)) if owners is None else np.array(owners, np.int32)
        self.generation += 1
        self.coordinator.message = pack_placement(self.generation, self.owners, self.addresses)
        if adopt:
            for s, service in self.services.items():
                service.adopt(self.adoption(s, closed=closed, restore=restore))
        return self

    def adoption(self, shard, *, closed=None, restore=""):
        message = pack_placement(self.generation, self.owners, self.addresses)
        return AdoptRequest(header=self.header(shard), placement=message, closed=closed, restore=restore)

    def move(self, number, to):
        """Move a block with all that belongs to it, under a new generation."""
        old, new = self.shards[int(self.owners[number])], self.shards[to]
        if old is not new:
            image = images.image_of(old, number)
            blocks.drop(old, number)
            images.take(new, image)
            for shard, holds in ((old, False), (new, True)):
                shard.holdings.owned[number] = shard.holdings.here[number] = holds
        self.place(np.where(np.arange(len(self.owners)) == number, to, self.owners), adopt=False)

    def member(self, transport=None, *, retry=None, seed=0):
        """Return a Membership that has joined and knows the newest placement."""
        made = Membership(
            transport or self.transport, "coordinator", WORKER, rng=random.Random(seed), retry=retry or Retry()
        )
        made.take_up(self.spec)
        made.id, made.incarnation, made.run = 0, 9, self.run
        if self.coordinator.message is not None:
            made.routes = unpack_placement(self.layout, self.coordinator.message)
        return made

    def rows(self, table, keys):
        """Return the rows of keys: float32[n, dim], wherever they are."""
        number = self.layout.table_index[table]
        keyset = group_keys(self.layout, self.routes(), table, keys)
        out = np.empty((len(keyset.keys), self.spec.tables[number].dim), np.float32)
        at = 0
        for block, count in zip(keyset.blocks.tolist(), keyset.counts.tolist(), strict=True):
            owner = int(self.owners[self.layout.table_base[number] + block])
            one = (np.array([block], np.int32), np.array([count], np.int32))
            self.shards[owner].tables[number].pull(keyset.keys[at : at + count], *one, out[at : at + count])
            at += count
        return out[keyset.inverse]

    def dense(self):
        """Return all dense values: float32[P]."""
        out = np.empty(self.layout.dense_size, np.float32)
        for i, block in enumerate(self.layout.dense_blocks):
            shard = self.shards[int(self.owners[self.layout.dense_base + i])]
            shard.dense[block.parameter].pull_block(block.block, out[block.offset : block.offset + block.length])
        return out


def request_of(job, split, group, *, tables=("user", "item"), raw=tuple(range(40)), value=1.0, dense=1.0):
    """Return the push of a group to a job with one shard."""
    gradients = {}
    for name in tables:
        keyset = group_keys(job.layout, job.routes(), name, raw)
        dim = job.layout.tables[job.layout.table_index[name]].dim
        gradients[name] = RowGradients(keyset, np.full((len(keyset.keys), dim), value, np.float32), 1.0)
    values = None if dense is None else np.full(job.layout.dense_size, dense, np.float32)
    (message,) = cut_push(job.layout, job.routes(), PushIdentity(split, group), gradients, values, 1.0)
    message.request.header.CopyFrom(job.header(0))
    return inlined(message.bulk)


def state(job):
    """Return all that a push may change, of every shard."""
    out = []
    for shard in job.shards.values():
        for number in np.flatnonzero(shard.owned).tolist():
            image = view.image_of(shard, number)
            out.append(
                (number, image.seq, image.marks, image.keys.tobytes(), image.weights.tobytes(), image.state.tobytes())
            )
    return out


class Spy:
    """A transport that notes what goes through, and may answer or raise in another's place."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = []
        self.answers = []

    async def call(self, address, method, request, *, timeout_seconds):
        self.calls.append((address, method, request.SerializeToString(), timeout_seconds))
        for answer in self.answers:
            found = answer(address, method, request)
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                return found
        return await self.inner.call(address, method, request, timeout_seconds=timeout_seconds)

    async def close(self):
        pass

    def sent(self, method):
        return [c for c in self.calls if c[1] == method]


def push(client, job, *, split=0, group=0, keys=(1, 2, 3, 4, 5, 6, 7, 8), value=1.0):
    keyset = group_keys(job.layout, client.routes, "user", keys)
    gradients = np.full((len(keyset.keys), 2), value, np.float32)
    return client.push(split, group, {"user": RowGradients(keyset, gradients, 1.0)})


async def pull_all(client, job, *, raw=range(1, 9)):
    """Pull some rows of both tables and all dense values into buffers of NaN; return (keys, rows, dense)."""
    keys = {name: group_keys(job.layout, client.routes, name, raw) for name in ("user", "item")}
    rows = {t.name: np.full((len(keys[t.name].keys), t.dim), np.nan, np.float32) for t in job.layout.tables}
    dense = np.full(job.layout.dense_size, np.nan, np.float32)
    await client.pull(keys, rows, dense=dense)
    assert not any(np.isnan(r).any() for r in (*rows.values(), dense))
    return keys, rows, dense


class FaultyWire:
    """Passes messages as bytes, and loses, delays and repeats them as ``rng`` says. ``faults`` are probabilities.

    Kinds: ``lose`` (the request is lost), ``deaf`` (the reply is), ``late`` (a copy is delivered once more, much later),
    ``slow`` (either way takes seconds).
    """

    def __init__(self, inner, rng, **faults):
        self.inner = inner
        self.rng = rng
        self.faults = faults
        self.happened = Counter()
        self.later = set()

    def _strikes(self, kind):
        strikes = self.rng.random() < self.faults.get(kind, 0)
        self.happened[kind] += strikes
        return strikes

    async def call(self, address, method, request, *, timeout_seconds):
        data = request.SerializeToString()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._carry(address, method, data, timeout_seconds)
        except TimeoutError:
            raise DeadlineExceeded(f"{method} at {address}: no answer in time") from None

    async def _carry(self, address, method, data, timeout_seconds):
        if self._strikes("late"):
            task = asyncio.ensure_future(self._again(address, method, data))
            self.later.add(task)
            task.add_done_callback(self.later.discard)
        await self._pause()
        if self._strikes("lose"):
            await self._silence()
        request = METHODS[method].request.FromString(data)
        reply = await self.inner.call(address, method, request, timeout_seconds=timeout_seconds)
        answer = METHODS[method].reply.FromString(reply.SerializeToString())
        await self._pause()
        if self._strikes("deaf"):
            await self._silence()
        return answer

    async def _pause(self):
        if self._strikes("slow"):
            await asyncio.sleep(self.rng.random() * 30)

    async def _silence(self):
        if self.rng.random() < 0.5:
            raise Unavailable("the connection broke")
        await asyncio.sleep(1e9)

    async def _again(self, address, method, data):
        await asyncio.sleep(self.rng.random() * 300)
        with contextlib.suppress(PSError):
            await self.inner.call(address, method, METHODS[method].request.FromString(data), timeout_seconds=1)

    async def drain(self):
        """Wait for all repeated messages."""
        while self.later:
            await asyncio.wait(set(self.later))

    async def close(self):
        pass
