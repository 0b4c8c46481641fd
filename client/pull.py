# SPDX-License-Identifier: Apache-2.0
"""Pull: the rows of a batch's unique keys and the dense parameters, one request per shard.

Invariant: every wanted row is written once by the answer of its owner; a pull changes nothing on a shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oarlock.client.caches import Asked, Caches
from oarlock.client.everyone import is_there
from oarlock.client.exchange import exchange, shard_of
from oarlock.client.forms import Forms
from oarlock.client.layout import Layout
from oarlock.client.membership import Membership
from oarlock.client.packed import Form, decode_rows, unpack_dense
from oarlock.client.pieces import MESSAGE_BYTES, Piece, by_owner, dense_by_owner
from oarlock.client.probe import Probe
from oarlock.client.router import Routes, ShardAddress
from oarlock.client.stage import Commit
from oarlock.embedding.keys import KeySet
from oarlock.proto.arrays import Part, pack, unpack, view_of
from oarlock.proto.bulk import Bulk, Landing, opened
from oarlock.proto.errors import Malformed, UnknownTable
from oarlock.proto.shard_pb2 import Packed, PullReply, PullRequest

_NONE = np.empty(0, np.int32)
# As it travels, and so not on a machine of another order of bytes.
_VALUES = np.dtype("<f4")
# Annotations of a function within a function are worked out at every call: names cost less there.
_Blocks = NDArray[np.int32]


@dataclass
class PullMessage:
    """Pieces of tables (by name) and dense blocks for one shard; ``volume`` is their size in bytes."""

    shard: ShardAddress
    layout: Layout
    volume: int = 0
    pieces: list[tuple[str, Piece]] = field(default_factory=list)
    dense: NDArray[np.int32] = field(default_factory=lambda: _NONE)

    @property
    def numbers(self) -> NDArray[np.int32]:
        parts = [self.layout.table_base[p.table] + p.blocks for _, p in self.pieces]
        return np.concatenate([*parts, self.dense])


_Left = list[tuple[PullMessage, _Blocks]]


def table_number(layout: Layout, name: str) -> int:
    """Return a table's position in the job's list."""
    found = layout.table_index.get(name)
    if found is None:
        raise UnknownTable(
            f"this job has no table {name!r}; it has: {', '.join(layout.table_index) or 'none'}", table=name
        )
    return found


def dense_runs(layout: Layout, numbers: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return (offset, length) of dense blocks in the vector of all dense parameters; neighbours in one run."""
    offsets = layout.dense_offsets[numbers - layout.dense_base]
    ends = offsets + layout.lengths_of(numbers)
    breaks = np.flatnonzero(offsets[1:] != ends[:-1]) + 1
    firsts, lasts = [0, *breaks.tolist()], [*breaks.tolist(), len(ends)]
    return [(int(offsets[f]), int(ends[e - 1] - offsets[f])) for f, e in zip(firsts, lasts, strict=True) if e]


def cut_pull(
    layout: Layout,
    routes: Routes,
    keys: Mapping[str, KeySet],
    dense: NDArray[np.int32],
    wanted: NDArray[np.bool_] | None = None,
    *,
    limit: int = MESSAGE_BYTES,
) -> list[PullMessage]:
    """Cut a pull into messages by owner: all blocks, or those marked in ``wanted`` bool[blocks of the job].

    Neither a message nor its answer is over ``limit`` bytes: both of them, without versions, are counted as one, so there is room
    for versions.
    """
    filling: dict[int, PullMessage] = {}
    full: list[PullMessage] = []

    def message_for(shard: int, volume: int) -> PullMessage:
        found = filling.get(shard)
        if found is None or found.volume + volume > limit:
            if found is not None:
                full.append(found)
            found = filling[shard] = PullMessage(shard_of(routes, shard), layout)
        found.volume += volume
        return found

    for name, keyset in keys.items():
        table = table_number(layout, name)
        numbers = layout.table_base[table] + keyset.blocks
        for shard, piece in by_owner(
            table,
            keyset.blocks,
            keyset.counts,
            routes.owners[numbers],
            name=name,
            row_bytes=4 * layout.tables[table].dim,
            wanted=None if wanted is None else wanted[numbers],
            limit=limit,
        ):
            message_for(shard, piece.volume).pieces.append((name, piece))
    if wanted is not None:
        dense = dense[wanted[dense]]
    if not len(dense):
        return full + list(filling.values())
    for shard, positions, volume in dense_by_owner(layout, dense, routes.owners[dense], limit=limit):
        # A shard's second run of dense blocks never fits beside its first, so none is overwritten.
        message_for(shard, volume).dense = dense[positions]
    return full + list(filling.values())


async def pull(
    member: Membership,
    routes: Routes,
    keys: Mapping[str, KeySet],
    rows: Mapping[str, NDArray[np.float32]],
    dense: NDArray[np.float32] | None,
    number: int = 0,
    forms: Forms | None = None,
    caches: Caches | Probe | None = None,
    commit: Commit | None = None,
) -> dict[int, int]:
    """Fill ``rows[table]`` float32[u, dim] in the order of the unique keys, and ``dense`` float32[P] if given.

    ``forms``: in which forms to ask for them; None: all as float32. Of tables in ``caches`` only those rows come that are not
    kept there, or are too old. ``commit``: of a rank, which goes to every shard. Return how many
    pushes each shard had applied, by its number: when the oldest of its answers was made.
    """
    seen: dict[int, int] = {}
    layout = member.layout
    numbers = np.arange(layout.dense_base, layout.blocks, dtype=np.int32) if dense is not None else _NONE
    asked = caches.ask(member.run, routes.generation, keys, rows) if caches is not None else None

    async def send(message: PullMessage, timeout: float) -> _Blocks:
        beside: list[Part] = []
        request = PullRequest(
            header=member.header(message.shard.incarnation),
            tables=[piece.keys(keys[name].keys, beside) for name, piece in message.pieces],
            dense=pack(message.dense, beside),
            number=number,
        )
        formed = _ask_for_forms(request, message, forms, dense is not None)
        if asked is not None:
            for made, (name, piece) in zip(request.tables, message.pieces, strict=True):
                if name in asked:
                    asked.request(request.header, name, piece, made, beside)
        lands = landing(message, rows, dense) if forms is None and asked is None else None
        sent = Bulk(request, beside, lands)
        if commit is None:
            answered = await member.transport.call(message.shard.address, "Shard.Pull", sent, timeout_seconds=timeout)
        else:
            answered = await commit.ask(member, message.shard, sent, timeout)
        reply, parts = opened(answered)
        _take_rows(reply, message, rows, formed, asked, parts)
        if dense is not None:
            _scatter(layout, message.dense, _dense_values(reply, message, forms, parts), dense)
        seen[message.shard.id] = min(seen.get(message.shard.id, reply.pushes), reply.pushes)
        return _NONE

    def recut(newer: Routes, left: _Left) -> list[PullMessage]:
        wanted = np.zeros(layout.blocks, np.bool_)
        for _, blocks in left:
            wanted[blocks] = True
        messages = cut_pull(layout, newer, keys, numbers, wanted)
        # Of a commit: those that ask for nothing.
        bare = [m for m, _ in left if not m.pieces and not len(m.dense) and is_there(newer, m.shard)]
        if commit is not None:
            # Who came since this began may hold up what others wait for, so it is told before all of them have answered.
            asked_for = {message.shard.id for message in messages}
            bare += [PullMessage(s, layout) for s in commit.strangers(newer) if s.id not in asked_for]
        return messages + bare

    def to_all(commit: Commit, newest: Routes, messages: list[PullMessage]) -> list[PullMessage]:
        asked_for = {message.shard.id for message in messages}
        return messages + [PullMessage(s, layout) for s in commit.missing(newest) if s.id not in asked_for]

    messages = cut_pull(layout, routes, keys, numbers)
    await exchange(member, messages if commit is None else to_all(commit, routes, messages), send, recut)
    while commit is not None and (messages := to_all(commit, await commit.newest(member), [])):
        # By a placement that came meanwhile.
        await exchange(member, messages, send, recut)
    if asked is not None:
        asked.keep()
    return seen


def _ask_for_forms(request: PullRequest, message: PullMessage, forms: Forms | None, dense: bool) -> list[Form] | None:
    """Write into a request in which forms its values are to travel; return those of its pieces, None if all are float32."""
    if forms is None:
        return None
    if dense and not forms.pull_dense.plain:
        request.dense_codec.CopyFrom(forms.pull_dense.message())
    asked = [forms.pulls[piece.table] for _, piece in message.pieces]
    if all(form.plain for form in asked):
        return None
    request.codecs.extend(form.message() for form in asked)
    return asked


def _take_rows(
    reply: PullReply,
    message: PullMessage,
    rows: Mapping[str, NDArray[np.float32]],
    formed: list[Form] | None,
    asked: Asked | None,
    parts: Sequence[Part],
) -> None:
    """Write the rows of an answer to where they belong. A shard that knows no codecs answers as float32."""
    layout, who = message.layout, f"shard {message.shard.id}"
    came = reply.packed if formed is not None and len(reply.packed) else reply.rows
    if len(came) != len(message.pieces):
        raise Malformed(f"{who} answered {len(came)} tables of {len(message.pieces)}")
    for i, (name, piece) in enumerate(message.pieces):
        dim, what = layout.tables[piece.table].dim, f"rows of {name}"
        form = None if came is reply.rows or formed is None else formed[i]
        if asked is not None and name in asked:
            positions, versions = _newer(reply, len(came), i, piece, name, parts)
            found = _rows(reply, i, form, np.empty((len(positions), dim), np.float32), who, what, parts)
            asked.take(name, piece, positions, versions, found)
        elif form is not None and isinstance(piece.rows, slice):
            _rows(reply, i, form, rows[name][piece.rows], who, what, parts)
        else:
            target = np.empty((piece.size if form is not None else 0, dim), np.float32)
            found = _rows(reply, i, form, target, who, what, parts)
            if len(found) != piece.size:
                raise Malformed(f"{who} answered {len(found)} {what}, asked for {piece.size}")
            # They may have been received where they belong.
            if not isinstance(piece.rows, slice) or not np.may_share_memory(found, rows[name]):
                rows[name][piece.rows] = found


def landing(
    message: PullMessage, rows: Mapping[str, NDArray[np.float32]], dense: NDArray[np.float32] | None
) -> Landing:
    """Return who says where the values of an answer are to be received: where they belong, if those of a piece, or all dense
    blocks of the message, are side by side."""

    def land(reply: PullReply, lengths: Sequence[int]) -> list[memoryview | None]:
        told: list[memoryview | None] = [None] * len(lengths)

        def tell(part: int, target: NDArray[np.float32]) -> None:
            # Whatever is wrong with the answer is said by who reads it afterwards.
            fits = target.dtype == _VALUES and target.flags.c_contiguous and target.flags.writeable
            if 0 < part <= len(lengths) and fits and target.nbytes == lengths[part - 1]:
                told[part - 1] = view_of(target)

        for array, (name, piece) in zip(reply.rows, message.pieces, strict=False):
            if isinstance(piece.rows, slice):
                tell(array.part, rows[name][piece.rows])
        if dense is not None and len(message.dense) and reply.dense.part:
            (offset, length), *others = dense_runs(message.layout, message.dense)
            if not others:
                tell(reply.dense.part, dense[offset : offset + length])
        return told

    return land


def _rows(
    reply: PullReply,
    i: int,
    form: Form | None,
    target: NDArray[np.float32],
    who: str,
    what: str,
    parts: Sequence[Part],
) -> NDArray[np.float32]:
    """Return the rows of the reply's table ``i``: as they came, or, if they are packed, in ``target``."""
    if form is None:
        plain: NDArray[np.float32] = unpack(
            reply.rows[i], np.float32, what, dims=2, columns=target.shape[1], parts=parts
        )
        return plain
    _check_form(reply.packed[i], form, f"{who}: {what}")
    decode_rows(form, reply.packed[i], target, f"{who}: {what}", parts)
    return target


def _dense_values(
    reply: PullReply, message: PullMessage, forms: Forms | None, parts: Sequence[Part]
) -> NDArray[np.float32]:
    if forms is None or not reply.HasField("packed_dense"):
        values: NDArray[np.float32] = unpack(reply.dense, np.float32, "dense values", parts=parts)
        return values
    what = f"shard {message.shard.id}: dense values"
    _check_form(reply.packed_dense, forms.pull_dense, what)
    lengths = message.layout.lengths_of(message.dense).tolist()
    return unpack_dense(forms.pull_dense, reply.packed_dense, lengths, what, parts)


def _check_form(packed: Packed, form: Form, what: str) -> None:
    if packed.codec != form.message():
        raise Malformed(f"{what} came under another codec than was asked for")


def _newer(
    reply: PullReply, tables: int, at: int, piece: Piece, name: str, parts: Sequence[Part]
) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """Return positions and versions of the rows that came of a piece that was asked for with versions."""
    if not reply.positions and not reply.versions:
        # A shard that knows no versions sends every row, and none of them can be kept.
        return np.arange(piece.size, dtype=np.int32), np.zeros(piece.size, np.uint32)
    if not len(reply.positions) == len(reply.versions) == tables:
        raise Malformed(
            f"positions and versions of {len(reply.positions)} and {len(reply.versions)} tables for {tables}"
        )
    positions = unpack(reply.positions[at], np.int32, f"positions of {name}", parts=parts)
    versions = unpack(reply.versions[at], np.uint32, f"versions of {name}", parts=parts)
    if len(positions) > piece.size:
        raise Malformed(f"{len(positions)} positions of {name} came, asked for {piece.size}")
    return positions, versions


def _scatter(
    layout: Layout, numbers: NDArray[np.int32], values: NDArray[np.float32], dense: NDArray[np.float32]
) -> None:
    runs = dense_runs(layout, numbers)
    if sum(length for _, length in runs) != len(values):
        raise Malformed(f"{len(values)} dense values answered, asked for {sum(length for _, length in runs)}")
    if np.may_share_memory(values, dense):
        return
    at = 0
    for offset, length in runs:
        dense[offset : offset + length] = values[at : at + length]
        at += length
