# SPDX-License-Identifier: Apache-2.0
"""Shards with copies of each other's blocks, and a test in the coordinator's place. Nothing is sent but by ``pump``."""

import dataclasses

import numpy as np
from rig import Job, group_keys, spec_of

from oarlock.client.closed import ClosedSet
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import inlined
from oarlock.proto.common_pb2 import Member, Placement
from oarlock.proto.errors import PSError
from oarlock.proto.methods import METHODS
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import (
    AdoptRequest,
    CopyRequest,
    HandOverRequest,
    HeldRequest,
    PullRequest,
    ReopenRequest,
    TableKeys,
)
from oarlock.ps.copying import take_turn
from oarlock.ps.replicating import message_of, take_answer
from oarlock.ps.view import image_of

IMAGES, OPERATIONS = "images", "operations"


def travelled(name, message):
    """Return a message as it comes out of its bytes."""
    return METHODS[name].request.FromString(inlined(message).SerializeToString())


class Copies(Job):
    """``sets``: by block the copy set of its record, owner first; ``of``: the record's generation."""

    def __init__(self, spec, shards=3):
        super().__init__(spec, shards)
        self.sets = [()] * self.layout.blocks
        self.of = np.zeros(self.layout.blocks, np.int64)
        self.alive = set(self.shards)
        self.order = 0

    def begin(self, sets):
        """Make all blocks on the shards of their copy sets."""
        self.generation += 1
        self.sets, self.of[:] = [tuple(s) for s in sets], self.generation
        for shard in sorted(self.alive):
            self.adopt(shard, range(self.layout.blocks), create=range(self.layout.blocks), whole=True)

    def record(self, number, members, *, tell=None):
        """Record a copy set, and tell ``tell`` (all that are alive)."""
        self.generation += 1
        self.sets[number], self.of[number] = tuple(members), self.generation
        for shard in sorted(self.alive) if tell is None else tell:
            self.adopt(shard, [number])

    def placement(self, numbers, *, whole=False):
        numbers = list(numbers)
        width = max(1, *(len(self.sets[n]) for n in numbers))
        members = np.array([[*self.sets[n], *[-1] * (width - len(self.sets[n]))] for n in numbers], np.int32)
        return Placement(
            generation=self.generation,
            owners=pack(members[:, 0].copy()),
            shards=[Member(id=s.id, address=s.address, incarnation=s.incarnation) for s in self.addresses.values()],
            blocks=None if whole else pack(np.array(numbers, np.int32)),
            since=0 if whole else self.generation - 1,
            generations=pack(self.of[numbers].astype(np.uint64)),
            members=pack(members),
        )

    def adopt(self, shard, numbers, *, create=(), whole=False):
        request = AdoptRequest(
            header=self.header(shard),
            placement=self.placement(numbers, whole=whole),
            closed=ClosedSet().pack(),
            create=pack(np.array(list(create), np.int32)),
        )
        return self.services[shard].adopt(travelled("Shard.Adopt", request))

    def give(self, number, to, *, leisurely=False):
        """Order the owner of a block to give another shard a copy."""
        owner = self.sets[number][0]
        request = CopyRequest(header=self.header(owner), **self._named([number]), shard=to, leisurely=leisurely)
        self.services[owner].copy(travelled("Shard.Copy", request))

    def hand_over(self, number, to):
        self.order += 1
        owner = self.sets[number][0]
        request = HandOverRequest(header=self.header(owner), **self._named([number]), shard=to, order=self.order)
        self.services[owner].hand_over(travelled("Shard.HandOver", request))

    def reopen(self, number, *, order=None):
        owner = self.sets[number][0]
        named = self._named([number])
        request = ReopenRequest(
            header=self.header(owner), **named, term=1, order=self.order if order is None else order
        )
        self.services[owner].reopen(travelled("Shard.Reopen", request))

    def held(self, shard, number):
        """Return (generation, sequence) of what a shard has of a block."""
        request = HeldRequest(header=self.header(shard), blocks=pack(np.array([number], np.int32)))
        reply = self.services[shard].held(request)
        return int.from_bytes(reply.generations.data, "little"), int.from_bytes(reply.sequences.data, "little")

    def _named(self, numbers):
        return {
            "blocks": pack(np.array(numbers, np.int32)),
            "generations": pack(self.of[numbers].astype(np.uint64)),
        }

    def pump(self, source=None, to=None, *, times=1, lose_answer=False, kinds=(IMAGES, OPERATIONS)):
        """Send what shards have for each other, once or more often; return how many messages arrived."""
        arrived = 0
        for s, shard in self.shards.items():
            if s not in self.alive or source not in (None, s):
                continue
            for other in list(shard.leading.images) if IMAGES in kinds else ():
                take_turn(shard, other)
            for stream in _streams(shard, kinds):
                if stream.to.id not in self.alive or to not in (None, stream.to.id):
                    continue
                header = self.header(stream.to.id, sender=self.addresses[s].incarnation)
                message = message_of(shard, stream, header)
                if message is None:
                    continue
                for _ in range(times):
                    arrived += 1
                    try:
                        reply = self.services[stream.to.id].replicate(travelled("Shard.Replicate", message))
                    except PSError:
                        continue
                    if not lose_answer:
                        take_answer(shard, stream, reply)
        return arrived

    def settle(self):
        """Pump until nobody has anything to send, or gets anywhere."""
        for _ in range(100):
            before = [s.first for shard in self.shards.values() for s in _streams(shard)]
            if not self.pump():
                return
            if before == [s.first for shard in self.shards.values() for s in _streams(shard)]:
                return

    def reports(self, shard):
        """Return what a shard has to tell, as (told, shard, blocks)."""
        found = self.shards[shard].reports.waiting()
        return sorted((matter.told, matter.shard, numbers.tolist()) for matter, numbers, _ in found)

    def heard(self, shard):
        """Answer all that a shard has to tell."""
        for matter, numbers, generations in self.shards[shard].reports.waiting():
            reports = self.shards[shard].reports
            reports.answered(matter, numbers, generations, reports.term)

    def messages(self, split, group, *, raw=tuple(range(40)), value=1.0, dense=1.0, step=0):
        """Return the push of a group by shard, by the records."""
        self.owners = np.array([s[0] for s in self.sets], np.int32)
        gradients = {}
        for spec in self.spec.tables:
            keyset = group_keys(self.layout, self.routes(), spec.name, raw)
            values = np.full((len(keyset.keys), spec.dim), value, np.float32)
            gradients[spec.name] = RowGradients(keyset, values, 1.0)
        values = None if dense is None else np.full(self.layout.dense_size, dense, np.float32)
        cut = cut_push(self.layout, self.routes(), PushIdentity(split, group, step=step), gradients, values, 1.0)
        for message in cut:
            message.request.header.CopyFrom(self.header(message.shard.id, sender=9))
        return {m.shard.id: inlined(m.bulk) for m in cut}

    def push(self, split, group, **what):
        """Push a group everywhere; return by shard the answers, of which some may be pending."""
        return {s: self.services[s].push(m) for s, m in self.messages(split, group, **what).items() if s in self.alive}

    def push_to(self, shard, split, group):
        """Push a group to a shard that does not own all of it any more."""
        sets, self.sets = self.sets, [(shard,)] * self.layout.blocks
        message = self.messages(split, group)[shard]
        self.sets = sets
        return self.services[shard].push(message)

    def kill(self, shard):
        self.alive.discard(shard)


def _streams(shard, kinds=(IMAGES, OPERATIONS)):
    found = {IMAGES: shard.leading.images, OPERATIONS: shard.leading.streams}
    return [stream for kind in kinds for stream in found[kind].values()]


def done(answer):
    """Whether a push is acknowledged."""
    return not isinstance(answer, Pending) or answer.done


def result(answer):
    return answer.result() if isinstance(answer, Pending) else answer


def same(a, b, number):
    """Raise unless a block is the same on two shards."""
    one, other = (dataclasses.asdict(image_of(s, number)) for s in (a, b))
    for name, value in one.items():
        assert np.array_equal(value, other[name]) if isinstance(value, np.ndarray) else value == other[name], name


def moved(answer):
    assert done(answer)
    return unpack(result(answer).moved, np.int32, "moved").tolist()


def pair(shards=2, **changes):
    """All blocks are shard 0's, with a copy on shard 1."""
    job = Copies(spec_of(**changes), shards)
    job.begin([(0, 1)] * job.layout.blocks)
    return job


def pull_of(job, number):
    """Return the pull of a block of users from shard 0."""
    found = group_keys(job.layout, job.routes(), "user", np.arange(40, dtype=np.uint64))
    at = found.blocks.tolist().index(number)
    begin = int(found.counts[:at].sum())
    keys = found.keys[begin : begin + int(found.counts[at])]
    one = np.array([number], np.int32)
    message = TableKeys(table=0, keys=pack(keys), blocks=pack(one), counts=pack(found.counts[at : at + 1]))
    return PullRequest(header=job.header(0), tables=[message])
