# SPDX-License-Identifier: Apache-2.0
"""A shard that does not care how often a push comes: what the real one is compared with. For measurements only.

Left out: the check of the header, the check for repeated blocks, the limits of group and split, the closed set, the marks, the
dense blocks' sequence, and the counts of applied and skipped blocks. Invariant: all else is the same, so a push that comes once
leaves the same rows and dense values as it does on a Shard.
"""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import JobSpec
from oarlock.proto.arrays import pack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.common_pb2 import Header
from oarlock.proto.shard_pb2 import PushReply, PushRequest
from oarlock.ps.identity import Identity
from oarlock.ps.request import DensePush, RowPush, read_dense, read_rows, refuse_parts
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard


class UnmarkedShard(Shard):
    """Applies whatever comes, as often as it comes."""

    def push(self, sent: PushRequest | Bulk) -> PushReply:
        layout = self.layout
        request, parts = opened(sent)
        refuse_parts(layout, len(request.tables) + len(request.dense))
        rows = [read_rows(layout, message, parts) for message in request.tables]
        dense = [read_dense(layout, message, parts) for message in request.dense]
        with self.push_lock:
            moved: list[NDArray[np.int32]] = []
            for part in rows:
                here = self.owned[part.keys.numbers]
                moved.append(part.keys.numbers[~here])
                keys, _ = part.keys.only(here)
                self.tables[keys.table].check(keys.keys, keys.blocks, keys.counts, unique=True)
            moved.extend(p.numbers[~self.owned[p.numbers]] for p in dense)
            reply = PushReply(moved=pack(np.concatenate([np.empty(0, np.int32), *moved]).astype(np.int32)))
            for part in rows:
                self._add_rows(part, reply)
            for each in dense:
                self._add_dense(each, reply)
            self.counters["pushes"] += 1
        return reply

    def _add_rows(self, part: RowPush, reply: PushReply) -> None:
        keys, gradients = part.keys, part.gradients
        here = self.owned[keys.numbers]
        if not here.any():
            return
        if not here.all():
            keys, chosen = keys.only(here)
            gradients = gradients[chosen]
        done = self.tables[keys.table].push(keys.keys, keys.blocks, keys.counts, gradients, rate=part.rate)
        reply.refused += done.refused
        self.counters["rows_pushed"] += len(keys.keys)
        self.counters["rows_refused"] += done.refused

    def _add_dense(self, part: DensePush, reply: PushReply) -> None:
        here = self.owned[part.numbers]
        blocks = (part.numbers[here] - self.layout.dense_base).astype(np.int64)
        found = self.dense_group.push(blocks, part.starts[here], part.gradients, rate=part.rate)
        reply.refused += int(found.sum())
        self.counters["dense_refused"] += int(found.sum())


class Anybody(Identity):
    """Takes every message for its own."""

    def check(self, header: Header) -> None:
        pass


class UnmarkedService(ShardService):
    """Answers everybody, with an UnmarkedShard."""

    def configure(self, spec: JobSpec, identity: Identity, *, holds_lease: Callable[[], bool] = lambda: True) -> Shard:
        super().configure(spec, identity, holds_lease=holds_lease)
        shard = UnmarkedShard(spec)
        self._joined = (Anybody(**asdict(identity)), shard)
        return shard
