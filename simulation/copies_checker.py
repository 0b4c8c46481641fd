# SPDX-License-Identifier: Apache-2.0
"""What must hold of copies after every event of a job whose shards come and go (SEMANTICS section 6).

    R1    what was acknowledged, by the answer to a push or (steps of ranks) to a pull, is in the copies of all recorded members
    R2    a member is recorded only once its owner waits for it, and has the whole block; it is waited for until the record
          says that it left
    R3    who becomes the owner has all that was acknowledged before, by its marks and by its values; and so has whoever owns;
          nobody who lives has a block open that is recorded to be another's
    R4    copies of one block at one generation and sequence are equal to the bit, and none is ahead of its owner

Invariant: what was acknowledged is read off answers as they are sent, records off the coordinator's disk. Shards that are dead,
or were struck off, count no more. Checks look only; they change nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import ClosedSet
from oarlock.client.job import GATHERING, OVER, JobSpec
from oarlock.client.layout import Layout
from oarlock.embedding.live import LiveBlock, keys_of
from oarlock.proto.arrays import unpack
from oarlock.proto.bulk import opened
from oarlock.proto.errors import PSError
from oarlock.ps.does import Image
from oarlock.ps.images import image_of
from oarlock.ps.operations import sequences_of
from oarlock.ps.rank_marks import STEP_MARK
from oarlock.ps.request import read_dense, read_rows, read_step
from oarlock.ps.shard import Shard
from oarlock.simulation.invariants import Checker, require
from oarlock.simulation.state import Committed, Record

Numbers = NDArray[np.int32]
Mask = NDArray[np.bool_]
# Of messages of a stream to a copy, so many go by until the copies are compared again.
COMPARE = 16


class CopiesChecker:
    """``living``: the shards that count now, by id; ``counts`` is told what became of records."""

    def __init__(
        self,
        spec: JobSpec,
        committed: Committed,
        checker: Checker,
        living: Callable[[], dict[int, Shard]],
        counts: Counter[str],
    ) -> None:
        self._committed = committed
        self._checker = checker
        self._living = living
        self._counts = counts
        self._layout = Layout(spec.tables, spec.dense)
        self._blocks = self._layout.blocks
        # By records: owners, and who is a member.
        self._owners: Numbers = np.full(self._blocks, -1, np.int32)
        self._named: dict[int, Mask] = {}
        # What was acknowledged: the highest group of a split, by block; the highest step, by block.
        self._groups: dict[int, NDArray[np.int64]] = {}
        self._steps: NDArray[np.int64] = np.zeros(self._blocks, np.int64)
        # What each shard owned when it was last looked at, and all that a look at it depends on.
        self._owned: dict[Shard, Mask] = {}
        self._looked: dict[Shard, tuple[Any, ...]] = {}
        # How often records changed.
        self._changed = 0
        self._told = 0

    @property
    def _off(self) -> bool:
        """Whether there is nothing to keep yet, or what is done is of a run that is over."""
        return self._committed.facts.get("phase", GATHERING) in (GATHERING, *OVER)

    # Answers

    def acknowledged(self, request: Any, reply: Any) -> None:
        """An answer to a push is sent."""
        if self._off:
            return
        self._records()
        rows = [read_rows(self._layout, message) for message in request.tables]
        dense = [read_dense(self._layout, message) for message in request.dense]
        numbers = np.concatenate([np.empty(0, np.int32), *(p.keys.numbers for p in rows), *(p.numbers for p in dense)])
        numbers = np.setdiff1d(numbers, unpack(reply.moved, np.int32, "moved")).astype(np.int32)
        living = self._living()
        for number, shard in living.items():
            mine = numbers[self._member(number)[numbers] & shard.holdings.here[numbers]]
            lacking = mine[~_has(shard, request, mine)]
            require(
                not len(lacking),
                "R1",
                f"group {request.group} of split {request.split} was acknowledged, and shard {number} lacks it in its copies "
                f"of blocks {lacking.tolist()}",
            )
        of_groups = numbers[numbers < next((s.staged.first for s in living.values() if s.staged), self._blocks)]
        known = self._groups.setdefault(request.split, np.full(self._blocks, -1, np.int64))
        known[of_groups] = np.maximum(known[of_groups], request.group)

    def _answered(self, shard: Shard, request: Any) -> None:
        """A shard answers a rank with what is there after the step that it commits."""
        staged = shard.staged
        assert staged is not None, "ranks are known of jobs that have them"
        mine = np.flatnonzero(shard.owned & (np.arange(self._blocks) >= staged.first))
        mine = mine[self._owners[mine] == shard.holdings.me]
        for number, other in self._living().items():
            copies = mine[self._member(number)[mine] & other.holdings.here[mine]]
            steps = _steps_of(other)[copies]
            require(
                (steps >= request.state).all(),
                "R1",
                f"shard {shard.holdings.me} answered for step {request.state}, and shard {number} has copies of blocks "
                f"{copies.tolist()} at steps {steps.tolist()}",
            )
        self._steps[mine] = np.maximum(self._steps[mine], request.state)

    def _member(self, number: int) -> Mask:
        return self._named.get(number, np.zeros(self._blocks, np.bool_))

    # Events

    def handled(self, shard: Shard | None, method: str, request: Any, reply: Any) -> None:
        """After a shard, or None: the coordinator, handled a message."""
        if self._off:
            # All may be placed anew.
            self._note_records()
        if self._off or method == "Shard.Push" or reply is None or isinstance(reply, PSError):
            return
        self._records()
        if method == "Shard.Pull":
            if shard is not None and request.rank and not reply.waits and reply.highest <= request.state:
                self._answered(shard, request)
            return
        self._look()
        self._told += method == "Shard.Replicate"
        # A full copy may bring back what was before.
        brings = method == "Shard.Replicate" and any(o.HasField("image") for o in opened(request)[0].operations)
        if method == "Shard.Replicate" and (brings or self._told % COMPARE == 0):
            self._compare_all()

    def finish(self) -> None:
        """After the last event of a job that is done."""
        self._compare_all()

    def _compare_all(self) -> None:
        """Check what members have, against what was acknowledged and against each other."""
        for number, other in self._living().items():
            here = self._member(number) & other.holdings.here
            self._whole(other, number, np.flatnonzero(here).astype(np.int32), "R1")
        self._compare(range(self._blocks))

    def _note_records(self) -> list[tuple[int, Record | None, Record]]:
        """Take in what was recorded since; return what changed."""
        if not self._committed.changes:
            return []
        self._changed += 1
        changes, self._committed.changes[:] = list(self._committed.changes), []
        for block, _, after in changes:
            self._owners[block] = after.owner
            for mask in self._named.values():
                mask[block] = False
            for member in after.members:
                self._named.setdefault(member, np.zeros(self._blocks, np.bool_))[block] = True
        return changes

    def _records(self) -> None:
        """Check what was recorded since of those that it names."""
        changes = self._note_records()
        living = self._living() if changes else {}
        for block, before, after in changes:
            if before is None or before.owner < 0 or after.owner < 0:
                continue
            if before.owner != after.owner:
                self._counts["handed over" if before.owner in living else "promoted"] += 1
            new = set(after.members) - set(before.members)
            self._counts["copies added"] += len(new)
            self._counts["copies removed"] += len(set(before.members) - set(after.members))
            if self._committed.sets[block] == after:
                for member in {after.owner, *new} & living.keys():
                    self._named_now(living[member], member, block, promoted=member in before.members)

    def _named_now(self, shard: Shard, number: int, block: int, *, promoted: bool) -> None:
        """Check a living shard that a record names as the owner, or as a member, of what others had."""
        # Memory that ends in the middle of an operation costs a copy, and that is told later.
        here = shard.holdings.here[block] or self._counts["refuse"]
        name = "R3" if promoted else "R2"
        require(here, name, f"shard {number} is recorded to have block {block}, and has nothing of it")
        if shard.holdings.here[block]:
            self._whole(shard, number, np.array([block], np.int32), name)

    def _whole(self, shard: Shard, number: int, blocks: Numbers, name: str) -> None:
        """Check that blocks that are here hold what was acknowledged."""
        for split, groups in self._groups.items():
            if split not in shard.closed:
                marks = shard.marks.of_split(split)
                found = np.full(len(blocks), -1) if marks is None else marks[blocks]
                lacking = blocks[found < groups[blocks]]
                require(
                    not len(lacking),
                    name,
                    f"shard {number} has blocks {lacking.tolist()}, and not all groups of split {split} that were acknowledged",
                )
        if shard.staged is not None:
            lacking = blocks[_steps_of(shard)[blocks] < self._steps[blocks]]
            require(
                not len(lacking), name, f"shard {number} has blocks {lacking.tolist()} at a step before the last one"
            )

    def _look(self) -> None:
        """Check who owns what."""
        living = self._living()
        self._forget(living)
        for number, shard in living.items():
            requires = shard.leading._requires
            state = (self._changed, shard.owned.tobytes(), *((n, mask.tobytes()) for n, mask in requires.items()))
            if self._looked.get(shard) == state:
                continue
            self._looked[shard] = state
            wrong = np.flatnonzero(shard.owned & (self._owners != number) & (self._owners >= 0)).tolist()
            require(
                not wrong,
                "R3",
                f"shard {number} has blocks {wrong} open, which are recorded to be {self._owners[wrong]}'s",
            )
            owned = shard.owned & (self._owners == number)
            before = self._owned.get(shard)
            self._owned[shard] = shard.owned.copy()
            for member, mask in self._named.items():
                required = requires.get(member)
                if member == number or not (owned & mask).any():
                    continue
                lacking = owned & mask if required is None else owned & mask & ~required
                blocks = np.flatnonzero(lacking).tolist()
                require(not blocks, "R2", f"shard {number} waits for shard {member} no more for blocks {blocks}")
            new = np.flatnonzero(owned if before is None else owned & ~before).astype(np.int32)
            if len(new):
                self._opened(shard, number, new)
        for gone in self._owned.keys() - set(living.values()):
            del self._owned[gone], self._looked[gone]

    def _opened(self, shard: Shard, number: int, blocks: Numbers) -> None:
        """Check blocks that a shard owns from now on."""
        self._whole(shard, number, blocks, "R3")
        self._compare(blocks.tolist())
        for split in self._groups:
            if split not in shard.closed:
                self._checker.pushed(shard, split)

    def _forget(self, living: dict[int, Shard]) -> None:
        """What all shards know as closed counts by its values from now on."""
        for split in [s for s in self._groups if all(s in shard.closed for shard in living.values())]:
            del self._groups[split]

    # Equal

    def _compare(self, blocks: Any) -> None:
        """Compare the copies of blocks."""
        numbers = np.array(blocks, np.int32)
        found: dict[tuple[int, int, int, int], list[Shard]] = {}
        for shard in self._living().values():
            here = numbers[shard.holdings.here[numbers]]
            # A step that brings a block nothing is no operation of it.
            steps = _steps_of(shard)[here] if shard.staged is not None else np.zeros(len(here), np.int64)
            known = shard.holdings.generations[here], sequences_of(shard, here), steps
            for each in zip(here.tolist(), *(k.tolist() for k in known), strict=True):
                found.setdefault(each, []).append(shard)
        for (block, generation), (leads, most) in _ahead(found).items():
            require(
                most <= leads,
                "R4",
                f"a copy of block {block} at generation {generation} has {most} operations, its owner {leads}",
            )
        for (block, generation, sequence, _), shards in found.items():
            images = [image_of(shard, block) for shard in shards[: len(shards) if len(shards) > 1 else 0]]
            for image in images[1:]:
                self._counts["copies compared"] += 1
                differs = _difference(images[0], image)
                require(
                    not differs,
                    "R4",
                    f"two copies of block {block} at generation {generation} and sequence {sequence} differ: {differs}",
                )


def _ahead(found: dict[tuple[int, int, int, int], list[Shard]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return by block and generation how many operations its owner has told of, and the most that any copy has."""
    leads: dict[tuple[int, int], int] = {}
    most: dict[tuple[int, int], int] = {}
    for (block, generation, sequence, _), shards in found.items():
        at = block, generation
        most[at] = max(sequence, most.get(at, 0))
        if any(shard.holdings.leads[block] for shard in shards):
            leads[at] = sequence
    return {at: (leads[at], most[at]) for at in leads}


def _steps_of(shard: Shard) -> NDArray[np.int64]:
    steps: NDArray[np.int64] = shard.marks.steps  # type: ignore[attr-defined]
    return steps


def _has(shard: Shard, request: Any, numbers: Numbers) -> Mask:
    """Return bool[m]: in which of these blocks a shard has what was pushed."""
    marks = shard.marks.of_split(request.split)
    found = np.full(len(numbers), request.split in shard.closed)
    if marks is not None:
        found |= marks[numbers] >= request.group
    if shard.staged is not None:
        parts = numbers >= shard.staged.first
        step, rank = read_step(request.step), shard.staged.rank_of(request.rank)
        found[parts] = (_steps_of(shard)[numbers] >= step)[parts] | shard.staged.has(rank, numbers[parts])
    return found


def _difference(one: Image, other: Image) -> str:
    """Return in what two images of a block differ; empty: they are equal."""
    if _content(one.content) != _content(other.content):
        return "content"
    # What a shard knows as closed has no marks there.
    marks = [{s: g for s, g in i.marks.items() if not _closed(s, one.closed, other.closed)} for i in (one, other)]
    if marks[0] != marks[1]:
        return f"marks {marks[0]} and {marks[1]}"
    staged = [{pushed.rank: _parts(pushed) for pushed in image.staged} for image in (one, other)]
    if any(staged[0][rank] != staged[1][rank] for rank in staged[0].keys() & staged[1].keys()):
        return "staged parts"
    return ""


def _closed(split: int, *sets: ClosedSet) -> bool:
    return split != STEP_MARK and any(split in closed for closed in sets)


def _content(content: Any) -> tuple[Any, ...]:
    if not isinstance(content, LiveBlock):
        return content.weights.tobytes(), content.state.tobytes()
    order, waiting = np.argsort(keys_of(content.records)), np.argsort(content.waiting)
    sorted_ = content.records[order], content.waiting[waiting], content.waited[waiting]
    return (*(each.tobytes() for each in sorted_), content.sketch, content.left, content.version)


def _parts(pushed: Any) -> tuple[Any, ...]:
    rows = [(part.keys.keys.tobytes(), part.gradients.tobytes()) for part in pushed.rows]
    return pushed.step, rows, [(part.starts.tobytes(), part.gradients.tobytes()) for part in pushed.dense]
