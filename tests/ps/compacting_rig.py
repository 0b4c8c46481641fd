# SPDX-License-Identifier: Apache-2.0
"""Shards of a small job that make cuts in a folder and compact their chains, with what each cut has to hold."""

import json

import numpy as np
import rig

from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.spec import DenseSpec, TableSpec, to_json
from oarlock.proto.bulk import inlined
from oarlock.proto.shard_pb2 import CutRequest, WriteRequest

TABLES = (TableSpec("user", 2, rig.SGD, rig.ZEROS, 2),)
DENSE = (DenseSpec("b", (3,), rig.SGD, rig.ZEROS),)
LINKS = 4


class Job(rig.Job):
    """Shards that train and make cuts in ``root``."""

    def __init__(self, root, shards=2, *, links=LINKS, restore="", run=1):
        super().__init__(rig.spec_of(tables=TABLES, dense=DENSE), shards, run=run)
        for service in self.services.values():
            service.compacting._links = links
        self.root, self.links = root, links
        self.store = LocalStore(root)
        self.committed = 0
        self.group = 0
        self.place(restore=restore)

    def push(self, keys=range(3), value=1.0):
        routes = self.routes()
        keyset = rig.group_keys(self.layout, routes, "user", keys)
        rows = RowGradients(keyset, np.full((len(keyset.keys), 2), value, np.float32), 1.0)
        dense = np.ones(self.layout.dense_size, np.float32)
        for message in cut_push(self.layout, routes, PushIdentity(0, self.group), {"user": rows}, dense, 1.0):
            request = inlined(message.bulk)
            request.header.CopyFrom(self.header(message.shard.id))
            assert self.services[message.shard.id].push(request).applied
        self.group += 1

    def write_cut(self, cut):
        """Return a cut's manifest, which is written and not committed."""
        self.cut = cut
        entries = []
        for s, service in self.services.items():
            service.cut(CutRequest(header=self.header(s), cut=cut, committed=self.committed))
        self.wanted = by_block(self)
        for s, service in self.services.items():
            reply = service.write(WriteRequest(header=self.header(s), cut=cut, root=str(self.root)))
            entries += [BlockEntry(**e) for e in json.loads(reply.entries)]
        return Manifest(
            self.spec.job, self.run, cut, "2026-01-31T12:00:00Z", 7, tuple(to_json(t) for t in self.spec.tables),
            tuple(to_json(d) for d in self.spec.dense), "none:none", {}, (), ClosedSet(0), (0,), 0, 0, {}, {}, tuple(entries),
        )  # fmt: skip

    def make(self, cut, *, keys=range(3)):
        self.push(keys)
        manifest = self.write_cut(cut)
        self.store.commit(manifest)
        self.store.keep_last(2)
        self.committed = cut
        self.check(manifest)
        return manifest

    def check(self, manifest):
        """A cut holds what the shards had when it began."""
        self.store.verify(manifest)
        found = {}
        for entry in manifest.blocks:
            image = self.store.load_block(manifest, entry)
            found[entry.kind, entry.name, entry.block] = contents(image)
        assert found == self.wanted

    def compact(self):
        """Have all shards do what is due."""
        for service in self.services.values():
            service.compacting.committed(self.committed)
            while service.compacting.due:
                service.compacting.step()

    def end(self):
        for service in self.services.values():
            service.end()


def contents(image):
    order = np.argsort(image.keys)
    arrays = (image.keys, image.weights, image.state) if image.kind == "dense" else (
        image.keys[order], image.weights[order], image.state[order])  # fmt: skip
    return image.seq, image.marks, *(a.tobytes() for a in arrays)


def by_block(job):
    out = {}
    for shard in job.shards.values():
        for number in np.flatnonzero(shard.owned).tolist():
            image = rig.view.image_of(shard, number)
            out[image.kind, image.name, image.block] = contents(image)
    return out


def chains(manifest):
    return [[link.folder for link in entry.links] for entry in manifest.blocks if entry.kind == "rows"]
