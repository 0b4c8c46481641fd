# SPDX-License-Identifier: Apache-2.0
"""Pulls: rows and dense values, read beside pushes.

Invariant: nothing is changed, but for a rank's commit, and no block is locked for longer than its own rows are read. Called from
many threads.
"""

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.client.packed import encode_dense, encode_rows, packed
from oarlock.embedding.newer import Newer
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, pack
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import InvalidArgument, OutOfMemory, StalePlacement
from oarlock.proto.pending import Pending
from oarlock.proto.shard_pb2 import PullReply, PullRequest
from oarlock.proto.work import expects
from oarlock.ps.request import (
    Keys,
    read_codecs,
    read_dense_codec,
    read_dense_numbers,
    read_kept,
    read_keys,
    refuse_parts,
)

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# Rows of answers whose memory is kept for the next ones, of at most 16 MiB each (proto/buffers.py).
MOST_ANSWERS = 8

_NONE = np.empty(0, np.int32)
_NO_VERSIONS = np.empty(0, np.uint32)


class Pulls:
    """Answers the pulls of ``shard``."""

    def __init__(self, shard: "Shard") -> None:
        self._shard = shard
        self._counting = Lock()
        self._answers = Buffers(MOST_ANSWERS)

    def answer(self, sent: PullRequest | Bulk) -> PullReply | Bulk | Pending:
        """Answer with the rows and dense values asked for, in the forms asked for; creates nothing. A Bulk gets a Bulk."""
        shard, layout = self._shard, self._shard.layout
        request, parts = opened(sent)
        beside: list[Part] | None = [] if isinstance(sent, Bulk) else None
        reply = PullReply(pushes=shard.counters["pushes"])
        refuse_parts(layout, len(request.tables))
        asked = [read_keys(layout, message, parts) for message in request.tables]
        kept = [read_kept(layout, m, keys, parts) for m, keys in zip(request.tables, asked, strict=True)]
        numbers = read_dense_numbers(layout, request.dense, parts)
        forms = read_codecs(layout, request)
        dense_form = read_dense_codec(request.dense_codec) if request.HasField("dense_codec") else None
        # Known before any of it is allocated: a small request may ask for an enormous answer.
        dense_values = int(layout.lengths_of(numbers).sum())
        values = dense_values + sum(len(keys.keys) * layout.tables[keys.table].dim for keys in asked)
        # A row of a cache comes with its position and version.
        values += 2 * sum(len(versions) for versions in kept if versions is not None)
        if values * 4 > MAX_MESSAGE_BYTES:
            raise OutOfMemory(
                f"the rows asked for are {values * 4} bytes, over the limit of {MAX_MESSAGE_BYTES} bytes in one message: "
                "ask for fewer at once"
            )
        if request.rank:
            if shard.staged is None:
                raise InvalidArgument(f"a pull of rank {request.rank - 1}, but the job's mode has no ranks")
            without = shard.staged.answer(request)
            if without is not None:
                return without if beside is None else Bulk(without, beside)
        elsewhere = self._elsewhere(asked, numbers)
        if elsewhere is not None:
            return elsewhere
        # Encoded rows lie beside those that they were made of.
        expects(values * (4 if forms is None else 8))
        # Rows of before a table went back to a checkpoint have versions that say nothing of those after it.
        believed = request.header.generation >= shard.unbroken
        found = [
            self._rows(keys, versions if believed or versions is None else np.zeros_like(versions), message.bound)
            for keys, versions, message in zip(asked, kept, request.tables, strict=True)
        ]
        travelled = 0
        for i, newer in enumerate(found):
            if forms is None:
                reply.rows.append(pack(newer.rows, beside))
                travelled += newer.rows.nbytes
            else:
                encoded = encode_rows(forms[i], newer.rows)
                reply.packed.append(packed(forms[i], encoded, newer.rows.size, beside))
                travelled += reply.packed[i].payload.shape[0]
        if any(versions is not None for versions in kept):
            reply.positions.extend(pack(newer.positions, beside) for newer in found)
            reply.versions.extend(pack(newer.versions, beside) for newer in found)
        self._owns(numbers)
        dense = self._answers.array((dense_values,), np.float32)
        shard.dense_group.pull((numbers - layout.dense_base).astype(np.int64), dense)
        if dense_form is None:
            reply.dense.CopyFrom(pack(dense, beside))
            travelled += dense.nbytes
        else:
            encoded = encode_dense(dense_form, dense, layout.lengths_of(numbers).tolist())
            reply.packed_dense.CopyFrom(packed(dense_form, encoded, dense.size, beside))
            travelled += reply.packed_dense.payload.shape[0]
        with self._counting:
            shard.counters["pull_bytes"] += travelled
            shard.counters["pull_bytes_saved"] += sum(newer.rows.nbytes for newer in found) + dense.nbytes - travelled
            shard.counters["pulls"] += 1
            for keys, newer in zip(asked, found, strict=True):
                shard.counters["rows_pulled"] += len(newer.rows)
                shard.rows_pulled[keys.table] += len(newer.rows)
                shard.rows_asked[keys.table] += len(keys.keys)
        if request.rank and shard.staged is not None and (passed := shard.staged.after(request, reply)) is not None:
            return passed if beside is None else Bulk(passed, [])
        return reply if beside is None else Bulk(reply, beside)

    def _rows(self, keys: Keys, kept: NDArray[np.uint32] | None, bound: int) -> Newer:
        """Return the rows of ``keys``: those that who keeps these versions must get, or all (None), without versions."""
        self._owns(keys.numbers)
        table = self._shard.tables[keys.table]
        table.check(keys.keys, keys.blocks, keys.counts)
        if kept is not None:
            return table.pull_newer(keys.keys, keys.blocks, keys.counts, kept, bound=bound)
        rows = self._answers.array((len(keys.keys), table.spec.dim), np.float32)
        table.pull(keys.keys, keys.blocks, keys.counts, rows)
        return Newer(_NONE, rows, _NO_VERSIONS)

    def _elsewhere(self, asked: Sequence[Keys], dense: NDArray[np.int32]) -> Pending | None:
        """Return what stands for an answer about blocks that are being handed over; StalePlacement for others not owned here."""
        holdings = self._shard.holdings
        owned = holdings.owned
        if all(owned[keys.numbers].all() for keys in asked) and owned[dense].all():
            return None
        numbers = np.concatenate([dense, *(keys.numbers for keys in asked)])
        lacking = numbers[~owned[numbers]]
        if len(lacking) and not holdings.closed:
            # Whoever makes blocks holds the lock for long, and nobody is to wait for that.
            raise _stale(int(lacking[0]))
        with self._shard.push_lock:
            lacking = numbers[~owned[numbers]]
            if not len(lacking):
                return None
            error = _stale(int(lacking[0]))
            pending = self._shard.closing.refuse(lacking, error)
        if pending is None:
            raise error
        return pending

    def _owns(self, numbers: NDArray[np.int32]) -> None:
        elsewhere = numbers[~self._shard.holdings.owned[numbers]]
        if len(elsewhere):
            raise _stale(int(elsewhere[0]))


def _stale(block: int) -> StalePlacement:
    return StalePlacement(f"block {block} is not on this shard: fetch the placement", block=block)
