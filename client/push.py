# SPDX-License-Identifier: Apache-2.0
"""Push: a group's gradients, one request per shard, under the identity (split, group).

Invariant: the bytes of a block's part are made once, before the first send, or are the caller's, who keeps them as they are; a
block that has to go elsewhere takes its own bytes out of the message that was refused. So a retry never sees a buffer that was
reused meanwhile.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oarlock.client.exchange import exchange, shard_of
from oarlock.client.layout import Layout
from oarlock.client.membership import Membership
from oarlock.client.packed import (
    CHUNK,
    NO_LIMIT,
    Encoded,
    opened_dense,
    opened_rows,
    packed,
    read_form,
)
from oarlock.client.pieces import MESSAGE_BYTES, by_owner, dense_by_owner
from oarlock.client.pull import table_number
from oarlock.client.router import Routes, ShardAddress
from oarlock.embedding.keys import KeySet
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.store import keeps
from oarlock.proto.arrays import Part, pack, unpack
from oarlock.proto.buffers import Buffers
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import Malformed
from oarlock.proto.shard_pb2 import DenseGradients, PushRequest, TableGradients


@dataclass(frozen=True)
class RowGradients:
    """Gradients of a batch for one table: float32[u, dim], one per unique key of ``keys``, and the learning rate.

    ``occurrences`` uint32[u] and ``clicks`` float32[u] go along where a policy of the table reads them; None: once, none.
    ``kept``: nobody writes to any of these arrays until the push was acknowledged, or failed, so they are sent from where they
    lie; others are copied.
    """

    keys: KeySet
    gradients: NDArray[np.float32]
    rate: float
    occurrences: NDArray[np.uint32] | None = None
    clicks: NDArray[np.float32] | None = None
    kept: bool = False


class Encoder(Protocol):
    """Brings a group's gradients into the form in which they travel; of each table, and of the dense parameters, once."""

    def rows(self, number: int, part: RowGradients) -> tuple[RowGradients, Encoded | None]: ...

    def dense(self, gradients: NDArray[np.float32]) -> tuple[NDArray[np.float32], Encoded | None]: ...


def reads_occurrences(spec: TableSpec) -> bool:
    """Tell whether a policy of the table reads how often each key came."""
    kept = keeps(spec)
    return kept.occurrences or kept.score or spec.admission.kind == "probability"


@dataclass(frozen=True)
class PushIdentity:
    """What a push is known by, (split, group), and what an update may use of the time it was made: ``step``, ssp's ``number``.

    Under sync it is known by (step + 1, rank); ``rank`` counts from 1 here, 0: none.
    ``seen``: pushes that each shard had applied when it answered the pull that fed the group.
    """

    split: int
    group: int
    step: int = 0
    number: int = 0
    seen: Mapping[int, int] = field(default_factory=dict)
    rank: int = 0


@dataclass
class PushCounts:
    """What became of a push: blocks that it changed, blocks that had it already, gradients refused as not finite."""

    applied: int = 0
    skipped: int = 0
    refused: int = 0


@dataclass(frozen=True)
class PushMessage:
    """A request on its way to one shard; only its header changes when it is sent again."""

    shard: ShardAddress
    request: PushRequest
    parts: list[Part]
    numbers: NDArray[np.int32]

    @property
    def bulk(self) -> Bulk:
        """What travels."""
        return Bulk(self.request, self.parts)


# Annotations of a function within a function are worked out at every call: names cost less there.
_Blocks = NDArray[np.int32]
_Left = list[tuple[PushMessage, _Blocks]]


@dataclass(frozen=True)
class _RowPart:
    """``gradients`` as float32, or ``encoded``."""

    table: int
    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    gradients: NDArray[np.float32] | None
    rate: float
    occurrences: NDArray[np.uint32] | None
    clicks: NDArray[np.float32] | None
    encoded: Encoded | None = None
    kept: bool = False


@dataclass(frozen=True)
class _DensePart:
    numbers: NDArray[np.int32]
    gradients: NDArray[np.float32] | None
    rate: float
    encoded: Encoded | None = None


@dataclass
class _Filling:
    request: PushRequest
    parts: list[Part] = field(default_factory=list)
    numbers: list[NDArray[np.int32]] = field(default_factory=list)
    volume: int = 0


def _as_it_is(values: NDArray[Any]) -> NDArray[Any]:
    return values


class _Packer:
    """Packs parts into one message per shard, or more where a message would be over the limit."""

    def __init__(self, layout: Layout, routes: Routes, identity: PushIdentity, limit: int, copies: Buffers) -> None:
        self._copies = copies
        self._layout = layout
        self._routes = routes
        self._identity = identity
        self._limit = limit
        self._filling: dict[int, _Filling] = {}
        self._full: list[PushMessage] = []

    def _message(self, shard: int, volume: int) -> _Filling:
        found = self._filling.get(shard)
        if found is not None and found.volume + volume > self._limit:
            self._close(shard)
            found = None
        if found is None:
            known = self._identity
            request = PushRequest(
                split=known.split, group=known.group, step=known.step, number=known.number, rank=known.rank
            )
            if shard in known.seen:
                request.seen = 1 + known.seen[shard]
            found = self._filling[shard] = _Filling(request)
        found.volume += volume
        return found

    def _close(self, shard: int) -> None:
        done = self._filling.pop(shard)
        numbers = np.concatenate(done.numbers)
        self._full.append(PushMessage(shard_of(self._routes, shard), done.request, done.parts, numbers))

    def rows(self, part: _RowPart, wanted: NDArray[np.bool_] | None) -> None:
        numbers = self._layout.table_base[part.table] + part.blocks
        beside = (part.occurrences is not None) + (part.clicks is not None)
        dim = self._layout.tables[part.table].dim
        pieces = by_owner(
            part.table,
            part.blocks,
            part.counts,
            self._routes.owners[numbers],
            name=self._layout.tables[part.table].name,
            # As float32, whatever it travels as: so much it is once it was decoded.
            row_bytes=4 * (dim + beside),
            wanted=None if wanted is None else wanted[numbers],
            limit=self._limit,
        )
        for shard, piece in pieces:
            message = self._message(shard, piece.volume)
            parts, at = message.parts, piece.rows
            # Rows that are picked one by one are a copy already.
            copy = self._copies.copy if isinstance(at, slice) and not part.kept else _as_it_is
            found = TableGradients(
                keys=piece.keys(part.keys, parts),
                rate=part.rate,
                occurrences=None if part.occurrences is None else pack(copy(part.occurrences[at]), parts),
                clicks=None if part.clicks is None else pack(copy(part.clicks[at]), parts),
            )
            if part.gradients is not None:
                found.gradients.CopyFrom(pack(copy(part.gradients[at]), parts))
            elif part.encoded is not None:
                # Made for this push, so that nobody writes to it any more.
                form, data = part.encoded
                found.packed.CopyFrom(packed(form, data[at], piece.size * dim, parts))
            message.request.tables.append(found)
            message.numbers.append(self._layout.table_base[part.table] + piece.blocks)

    def dense(self, part: _DensePart, wanted: NDArray[np.bool_] | None) -> None:
        lengths = self._layout.lengths_of(part.numbers)
        chosen = np.arange(len(part.numbers)) if wanted is None else np.flatnonzero(wanted[part.numbers])
        candidates = part.numbers[chosen]
        for shard, positions, volume in dense_by_owner(
            self._layout, candidates, self._routes.owners[candidates], limit=self._limit
        ):
            mine = chosen[positions]
            message = self._message(shard, volume)
            numbers = part.numbers[mine]
            found = DenseGradients(blocks=pack(numbers), rate=part.rate)
            if part.gradients is not None:
                found.gradients.CopyFrom(pack(_picked(part.gradients, lengths, mine, self._copies), message.parts))
            elif part.encoded is not None:
                form, data = part.encoded
                sizes = np.array([form.block_bytes(length) for length in lengths.tolist()], np.int64)
                taken = _picked(data, sizes, mine, self._copies)
                found.packed.CopyFrom(packed(form, taken, int(lengths[mine].sum()), message.parts))
            message.request.dense.append(found)
            message.numbers.append(numbers)

    def messages(self) -> list[PushMessage]:
        for shard in list(self._filling):
            self._close(shard)
        return self._full


def _picked(
    values: NDArray[Any], lengths: NDArray[np.int64], chosen: NDArray[np.int64], copies: Buffers
) -> NDArray[Any]:
    """Return a copy of the chosen pieces of ``values``, which lie one behind the other."""
    if len(chosen) == len(lengths):
        return copies.copy(values)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    out = copies.array((int(lengths[chosen].sum()),), values.dtype)
    at = 0
    for start, end in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
        out[at : at + end - start] = values[start:end]
        at += end - start
    return out


def cut_push(
    layout: Layout,
    routes: Routes,
    identity: PushIdentity,
    gradients: Mapping[str, RowGradients],
    dense: NDArray[np.float32] | None,
    dense_rate: float,
    *,
    limit: int = MESSAGE_BYTES,
    copies: Buffers | None = None,
    encoder: Encoder | None = None,
) -> list[PushMessage]:
    """Make the messages of a push, each within ``limit`` bytes; the gradients are copied into them, in memory of ``copies``,
    unless they are kept.

    Or they are encoded by ``encoder``; without one all values travel as float32.
    """
    packer = _Packer(layout, routes, identity, limit, copies or Buffers(0))
    for name, part in gradients.items():
        for what, beside in (("occurrences", part.occurrences), ("clicks", part.clicks)):
            if beside is not None and beside.shape != part.keys.keys.shape:
                raise Malformed(f"table {name}: {what} have shape {beside.shape}, expected {part.keys.keys.shape}")
        number, encoded = table_number(layout, name), None
        pushed = part
        if encoder is not None:
            pushed, encoded = encoder.rows(number, part)
        if len(pushed.keys.keys):
            packer.rows(
                _RowPart(
                    number,
                    pushed.keys.keys,
                    pushed.keys.blocks,
                    pushed.keys.counts,
                    pushed.gradients if encoded is None else None,
                    pushed.rate,
                    pushed.occurrences,
                    pushed.clicks,
                    encoded,
                    pushed.kept,
                ),
                None,
            )
    if dense is not None and layout.dense_blocks:
        numbers = np.arange(layout.dense_base, layout.blocks, dtype=np.int32)
        values, encoded = (dense, None) if encoder is None else encoder.dense(dense)
        packer.dense(_DensePart(numbers, values if encoded is None else None, dense_rate, encoded), None)
    return packer.messages()


def recut_push(layout: Layout, routes: Routes, left: list[tuple[PushMessage, NDArray[np.int32]]]) -> list[PushMessage]:
    """Make new messages of the blocks left over from each message, out of its own bytes."""
    out: list[PushMessage] = []
    for message, blocks in left:
        wanted = np.zeros(layout.blocks, np.bool_)
        wanted[blocks] = True
        known, parts = message.request, message.parts
        identity = PushIdentity(known.split, known.group, known.step, known.number, rank=known.rank)
        packer = _Packer(layout, routes, identity, MESSAGE_BYTES, Buffers(0))
        for sent in message.request.tables:
            keys = unpack(sent.keys.keys, np.uint64, "keys", parts=parts)
            plain, encoded = not sent.HasField("packed"), None
            if not plain:
                dim = layout.tables[sent.keys.table].dim
                form = read_form(sent.packed.codec, dim, "gradients", NO_LIMIT)
                encoded = Encoded(form, opened_rows(form, sent.packed, len(keys), dim, "gradients", parts))
            part = _RowPart(
                sent.keys.table,
                keys,
                unpack(sent.keys.blocks, np.int32, "blocks", parts=parts),
                unpack(sent.keys.counts, np.int32, "counts", parts=parts),
                unpack(sent.gradients, np.float32, "gradients", dims=2, parts=parts) if plain else None,
                sent.rate,
                unpack(sent.occurrences, np.uint32, "occurrences", parts=parts)
                if sent.HasField("occurrences")
                else None,
                unpack(sent.clicks, np.float32, "clicks", parts=parts) if sent.HasField("clicks") else None,
                encoded,
                kept=True,
            )
            packer.rows(part, wanted)
        for each in message.request.dense:
            numbers = unpack(each.blocks, np.int32, "dense blocks")
            if each.HasField("packed"):
                form = read_form(each.packed.codec, CHUNK, "dense gradients", NO_LIMIT)
                lengths = layout.lengths_of(numbers).tolist()
                data = opened_dense(form, each.packed, lengths, "dense gradients", parts)
                packer.dense(_DensePart(numbers, None, each.rate, Encoded(form, data)), wanted)
            else:
                values = unpack(each.gradients, np.float32, "dense gradients", parts=parts)
                packer.dense(_DensePart(numbers, values, each.rate), wanted)
        out.extend(packer.messages())
    return out


async def push(member: Membership, messages: list[PushMessage]) -> PushCounts:
    """Send the messages until every block answered that it has its part; return what became of them."""
    counts = PushCounts()
    # Of the moment at which it begins, whatever is heard of cuts before the last try: it may be in some views and not in others.
    cut = member.gate.cut

    async def send(message: PushMessage, timeout: float) -> _Blocks:
        request = message.request
        request.header.CopyFrom(member.header(message.shard.incarnation))
        request.header.cut = cut
        sent = time.monotonic()
        answered = await member.transport.call(
            message.shard.address, "Shard.Push", message.bulk, timeout_seconds=timeout
        )
        reply, parts = opened(answered)
        counts.applied += reply.applied
        counts.skipped += reply.skipped
        counts.refused += reply.refused
        moved = unpack(reply.moved, np.int32, "moved blocks", parts=parts).astype(np.int32)
        if len(moved) and not np.isin(moved, message.numbers).all():
            raise Malformed(f"shard {message.shard.id} answered that blocks moved which were not sent to it")
        member.acknowledged.note(message.numbers, moved)
        if member.push_notes is not None:
            member.push_notes.note(sent, request, message.shard.incarnation, message.numbers, moved)
        if reply.HasField("where"):
            member.learn(reply.where)
        return moved

    def recut(newer: Routes, left: _Left) -> list[PushMessage]:
        return recut_push(member.layout, newer, left)

    await exchange(member, messages, send, recut)
    return counts
