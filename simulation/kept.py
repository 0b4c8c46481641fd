# SPDX-License-Identifier: Apache-2.0
"""The rows that workers keep, tested at every pull: what does not come lacks at most as many updates as was said.

Invariant: how often a row was updated is counted by its values, which every push that was applied raises, and not by the versions
that are tested. A shard that answers and a check of its answer are one instant.
"""

from typing import Any

import numpy as np

from oarlock.client.job import JobSpec
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.arrays import unpack
from oarlock.ps.shard import Shard
from oarlock.simulation.data import KEYS


class Kept:
    """Follows the counting table of one job. ``violation`` of a pull is said in words, empty if there is none."""

    def __init__(self, spec: JobSpec) -> None:
        table = spec.tables[0]
        # Whether there is anything to follow.
        self.follows = table.cache is not None
        order = np.arange(table.blocks, dtype=np.int32)
        bits = table.blocks.bit_length() - 1
        self._all = KeySorter().build(np.arange(KEYS, dtype=np.uint64), table_salt(table.name), bits, order)
        self._values = np.zeros(KEYS, np.float32)
        self._updates = np.zeros(KEYS, np.int64)

    def pushed(self, shard: Shard) -> None:
        """After a shard handled a push, whatever came of it."""
        if not self.follows:
            return
        here = shard.owned[self._all.blocks]
        if not here.any():
            return
        keys = self._all.keys[np.repeat(here, self._all.counts)]
        rows = np.empty((len(keys), 1), np.float32)
        shard.tables[0].pull(keys, self._all.blocks[here], self._all.counts[here], rows)
        at = keys.astype(np.int64)
        self._updates[at] += rows[:, 0] != self._values[at]
        self._values[at] = rows[:, 0]

    def violation(self, request: Any, reply: Any) -> str:
        """Return what is wrong with a shard's answer to a pull, in words."""
        for i, asked in enumerate(request.tables):
            if not self.follows or asked.table or not asked.HasField("versions"):
                continue
            keys = unpack(asked.keys, np.uint64, "keys").astype(np.int64)
            told = unpack(asked.versions, np.uint32, "versions").astype(np.int64)
            came = unpack(reply.positions[i], np.int32, "positions")
            versions = unpack(reply.versions[i], np.uint32, "versions").astype(np.int64)
            if not np.array_equal(versions, self._updates[keys[came]]):
                return f"rows of keys {keys[came].tolist()} came with versions {versions.tolist()}"
            left = np.setdiff1d(np.arange(len(keys)), came)
            lacking = self._updates[keys[left]] - told[left]
            wrong = (told[left] == 0) | (lacking < 0) | (lacking > asked.bound)
            if wrong.any():
                at = int(wrong.argmax())
                return (
                    f"the row of key {keys[left][at]} did not come; the one that is kept lacks {lacking[at]} updates, "
                    f"with a bound of {asked.bound}"
                )
        return ""
