# SPDX-License-Identifier: Apache-2.0
"""Reports: what shards tell of copies, and what is recorded of it. Told again until answered.

    added       the owner requires the new member: the record names it; if it may not, a new generation ends that it is required
    handed      closed under an order that still counts, all members have all: the heir is the owner. Else it is opened again
    confirmed   all members are at this generation: one too many may leave
    lacking     a recorded member has no copy: it leaves the set, or another one owns the block
    slow        a member does not keep up: it leaves the set, with a new generation also if it was not recorded

Invariant: a report about a generation that is not the record's changes nothing; the answer has the record, never an order.
While a gate stands, what would change a record is not answered. The coordinator's lock covers it.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.client.job import GATHERING, OVER
from oarlock.cluster.copies import Copies
from oarlock.cluster.members import Member
from oarlock.cluster.moving import Change
from oarlock.proto.arrays import unpack
from oarlock.proto.coordinator_pb2 import ADDED, CONFIRMED, HANDED, LACKING, SLOW, ReportReply, ReportRequest
from oarlock.proto.errors import Malformed, Unavailable

if TYPE_CHECKING:
    from oarlock.cluster.coordinator import Coordinator


def report(c: "Coordinator", member: Member, request: ReportRequest) -> ReportReply:
    """Take in a report of ``member``. Under the coordinator's lock."""
    copies = c.copies
    blocks, generations = _read(c, request)
    if c.phase in (GATHERING, *OVER):
        raise Unavailable(f"job {c.spec.name} is {c.phase}")
    if request.told != CONFIRMED and (copies.frozen or (request.told == ADDED and copies.held)):
        raise Unavailable("no record changes for the moment in which a cut begins")
    fits = _fits(copies, member, request, blocks, generations)
    known = blocks[fits].tolist()
    if request.told == CONFIRMED:
        for block, generation in zip(known, generations[fits].tolist(), strict=True):
            copies.moving.confirmed(block, generation)
    elif request.told == LACKING:
        copies.lacking(member.id, known)
    else:
        changes = [found for block in known if (found := _CHANGES[request.told](copies, block, request)) is not None]
        if changes:
            with c.store as store:
                copies.record(store, changes)
                if request.told == SLOW or not copies.looks:
                    # It would be added again; or it was begun by an earlier life, and nobody waits for it.
                    copies.look(store)
    c.wake()
    other = blocks[copies.records.generations[blocks] != generations]
    return ReportReply(record=copies.records.message(blocks=other)) if len(other) else ReportReply()


def _read(c: "Coordinator", request: ReportRequest) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    if request.told not in (ADDED, HANDED, CONFIRMED, LACKING, SLOW):
        raise Malformed(f"a report of kind {request.told}")
    blocks = unpack(request.blocks, np.int32, "reported blocks")
    generations = unpack(request.generations, np.uint64, "reported generations")
    if blocks.ndim != 1 or blocks.shape != generations.shape:
        raise Malformed(f"a report of {blocks.shape} blocks and {generations.shape} generations")
    if len(blocks) and not (int(blocks.min()) >= 0 and int(blocks.max()) < c.layout.blocks):
        raise Malformed(f"a report of block {int(blocks.max())}; the job has {c.layout.blocks}")
    if len(np.unique(blocks)) != len(blocks):
        raise Malformed("a report that names a block twice")
    return blocks, generations.astype(np.int64)


def _fits(
    copies: Copies, member: Member, request: ReportRequest, blocks: NDArray[np.int32], generations: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return bool[m]: whether a block is recorded as the sender believes, and what is reported of it is the sender's to say."""
    records = copies.records
    same: NDArray[np.bool_] = records.generations[blocks] == generations
    known = records.shards.get(member.id)
    if known is None or known.incarnation != member.incarnation:
        return np.zeros_like(same)
    if request.told == LACKING:
        same &= (records.members[blocks] == member.id).any(axis=1)
    else:
        same &= records.owners[blocks] == member.id
    return same


def _added(copies: Copies, block: int, request: ReportRequest) -> Change:
    owner, members, _ = copies.records.of(block)
    may = request.shard in copies.records.shards and len(members) < copies.records.width
    return Change(block, owner, (*members, request.shard) if may else tuple(members))


def _handed(copies: Copies, block: int, request: ReportRequest) -> Change | None:
    heir = copies.moving.handed(block, request.term, request.order)
    if heir is None:
        return None
    owner, members, _ = copies.records.of(block)
    rest = tuple(m for m in members if m != owner)
    leaves = copies.moving.leaves(block) == owner and len(rest) > copies.records.replicas
    return Change(block, heir, rest if leaves else tuple(members))


def _slow(copies: Copies, block: int, request: ReportRequest) -> Change:
    owner, members, _ = copies.records.of(block)
    # It would be added again at once.
    copies.moving.drop(block)
    return Change(block, owner, tuple(m for m in members if m != request.shard or m == owner))


_CHANGES = {ADDED: _added, HANDED: _handed, SLOW: _slow}
