# SPDX-License-Identifier: Apache-2.0
"""The blocks of a table that this process stores: they come, go, grow, and are copied out and in as a whole.

Invariant: a block's line of ``descriptors`` never moves, so its lock outlives its content; whoever changes a block from
Python does it inside ``holding``. Callable from any thread.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding import check
from oarlock.embedding.block import Block
from oarlock.embedding.content import BlockRows, export_rows, import_rows, import_waiting
from oarlock.embedding.descriptor import (
    BUCKETS,
    COUNT,
    DESCRIPTOR_BYTES,
    ENTRIES,
    FIELDS,
    LIFE,
    PENDING_KEYS,
    ROWS,
    SPILLED_ROWS,
    VERSION,
)
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.index import PENDING, SPILLED, VALUE, list_entries
from oarlock.embedding.initial import constants, origin
from oarlock.embedding.lock import enter_mutex, leave_mutex, reopen, shut
from oarlock.embedding.memory import Arena, IndexMemory
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.pointer import LINE, address_of, kernel_array
from oarlock.embedding.precision import INT8, precision_code
from oarlock.embedding.sketch import Sketch
from oarlock.embedding.slab import First, Keep, layout
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed, PSError, StalePlacement

_NO_PLACES: NDArray[np.int32] = np.zeros(0, np.int32)


def keeps(spec: TableSpec) -> Keep:
    """Return which counters a table's policies need of each row."""
    admission, eviction = spec.admission, spec.eviction
    by_age = bool(eviction.max_bytes) and eviction.order == "recent"
    by_use = bool(eviction.max_bytes) and eviction.order == "frequent"
    return Keep(
        occurrences=spec.usage or bool(eviction.occurrences) or by_use or admission.kind in ("count", "sketch"),
        updated=spec.usage or bool(eviction.age) or by_age,
        score=bool(eviction.score) or bool(spec.expand_score) or admission.kind == "score",
        undo=spec.guard.undo,
        version=spec.cache is not None,
        bound=spec.cache.bound if spec.cache is not None else 0,
    )


class Store:
    """The stored blocks of ``spec``. ``seed`` is the job's, in [0, 2^64)."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        self.spec = spec
        self.salt = table_salt(spec.name)
        self.bits = spec.blocks.bit_length() - 1
        optimizers = [optimizer_of(part.optimizer) for part in spec.all_parts]
        states = [o.initial_state(p.optimizer, p.width) for o, p in zip(optimizers, spec.all_parts, strict=True)]
        self._ends = np.cumsum([part.width for part in spec.all_parts], dtype=np.int64)
        self._constants = np.stack([constants(part.initializer) for part in spec.all_parts])
        self._state = np.concatenate(states)
        addresses = [address_of(array) for array in (self._ends, self._constants, self._state)]
        self.first = First(origin(seed, spec.name), len(spec.all_parts), *addresses)
        code = precision_code(spec.dtype)
        self.layout = layout(spec.dim, sum(len(state) for state in states), code, keeps(spec))
        # An int8 row's scale travels as one more column.
        self.state_columns = self.layout.state_columns + (code == INT8)
        self.counters = self.layout.counters - (spec.guard.undo > 0)
        self.arena = Arena()
        self.indexes = IndexMemory(spec.blocks)
        self.blocks: dict[int, Block] = {}
        self.phase = 0  # views begun (``embedding/stamps.py``)
        self._lock = threading.Lock()
        self._lives = itertools.count(1)
        # On a cache line of its own each, so that locks of two blocks never share one.
        self._memory: NDArray[np.int64] = np.zeros(spec.blocks * FIELDS + LINE // 8, np.int64)
        begin = -address_of(self._memory) % LINE // 8
        self.descriptors = self._memory[begin : begin + spec.blocks * FIELDS].reshape(spec.blocks, FIELDS)
        self.base = address_of(self.descriptors)

    def adopt(self, block: int) -> None:
        """Store a block from now on, empty."""
        self._in_range(block)
        with self._lock:
            if block in self.blocks:
                raise InvalidArgument(f"table {self.spec.name}: block {block} is stored here already; drop it first")
            self._place(block, self._new_block())

    def drop(self, block: int) -> None:
        """Forget a block and free its memory."""
        self._in_range(block)
        with self._lock:
            gone = self.stored(block)
            with self.holding(block), self.shut(block):
                kept = self._retire(block, gone)
                self.descriptors[block, BUCKETS:] = 0
                del self.blocks[block]
            if not kept:
                gone.free()

    @property
    def owned(self) -> NDArray[np.int32]:
        """Return the stored blocks, ascending: int32[m]."""
        with self._lock:
            return np.array(sorted(self.blocks), np.int32)

    @property
    def rows(self) -> int:
        """Return the number of rows, those in the spill file included."""
        return int(self.descriptors[:, ROWS].sum() + self.descriptors[:, SPILLED_ROWS].sum())

    @property
    def row_bytes(self) -> int:
        """Return about how many bytes of memory a row takes, its part of the index included."""
        shape = self.layout
        return shape.weight_bytes + shape.side_bytes + shape.undo_pitch + 16

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory allocated for rows, indexes and sketches."""
        with self._lock:
            return self.descriptors.nbytes + sum(block.nbytes for block in self.blocks.values())

    def version(self, block: int) -> int:
        """Return how many operations changed a stored block."""
        self.stored(block)
        return int(self.descriptors[block, VERSION])

    # Access for those who change blocks from Python.

    @contextmanager
    def holding(self, block: int) -> Iterator[int]:
        """Keep all others from changing a block (pulls go on); yield the address of its descriptor."""
        self._in_range(block)
        address = self.base + block * DESCRIPTOR_BYTES
        enter_mutex(address)
        try:
            yield address
        finally:
            leave_mutex(address)

    @contextmanager
    def shut(self, block: int) -> Iterator[None]:
        """Keep pulls out as well; inside ``holding``."""
        self._in_range(block)
        address = self.base + block * DESCRIPTOR_BYTES
        shut(address)
        try:
            yield
        finally:
            reopen(address)

    def stored(self, block: int) -> Block:
        """Return a stored block, or raise StalePlacement."""
        self._in_range(block)
        found = self.blocks.get(block)
        if found is None:
            self.stale(block)
        return found

    def stale(self, block: int, **facts: int) -> NoReturn:
        raise StalePlacement(
            f"table {self.spec.name}: block {block} is not stored here; fetch the placement and send again",
            table=self.spec.name,
            block=block,
            **facts,
        )

    def _in_range(self, block: int) -> None:
        if not 0 <= block < self.spec.blocks:
            raise InvalidArgument(f"table {self.spec.name}: block {block} is not in [0, {self.spec.blocks})")

    def _new_block(self) -> Block:
        admission = self.spec.admission
        sketch = None
        if admission.kind == "sketch":
            sketch = Sketch(max(1, admission.capacity // self.spec.blocks), windows=admission.windows)
        return Block(self.layout, self.salt, self.arena, self.indexes, sketch)

    def _place(self, block: int, content: Block) -> None:
        with self.holding(block), self.shut(block):
            before = self.blocks.get(block)
            kept = before is not None and self._retire(block, before)
            content.descriptor[LIFE] = next(self._lives)
            content.track.floor = self.phase
            content.move_descriptor(self.descriptors[block])
            self.blocks[block] = content
        if before is not None and not kept:
            before.free()

    def _retire(self, block: int, content: Block) -> bool:
        """Take a content, held and shut, out of its place; return whether a view keeps it, and frees it when it is released."""
        saved = content.saved
        if saved is not None:
            saved.pin = self._pin_cold()
        self._forget_cold(block)
        content.move_descriptor(np.zeros(FIELDS, np.int64))
        content.retired = True
        return saved is not None

    # Whole blocks

    def export_block(self, block: int) -> BlockRows:
        """Return a copy of a stored block's content, all of one instant."""
        self.stored(block)
        with self.holding(block) as descriptor:
            found = self.stored(block)
            words = self.descriptors[block]
            keys = np.empty(int(words[ENTRIES]), np.uint64)
            values = np.empty(len(keys), np.uint32)
            list_entries(int(words[BUCKETS]), 0, int(words[COUNT]), keys, values)
            rows = int(words[ROWS])
            weights = np.empty((rows, self.spec.dim), np.float32)
            state = np.empty((rows, self.state_columns), np.float32)
            counters = np.empty((rows, self.counters), np.uint32)
            export_rows(descriptor, self.layout, keys, values, address_of(weights), state, counters)
            out = BlockRows(keys[:rows], weights, state, counters)
            if words[SPILLED_ROWS]:
                out = self._with_cold(out, values[rows:])
            if words[PENDING_KEYS]:
                waits = (values >= PENDING) & (values < SPILLED)
                out = out._replace(waiting=keys[waits], waited=values[waits] & np.uint32(VALUE))
            if found.sketch is not None:
                out = out._replace(sketch=found.sketch.export())
            return out

    # What a table with a spill file does more.

    def _with_cold(self, rows: BlockRows, words: NDArray[np.uint32]) -> BlockRows:
        """Return rows with those behind them that ``words`` say are in the file."""
        return rows

    def _pin_cold(self) -> int | None:
        """Keep what is in the file readable until ``_unpin_cold`` of what this returns."""
        return None

    def _unpin_cold(self, token: int | None) -> None:
        """End a pin."""

    def _forget_cold(self, block: int) -> None:
        """Forget what a block has in the file; it is held and shut."""

    def _keep_budget(self, block: int) -> None:
        """Let rows of a block go to the file that are beyond its part of the memory budget; the caller does not hold it."""

    def import_block(self, block: int, content: BlockRows, *, version: int = 0) -> None:
        """Store a block with exactly this content, replacing what it held; a Malformed content changes nothing."""
        fresh = self._filled(block, content, version)
        with self._lock:
            self._place(block, fresh)
        self._keep_budget(block)

    def _filled(self, block: int, content: BlockRows, version: int) -> Block:
        """Return a block with this content, which is in no place yet."""
        self._in_range(block)
        content = self._checked(block, content)
        counters = content.counters if content.counters.size else np.zeros((len(content.keys), 0), np.uint32)
        weights = address_of(content.weights)
        return self._built(
            block,
            content.keys,
            lambda line: import_rows(line, self.salt, self.layout, content.keys, weights, content.state, counters),
            content.waiting,
            content.waited,
            content.sketch,
            version,
        )

    def _built(
        self,
        block: int,
        keys: NDArray[np.uint64],
        fill: Callable[[int], int],
        waiting: NDArray[np.uint64],
        waited: NDArray[np.uint32],
        sketch: bytes,
        version: int,
    ) -> Block:
        """Return a block of checked content, which is in no place yet; ``fill`` enters the rows as ``import_rows`` does."""
        where = f"table {self.spec.name}, block {block}"
        fresh = self._new_block()
        line = address_of(fresh.descriptor)
        try:
            fresh.reserve(len(keys) + len(waiting), len(keys))
            again = int(fill(line))
            if again < 0 and len(waiting):
                again = int(import_waiting(line, self.salt, waiting, waited))
                again += len(keys) if again >= 0 else 0
            if again >= 0:
                raise Malformed(f"{where}: key {int(np.concatenate([keys, waiting])[again])} comes twice")
            if sketch:
                if fresh.sketch is None:
                    raise Malformed(f"{where}: it comes with a sketch, but the table's admission has none")
                fresh.sketch.load(sketch)
        except PSError:
            fresh.free()
            raise
        fresh.descriptor[VERSION] = version
        fresh.tombstones.forget(version)  # what left before is not known here
        return fresh

    def _checked(self, block: int, content: BlockRows) -> BlockRows:
        where = f"table {self.spec.name}, block {block}"
        keys = kernel_array("keys", content.keys, np.uint64)
        weights = kernel_array("weights", content.weights, np.float32, 2)
        state = kernel_array("state", content.state, np.float32, 2)
        counters = kernel_array("counters", content.counters, np.uint32, 2)
        shapes: list[tuple[str, NDArray[np.float32] | NDArray[np.uint32], int]] = [
            ("weights", weights, self.spec.dim),
            ("state", state, self.state_columns),
        ]
        if counters.size:
            shapes.append(("counters", counters, self.counters))
        for name, array, columns in shapes:
            if array.shape != (keys.shape[0], columns):
                raise Malformed(f"{where}: {name} has shape {array.shape}, expected {(keys.shape[0], columns)}")
            if array.dtype == np.float32 and not np.isfinite(array).all():
                raise Malformed(f"{where}: {name} holds an infinity or NaN")
        if self.spec.dtype == "int8" and (state[:, -1] < 0).any():
            raise Malformed(f"{where}: a scale, the last column of state, is below 0")
        shows = self.layout.shows
        if (
            counters.size
            and shows >= 0
            and not np.isfinite(counters[:, shows : shows + 2].copy().view(np.float32)).all()
        ):
            raise Malformed(f"{where}: shows or clicks hold an infinity or NaN")
        waiting, waited = self._checked_keys(block, keys, content.waiting, content.waited)
        return BlockRows(keys, weights, state, counters, waiting, waited, content.sketch)

    def _checked_keys(
        self, block: int, keys: NDArray[np.uint64], waiting: NDArray[np.uint64], waited: NDArray[np.uint32]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Return the waiting keys and their counts; Malformed unless they fit together, and all keys belong to the block."""
        where = f"table {self.spec.name}, block {block}"
        waiting = kernel_array("waiting", waiting, np.uint64)
        waited = kernel_array("waited", waited, np.uint32)
        if waiting.shape != waited.shape:
            raise Malformed(f"{where}: {len(waiting)} waiting keys, but {len(waited)} counts of them")
        if len(waiting) and self.spec.admission.kind != "count":
            raise Malformed(f"{where}: it comes with waiting keys, but the table's admission does not count them")
        for part in (keys, waiting):
            if part.shape[0]:
                fault = np.zeros(1, np.int64)
                whole = np.array([[block], [part.shape[0]]], np.int32)
                if check.check_keys(self.salt, self.bits, part, whole[0], whole[1], _NO_PLACES, fault) != check.FINE:
                    raise Malformed(f"{where}: key {int(part[fault[0]])} belongs to another block")
        return waiting, waited
