# SPDX-License-Identifier: Apache-2.0
"""The feed: which rows of blocks that are owned here changed, kept for a while, for processes that serve them.

    noted      a push names its keys, while somebody follows; nothing is known of their rows
    taken      at a question, unless the last one was a moment ago: what is noted becomes a record, with the keys that left
    gathered   the record gets the rows as they are then, in laps, so that no push waits longer than for one lap
    kept       records make a ring of bounded size, which all who follow share; the oldest go

A record may have rows that are newer than its operations say; then they are in the next record, too. So whoever applies records
in order sees each row go forwards only. The index's stamps (``embedding/stamps.py``) tell checkpoints what changed by going
through all of it; here keys are noted as they come, so that a take costs what changed, and not what there is.

Invariant: from ``since`` of a block on no change of its rows is missing in the ring, what is noted and its tombstones together;
where that is not so (it was full, the block is new here) ``since`` is raised, and whoever is behind gets the block whole. Nobody
follows: nothing is noted or kept. ``note``, ``opened`` and ``left`` are called with the push lock held, ``take`` without it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.changed import changed_rows
from oarlock.embedding.descriptor import LIFE, VERSION
from oarlock.embedding.frozen import stored_bytes
from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.make import AnyTable
from oarlock.embedding.store import Store

if TYPE_CHECKING:
    from oarlock.ps.request import Keys
    from oarlock.ps.shard import Shard

Numbers = NDArray[np.int32]
Longs = NDArray[np.int64]

# Of all records that are kept.
RING_BYTES = 64 << 20
# Keys that are noted between two takes, repeated ones included.
NOTED_KEYS = 4 << 20
# Rows that are gathered before a push may come in: about half a millisecond.
LAP_ROWS = 2048
# Questions that come sooner after a take share it.
TICK_SECONDS = 0.1
# Who follows asks several times a second.
IDLE_SECONDS = 15.0


@dataclass(frozen=True)
class Part:
    """What changed in ``blocks`` int32[b] of one table, ``numbers`` in the layout, between their operations before: int64[b] and
    after: int64[b]: counts: int32[b] of keys: uint64[n] with rows: uint8[n, bytes]; gone_counts: int32[b] of gone: uint64[g]."""

    table: int
    blocks: Numbers
    numbers: Numbers
    before: Longs
    after: Longs
    counts: Numbers
    keys: NDArray[np.uint64]
    rows: NDArray[np.uint8]
    gone_counts: Numbers
    gone: NDArray[np.uint64]

    @property
    def nbytes(self) -> int:
        return 32 * len(self.blocks) + self.keys.nbytes + self.rows.nbytes + self.gone.nbytes

    def only(self, chosen: NDArray[np.bool_]) -> "Part":
        """Return what is of the chosen blocks: bool[b]."""
        if chosen.all():
            return self
        mine, left = np.repeat(chosen, self.counts), np.repeat(chosen, self.gone_counts)
        return Part(
            self.table,
            self.blocks[chosen],
            self.numbers[chosen],
            self.before[chosen],
            self.after[chosen],
            self.counts[chosen],
            self.keys[mine],
            self.rows[mine],
            self.gone_counts[chosen],
            self.gone[left],
        )


@dataclass
class _Taken:
    """Part of a record before it has rows: what was noted, and what left, of which some may have come back."""

    table: int
    blocks: Numbers
    before: Longs
    after: Longs
    keys: list[NDArray[np.uint64]]
    gone: list[NDArray[np.uint64]]


class Feed:
    """What changed in rows of ``shard``."""

    def __init__(
        self, shard: "Shard", *, ring_bytes: int = RING_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shard = shard
        self._ring_bytes = ring_bytes
        self._clock = clock
        self._ticking = Lock()
        self.listening = False
        self._asked_at = self._taken_at = 0.0
        self._noted: list[list[NDArray[np.uint64]]] = []
        self._keys = 0
        blocks = shard.layout.dense_base
        # By block of a table: from which number of operations on nothing is missing (-1: it is not owned here), up to where
        # all is taken, and the life of its content.
        self.since: Longs = np.full(blocks, -1, np.int64)
        self.upto: Longs = np.zeros(blocks, np.int64)
        self._lives: Longs = np.zeros(blocks, np.int64)
        # Of which take on an answer of this shard says what a block's content is; what came before is not built upon.
        self._anew: Longs = np.zeros(blocks, np.int64)
        self._lost: list[int] = []
        self._ring: deque[Part] = deque()
        self.nbytes = 0
        self.rows = self.tombstones = self.takes = self.overflows = 0

    # Told by whoever changes blocks; the push lock is held.

    def note(self, keys: "Keys") -> None:
        """Note that rows of these keys are about to change, or just did."""
        if not self.listening:
            return
        if self._clock() - self._asked_at > IDLE_SECONDS:
            self._end()
            return
        self._keys += len(keys.keys)
        if self._keys > NOTED_KEYS:
            self.overflows += 1
            self._begin()
            return
        self._noted[keys.table].append(keys.keys.copy())

    def opened(self, numbers: Numbers) -> None:
        """Begin anew with blocks that are owned here from now on: who followed them elsewhere may have what is not here."""
        if self.listening:
            mine = numbers[numbers < len(self.since)]
            self.since[mine] = -1

    def left(self, numbers: Numbers) -> None:
        """Say no more of blocks that are owned here no more."""
        self.opened(numbers)

    # Asked by whoever follows; the push lock is not held.

    def take(self) -> tuple[int, float]:
        """See to it that the ring has what changed up to a moment ago; return the number of that take, and its age in seconds."""
        with self._ticking:
            now = self._asked_at = self._clock()
            if self.listening and now - self._taken_at < TICK_SECONDS:
                return self.takes, now - self._taken_at
            with self._shard.push_lock:
                if not self.listening:
                    self.listening = True
                    self._begin()
                taken = self._take()
                # As old as what is looked at first.
                self._taken_at = self._clock()
            for each in taken:
                self._keep(self._gather(each))
            return self.takes, self._clock() - self._taken_at

    def after(self, known: Longs, takes: Longs) -> tuple[NDArray[np.bool_], Iterator[Part]]:
        """Return of which blocks, bool[blocks], the ring has all that is news, and that, to who has ``known`` int64[blocks].

        ``known`` was learnt here with ``takes`` int64[blocks], -1: nothing; it is raised as parts are gone through.
        """
        with self._shard.push_lock:
            reached = (self.since >= 0) & (known >= self.since) & (known <= self.upto) & (takes >= self._anew)
            return reached, _news(list(self._ring), known, reached)

    # Inside

    def _begin(self) -> None:
        """Forget all, and note what changes from now on. The push lock is held."""
        self._forget()
        self._look(begin=True)

    def _end(self) -> None:
        self.listening = False
        self._forget()

    def _forget(self) -> None:
        self._noted = [[] for _ in self._shard.tables]
        self._keys = 0
        self._ring.clear()
        self.nbytes = 0
        self.since[:] = -1

    def _look(self, *, begin: bool = False) -> Longs:
        """Return int64[blocks], how many operations changed each, and raise ``since`` of those that are new here."""
        shard, versions = self._shard, np.zeros_like(self.upto)
        lives = np.zeros_like(self._lives)
        for base, table in zip(shard.layout.table_base, shard.tables, strict=True):
            versions[base : base + table.spec.blocks] = table.descriptors[:, VERSION]
            lives[base : base + table.spec.blocks] = table.descriptors[:, LIFE]
        owned = shard.owned[: len(versions)]
        fresh = owned & (begin | (self.since < 0) | (lives != self._lives))
        self.since[~owned] = -1
        # Whoever has answers up to the last take alone has nothing of what was forgotten since.
        self._anew[fresh] = self.takes + begin
        self.since[fresh] = self.upto[fresh] = versions[fresh]
        self._lives = lives
        return versions

    def _take(self) -> list[_Taken]:
        """Take what is noted. The push lock is held."""
        self.takes += 1
        shard, versions = self._shard, self._look()
        noted, self._noted, self._keys = self._noted, [[] for _ in shard.tables], 0
        changed = np.flatnonzero((self.since >= 0) & (versions != self.upto))
        out = []
        for number, (base, table) in enumerate(zip(shard.layout.table_base, shard.tables, strict=True)):
            low, high = np.searchsorted(changed, (base, base + table.spec.blocks))
            mine = changed[low:high]
            if not len(mine):
                continue
            gone = self._gone(table, base, mine)
            # Some may have forgotten what left, which `since` says then.
            blocks = (mine - base).astype(np.int32)
            out.append(_Taken(number, blocks, self.upto[mine], versions[mine], noted[number], gone))
        self.upto[changed] = versions[changed]
        for at in self._lost:
            self.since[at] = versions[at]
        self._lost.clear()
        return out

    def _gone(self, table: AnyTable, base: int, numbers: Longs) -> list[NDArray[np.uint64]]:
        """Return the keys that left blocks of a table, whose first one is ``base``, since the last take."""
        store: Store = table if isinstance(table, Store) else table.narrow
        blocks, out = store.blocks, []
        for number, upto in zip(numbers.tolist(), self.upto[numbers].tolist(), strict=True):
            buried = blocks[number - base].tombstones
            if max(buried.newest, buried.floor) <= upto:
                continue
            found = buried.since(upto)
            if found is None:
                self._lost.append(number)
            else:
                out.append(found[0])
        return out

    def _gather(self, taken: _Taken) -> Part:
        """Return the part with its rows as they are now."""
        shard, table = self._shard, self._shard.tables[taken.table]
        keys, groups = _grouped(table, _distinct(taken.keys), taken.blocks)
        gone, buried = _grouped(table, _distinct(taken.gone), taken.blocks)
        rows, present = [], []
        for begin in range(0, len(keys), LAP_ROWS):
            lap = slice(begin, begin + LAP_ROWS)
            found, counts = np.unique(groups[lap], return_counts=True)
            with shard.push_lock:
                got = changed_rows(table, keys[lap], taken.blocks[found], counts.astype(np.int32))
            rows.append(got.rows)
            present.append(got.present)
        here = np.concatenate(present) if present else np.empty(0, np.bool_)
        # Of keys that left and came back there is a row, in this part or in the next one.
        keys, groups = keys[here], groups[here]
        blocks = len(taken.blocks)
        back = np.isin(gone, keys, assume_unique=True)
        gone, buried = gone[~back], buried[~back]
        empty = np.empty((0, stored_bytes(table.spec)), np.uint8)
        return Part(
            taken.table,
            taken.blocks,
            taken.blocks + np.int32(shard.layout.table_base[taken.table]),
            taken.before,
            taken.after,
            np.bincount(groups, minlength=blocks).astype(np.int32),
            keys,
            np.concatenate(rows) if rows else empty,
            np.bincount(buried, minlength=blocks).astype(np.int32),
            gone,
        )

    def _keep(self, part: Part) -> None:
        with self._shard.push_lock:
            # It may have begun anew meanwhile; what it forgot is not asked for then.
            self._ring.append(part)
            self.nbytes += part.nbytes
            while self.nbytes > self._ring_bytes:
                oldest = self._ring.popleft()
                self.nbytes -= oldest.nbytes
                known = self.since[oldest.numbers] >= 0
                numbers = oldest.numbers[known]
                self.since[numbers] = np.maximum(self.since[numbers], oldest.after[known])
        self.rows += len(part.keys)
        self.tombstones += len(part.gone)


def _news(parts: list[Part], known: Longs, chosen: NDArray[np.bool_]) -> Iterator[Part]:
    for part in parts:
        wanted = chosen[part.numbers] & (known[part.numbers] < part.after)
        if wanted.any():
            found = part.only(wanted)
            known[found.numbers] = found.after
            yield found


def _distinct(keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate(keys)) if keys else np.empty(0, np.uint64)


def _grouped(
    table: AnyTable, keys: NDArray[np.uint64], blocks: Numbers
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return those of keys that are of blocks: int32[b], ascending, in the order of the blocks, and which of these each is of."""
    found = np.empty(len(keys), np.int32)
    blocks_of(keys, table.salt, table.bits, found)
    at = np.minimum(np.searchsorted(blocks, found), len(blocks) - 1)
    mine = blocks[at] == found
    keys, at = keys[mine], at[mine]
    order = np.argsort(at, kind="stable")
    return keys[order], at[order]
