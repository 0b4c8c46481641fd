# SPDX-License-Identifier: Apache-2.0
"""A fresh table: rows that are served while they change, as a training job tells.

    frame      the descriptors of all blocks at one time; a look-up keeps the one that it began with
    block      rows and index with some room; a block that needs more is made anew, and put into the next frame

Invariant: a look-up returns of each key one state of its row, whole, takes no lock, and waits at most for a lap of changes; a key
without a row reads as in a frozen table. What a look-up may still read stays until it has ended. Any thread may look up; changes
take turns.
"""

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.fresh_kernels import (
    CLOCK,
    CLOCK_WORDS,
    COUNT,
    FRESH_SCRATCH_WORDS,
    ROOM,
    change_blocks,
    change_rows,
    find_fresh,
    look_up_fresh,
    stray,
)
from oarlock.embedding.frozen import LOAD, MAX_ROWS, TableWords, checked_keys, stored_bytes, stored_code
from oarlock.embedding.frozen_kernels import BLOCK_WORDS, ENTRIES, KEYS, PLACES, ROW_BITS, ROWS, fill_index
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.packed import FORMS
from oarlock.embedding.pointer import address_of, kernel_array
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed

Keys = NDArray[np.uint64]
Rows = NDArray[np.uint8]

# A block that is made anew has room for so many hundredths of its rows, and some more.
GROWTH = 125
SPARE = 16
NO_KEYS: Keys = np.empty(0, np.uint64)


class FreshBlock:
    """One block's rows: keys: uint64[n], distinct, and rows: uint8[n, bytes] as stored, both copied; ``more`` are to come."""

    def __init__(self, spec: TableSpec, keys: Keys, rows: Rows, *, more: int = 0) -> None:
        n = len(keys)
        room = (n + more) * GROWTH // 100 + SPARE
        if room >= MAX_ROWS:
            raise InvalidArgument(f"table {spec.name}: {room} rows in one block: give it more blocks")
        places, bits = room * 100 // LOAD + 1, room.bit_length()
        self._keys: Keys = np.empty(room, np.uint64)
        self._rows: Rows = np.empty((room, rows.shape[1]), np.uint8)
        self._entries: NDArray[np.uint32] = np.zeros(places, np.uint32)
        self._clock: NDArray[np.int64] = np.zeros(CLOCK_WORDS, np.int64)
        self._keys[:n], self._rows[:n] = keys, rows
        self._clock[COUNT] = n
        fill_index(address_of(self._keys), n, table_salt(spec.name), address_of(self._entries), places, bits)
        self.descriptor: NDArray[np.int64] = np.zeros(BLOCK_WORDS, np.int64)
        for word, value in (
            (ENTRIES, address_of(self._entries)),
            (PLACES, places),
            (KEYS, address_of(self._keys)),
            (ROWS, address_of(self._rows)),
            (ROW_BITS, bits),
            (CLOCK, address_of(self._clock)),
            (ROOM, room),
        ):
            self.descriptor[word] = value

    @property
    def rows(self) -> int:
        return int(self._clock[COUNT])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rows and index, room included."""
        return self._keys.nbytes + self._rows.nbytes + self._entries.nbytes

    def content(self) -> tuple[Keys, Rows]:
        """Return keys: uint64[n] and rows: uint8[n, bytes], in any order; whoever changes the block waits."""
        n = self.rows
        return self._keys[:n], self._rows[:n]


class _Frame:
    """All blocks at one time, as look-ups see them."""

    def __init__(self, words: TableWords, blocks: tuple[FreshBlock, ...]) -> None:
        self.words = words
        self.blocks = blocks


class FreshTable:
    """A table of ``spec``, empty at first. ``seed``: the job's."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        self.spec = spec
        self.row_bytes = stored_bytes(spec)
        self._seed = seed
        self._changing = Lock()
        none = np.empty((0, self.row_bytes), np.uint8)
        self._frame = self._framed([FreshBlock(spec, NO_KEYS, none) for _ in range(spec.blocks)])

    def _framed(self, blocks: Sequence[FreshBlock]) -> _Frame:
        descriptors = np.stack([block.descriptor for block in blocks])
        return _Frame(TableWords(self.spec, self._seed, descriptors), tuple(blocks))

    def _exchange(self, number: int, block: FreshBlock) -> None:
        before = self._frame
        descriptors = before.words.descriptors.copy()
        descriptors[number] = block.descriptor
        blocks = (*before.blocks[:number], block, *before.blocks[number + 1 :])
        self._frame = _Frame(TableWords(self.spec, self._seed, descriptors), blocks)

    @property
    def form(self) -> str:
        """In which form of ``embedding/packed.py`` its rows are."""
        return FORMS[stored_code(self.spec)]

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self._frame.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rows and index, room included."""
        return sum(block.nbytes for block in self._frame.blocks)

    def lookup(self, keys: Keys, out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n], in any order and repeated at will, to out: float32[n, dim].

        Return how many of them have no row.
        """
        keys = checked_keys(self.spec, keys, out)
        scratch = np.empty(FRESH_SCRATCH_WORDS, np.int64)
        frame = self._frame
        return int(
            look_up_fresh(frame.words.address, address_of(keys), len(keys), address_of(out), address_of(scratch))
        )

    def find(self, keys: Keys, out: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Do as ``lookup`` does, at a slower pace, and return which of the keys have a row: bool[n]."""
        keys = checked_keys(self.spec, keys, out)
        present = np.empty(len(keys), np.uint8)
        frame = self._frame
        find_fresh(frame.words.address, address_of(keys), len(keys), address_of(out), address_of(present))
        return present.view(np.bool_)

    def keys_of(self, block: int) -> Keys:
        """Return the keys that have rows in a block, in any order; whoever changes it waits."""
        return self._frame.blocks[block].content()[0].copy()

    def replace(self, block: int, keys: Keys, rows: Rows, then: Sequence["Change"] = ()) -> None:
        """Have a block hold these rows and no others, keys: uint64[n], distinct, once ``then`` was done to them.

        Malformed changes nothing.
        """
        one = np.array([block], np.int32)
        all_changes = [Change.of(one, keys, rows, NO_KEYS), *then]
        checked = [self.checked(change) for change in all_changes]
        keys, rows = checked[0].keys, checked[0].rows
        if len(np.unique(keys)) != len(keys):
            raise Malformed(f"table {self.spec.name}, block {block}: a key comes twice")
        # With room for all, so that it need not be made anew before anybody sees it.
        made = FreshBlock(self.spec, keys, rows, more=sum(len(change.keys) for change in checked[1:]))
        table = self._frame.words.address
        for change in checked[1:]:
            _, keys, rows, _, gone, _ = change
            address = address_of(made.descriptor)
            change_rows(
                table,
                address,
                address_of(gone),
                len(gone),
                address_of(keys),
                address_of(rows),
                0,
                len(keys),
                self.row_bytes,
            )
        with self._changing:
            self._exchange(block, made)

    def change(self, change: "Change") -> None:
        """Let rows leave, as far as they are there, then write others; Malformed changes nothing."""
        change = self.checked(change)
        progress = np.zeros(3, np.int64)
        with self._changing:
            while True:
                frame = self._frame
                blocks, keys, rows, counts, gone, gone_counts = change
                full = int(change_blocks(frame.words.address, blocks, counts, keys, rows, gone_counts, gone, progress))
                if full < 0:
                    return
                number = int(blocks[full])
                more = int(counts[: full + 1].sum()) - int(progress[1])
                self._exchange(number, FreshBlock(self.spec, *frame.blocks[number].content(), more=more))

    def checked(self, change: "Change") -> "Change":
        """Return a change as it is applied; Malformed if it is none of this table's."""
        where = f"table {self.spec.name}"
        blocks, counts = (
            kernel_array("blocks", change.blocks, np.int32),
            kernel_array("counts", change.counts, np.int32),
        )
        gone_counts = kernel_array("gone_counts", change.gone_counts, np.int32)
        keys, gone = kernel_array("keys", change.keys, np.uint64), kernel_array("gone", change.gone, np.uint64)
        rows = kernel_array("rows", change.rows, np.uint8, 2)
        if rows.shape != (len(keys), self.row_bytes):
            shape = list(rows.shape)
            raise Malformed(f"{where}: rows of {shape} bytes for {len(keys)} keys of {self.row_bytes}")
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < self.spec.blocks:
            raise Malformed(f"{where}: a block is not one of {self.spec.blocks}")
        for what, named, each in (("keys", keys, counts), ("keys that left", gone, gone_counts)):
            if len(each) != len(blocks) or (each < 0).any() or int(each.sum(dtype=np.int64)) != len(named):
                raise Malformed(
                    f"{where}: {len(named)} {what} are not as many as {len(blocks)} blocks are said to have"
                )
            at = int(stray(self._frame.words.address, blocks, each, named))
            if at >= 0:
                raise Malformed(f"{where}: key {int(named[at])} is of another block than it is sent for")
        return Change(blocks, keys, rows, counts, gone, gone_counts)


class Change(NamedTuple):
    """What is done to blocks: int32[b], each once: its gone: uint64[g] leave, gone_counts: int32[b] of them; then it gets counts:
    int32[b] of keys: uint64[n] with rows: uint8[n, bytes], as stored."""

    blocks: NDArray[np.int32]
    keys: Keys
    rows: Rows
    counts: NDArray[np.int32]
    gone: Keys
    gone_counts: NDArray[np.int32]

    @classmethod
    def of(cls, block: NDArray[np.int32], keys: Keys, rows: Rows, gone: Keys) -> "Change":
        """Return what is done to one block: int32[1]."""
        return cls(block, keys, rows, np.array([len(keys)], np.int32), gone, np.array([len(gone)], np.int32))

    def only(self, chosen: NDArray[np.bool_]) -> "Change":
        """Return what is done to the chosen blocks: bool[b]."""
        if chosen.all():
            return self
        mine, left = np.repeat(chosen, self.counts), np.repeat(chosen, self.gone_counts)
        return Change(
            self.blocks[chosen],
            self.keys[mine],
            self.rows[mine],
            self.counts[chosen],
            self.gone[left],
            self.gone_counts[chosen],
        )


def warm_up() -> None:
    """Compile, or load from the cache, the kernels of fresh tables."""
    for dtype in ("float32", "bfloat16"):
        table = FreshTable(TableSpec("warm_up", 2, blocks=1, dtype=dtype), seed=0)
        keys = np.arange(3, dtype=np.uint64)
        change = Change.of(np.zeros(1, np.int32), keys, np.zeros((3, table.row_bytes), np.uint8), keys[:1])
        table.change(change)
        table.replace(0, change.keys, change.rows, [change])
        table.lookup(np.arange(5, dtype=np.uint64), np.empty((5, 2), np.float32))
        table.find(np.arange(5, dtype=np.uint64), np.empty((5, 2), np.float32))
