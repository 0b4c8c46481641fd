# SPDX-License-Identifier: Apache-2.0
"""An owner of all blocks and members that have copies of them, told of each operation as bytes. Loaded as ``copies_rig``.

Each block is copied by one member. Memory that messages came in is overwritten as soon as they were answered.
"""

import numpy as np
import rig

from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.digest import Digest
from oarlock.embedding.spec import Admission, CacheSpec, DenseSpec, Eviction, Guard, OptimizerSpec, Part, TableSpec
from oarlock.proto.arrays import pack, view_of
from oarlock.proto.bulk import Bulk, Parts
from oarlock.proto.shard_pb2 import UNDO, PullRequest, RowsRequest, TableKeys
from oarlock.proto.shard_pb2 import Operation as Message
from oarlock.ps.images import image_of
from oarlock.ps.operations import Operation, apply, decode, encode, lead_of, sequences_of
from oarlock.ps.shard import Shard
from oarlock.ps.view import image_of as content_of

RANGE = 60


def tables(optimizer="adam", cache=True):
    """Tables of all kinds."""
    return (
        TableSpec(
            "user",
            3,
            OptimizerSpec(optimizer),
            blocks=4,
            admission=Admission("count", occurrences=2),
            eviction=Eviction(age=12),
            guard=Guard(undo=3),
            cache=CacheSpec(1, 2) if cache else None,
        ),
        TableSpec("item", 2, OptimizerSpec("adagrad"), blocks=4, dtype="int8", eviction=Eviction(score=0.5, decay=0.7)),
        TableSpec(
            "wide",
            4,
            parts=(Part(1, OptimizerSpec("ftrl")), Part(3, OptimizerSpec("adam"))),
            blocks=2,
            expand_score=1.0,
            eviction=Eviction(age=8),
        ),
        TableSpec(
            "seen",
            2,
            OptimizerSpec("momentum"),
            blocks=2,
            admission=Admission("sketch", occurrences=2, capacity=200, windows=2),
            eviction=Eviction(max_bytes=2500),
        ),
        TableSpec("cold", 8, OptimizerSpec("sgd"), blocks=2, memory_bytes=1, eviction=Eviction(occurrences=2)),
    )


DENSE = (DenseSpec("w", (5, 3), OptimizerSpec("adam"), slice=4), DenseSpec("b", (3,), OptimizerSpec("momentum")))


def spec_of(optimizer="adam", **changes):
    values = {"splits": 4, "rows_per_split": 100, "batch_rows": 10, "dense": DENSE, **changes}
    return rig.spec_of(tables=tables(optimizer, cache=values.get("mode") != "sync"), **values)


def canonical(shard, number):
    """Return all of a block in one order."""
    image = image_of(shard, number)
    content = image.content
    if isinstance(content, DenseBlock):
        whole = content.weights.tobytes(), content.state.tobytes()
    else:
        waiting = sorted(zip(content.waiting.tolist(), content.waited.tolist(), strict=True))
        records = [sorted(map(bytes, part)) for part in (content.records, content.others)]
        whole = content.left, content.sketch, waiting, records
    staged = [(p.rank, p.step, [part(one) for one in (*p.rows, *p.dense)]) for p in image.staged]
    return image.sequence, image.marks, whole, sorted(staged, key=lambda one: one[0])


def part(one):
    """Return the content of a part of a push."""
    if hasattr(one, "keys"):
        arrays = one.keys.keys, one.keys.numbers, one.keys.counts, one.gradients, one.occurrences, one.clicks
    else:
        arrays = one.numbers, one.gradients, one.starts
    return [one.rate, *(array.tobytes() for array in arrays)]


def digest(shard, numbers):
    found = Digest()
    for number in numbers:
        image = content_of(shard, number)
        if image.kind == "dense":
            found.add_dense(image.name, image.block, image.weights, image.state)
        else:
            content = image.keys, image.weights, image.state, image.counters, image.waiting, image.waited
            found.add_rows(image.name, image.block, *content, image.sketch)
    return found.value


def wired(layout, operation, rng):
    """Return the operation as it arrives, and the memory that it arrived in."""
    generations = rng.integers(1, 9, len(operation.numbers))
    beside = [] if rng.random() < 0.7 else None
    data = encode(layout, operation, generations, beside).SerializeToString()
    came = [bytearray(view_of(one)) for one in beside or []]
    found, told = decode(layout, Message.FromString(data), Parts(came))
    assert told.tolist() == generations.tolist()
    return found, came


def spoil(memory):
    for piece in memory:
        piece[:] = b"\xee" * len(piece)


class Heard(Shard):
    """A shard that tells a test, in place of its peers."""

    told = None


def heard(shard):
    shard.__class__ = Heard
    return shard


class Copies:
    """A job with one shard that owns all blocks, and ``members`` that copy those of ``of`` that they ``have``."""

    def __init__(self, spec, seed, members=2):
        self.rng = np.random.default_rng(seed)
        self.job = rig.Job(spec, shards=1).place()
        self.owner, self.layout = heard(self.job.shards[0]), self.job.layout
        self.members = [Heard(spec) for _ in range(members)]
        self.of = self.rng.integers(0, members, self.layout.blocks)
        self.have = np.zeros(self.layout.blocks, np.bool_)
        self.queue = []
        self.kinds = set()
        self.owner.told = self.told
        self.step, self.groups = 0, dict.fromkeys(range(4), 0)
        self.last = self.sent = None

    def close(self):
        for shard in (self.owner, *self.members):
            shard.close()

    # What travels

    def told(self, numbers, does):
        assert self.owner.push_lock.locked()
        assert self.owner.owned[numbers].all()
        self.queue.append(Operation(numbers, sequences_of(self.owner, numbers), does))

    def deliver(self):
        queue, self.queue = self.queue, []
        for operation in queue:
            for member, shard in enumerate(self.members):
                mine = self.have[operation.numbers] & (self.of[operation.numbers] == member)
                some = operation.only(mine)
                if some is not None:
                    self.kinds.add((type(some.does).__name__, getattr(some.does, "rank", 0) < 0))
                    found, came = wired(self.layout, some, self.rng)
                    with shard.push_lock:
                        image = type(found.does).__name__ == "Image"
                        assert image or (lead_of(shard, found) == 1).all()
                        apply(shard, found)
                        assert (lead_of(shard, found) <= 0).all()
                    spoil(came)

    def copy(self, chance=0.5):
        """Give members copies of some blocks, in place of those that they have."""
        self.deliver()
        for number in np.flatnonzero(self.rng.random(self.layout.blocks) < chance).tolist():
            self.have[number] = True
            with self.owner.push_lock:
                self.told(np.array([number], np.int32), image_of(self.owner, number))
        self.deliver()

    def same(self):
        self.deliver()
        for number in np.flatnonzero(self.have).tolist():
            shard = self.members[self.of[number]]
            assert canonical(self.owner, number) == canonical(shard, number), self.layout.name(number)
            assert digest(self.owner, [number]) == digest(shard, [number])

    def promote(self):
        """Let members own what they copy, and nobody be told any more."""
        self.same()
        self.owner.told = None
        for member, shard in enumerate(self.members):
            shard.holdings.owned = self.have & (self.of == member)
            shard.generation = self.owner.generation

    # What workers and others do

    def shards(self):
        return [self.owner] + [shard for shard in self.members if shard.owned.any()]

    def gradients(self):
        """Return gradients of random keys for some tables."""
        rng, found = self.rng, {}
        for table in self.job.spec.tables:
            if rng.random() < 0.2:
                continue
            high = int(rng.choice([8, RANGE, 10 * RANGE]))
            keyset = rig.group_keys(
                self.layout, self.job.routes(), table.name, rng.integers(0, high, int(rng.integers(1, 90)))
            )
            n = len(keyset.keys)
            values = rng.normal(size=(n, table.dim)).astype(np.float32)
            if rng.random() < 0.1:
                values[rng.integers(n), 0] = rng.choice([np.nan, np.inf])
            occurrences = rng.integers(0, 4, n).astype(np.uint32)
            clicks = (rng.random(n) * occurrences).astype(np.float32)
            more = {"occurrences": occurrences, "clicks": clicks} if rng.random() < 0.8 else {}
            found[table.name] = RowGradients(keyset, values, 0.1, **more)
        return found

    def send(self, identity, gradients, dense):
        """Push to all owners; return the bytes, to be sent again."""
        found = list(cut_push(self.layout, self.job.routes(), identity, gradients, dense, 0.05))
        if not found:
            return self.sent
        (made,) = found
        # Kept from before it is sent: a push that fails is sent again.
        self.sent = made.request.SerializeToString(), [bytes(view_of(one)) for one in made.parts], type(made.request)
        self.again(self.sent)
        return self.sent

    def again(self, sent):
        data, parts, kind = sent
        for shard in self.shards():
            came = [bytearray(one) for one in parts]
            request = kind.FromString(data)
            request.header.CopyFrom(self.job.header(0))
            shard.push(Bulk(request, came))
            spoil(came)

    def dense(self):
        if self.rng.random() < 0.2:
            return None
        return self.rng.normal(size=self.layout.dense_size).astype(np.float32)

    def push(self):
        """Push the next group of a split; or one that was there before."""
        if self.last is not None and self.rng.random() < 0.15:
            self.again(self.last)
            return
        split = int(self.rng.integers(4))
        self.step += int(self.rng.integers(0, 5))
        # Now and then by a worker that was held up, and knows an old step.
        late = 9 if self.groups[split] % 4 == 3 else 0
        identity = PushIdentity(split, self.groups[split], max(0, self.step - late))
        self.last = self.send(identity, self.gradients(), self.dense())
        self.groups[split] += 1

    def sweep(self):
        for _ in range(int(self.rng.integers(1, 30))):
            self.owner.sweep_some()

    def undo(self):
        raw = np.unique(self.rng.integers(0, RANGE, 20))
        keyset = rig.group_keys(self.layout, self.job.routes(), "user", raw)
        keys = TableKeys(table=0, keys=pack(keyset.keys), blocks=pack(keyset.blocks), counts=pack(keyset.counts))
        number, steps = int(self.rng.integers(1, 1 << 62)), int(self.rng.integers(1, 4))
        self.job.services[0].rows(
            RowsRequest(header=self.job.header(0), verb=UNDO, keys=keys, steps=steps, number=number)
        )

    def close_split(self):
        """End a split; members hear of it before or after what was pushed last."""
        split = int(self.rng.integers(4))
        closed = self.owner.closed.__class__(0, [split])
        early = self.rng.random() < 0.5
        if not early:
            self.deliver()
        for shard in (self.owner, *self.members):
            shard.close_splits(closed)
        self.groups[split] += 1000

    # Ranks

    def stage(self, ranks):
        """Push each rank's part of the next step, in any order, some twice; return the commits that follow."""
        rng, splits = self.rng, self.step
        sent = []
        for rank in rng.permutation(ranks).tolist():
            identity = PushIdentity(rank, splits, self.step, rank=rank + 1)
            sent.append(self.send(identity, self.gradients(), self.dense()))
            if rng.random() < 0.3 and all(sent):
                self.again(sent[int(rng.integers(len(sent)))])
            yield rank
        self.step += 1

    def commit(self, rank, samples):
        for shard in self.shards():
            request = PullRequest(header=self.job.header(0), rank=rank + 1, state=self.step, samples=samples)
            shard.pull(request)

    def commit_again(self, ranks):
        """Send the last commits to all owners, as ranks do when they hear of another placement."""
        for rank in range(ranks):
            self.commit(rank, rank % 3 + 1)

    def train_step(self, ranks, between=lambda: None):
        for _ in self.stage(ranks):
            between()
        for rank in self.rng.permutation(ranks).tolist():
            self.commit(rank, rank % 3 + 1)
            between()
