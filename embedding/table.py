# SPDX-License-Identifier: Apache-2.0
"""A table: rows by key, in the blocks that this process stores.

Invariant: a pull creates nothing; a row starts at its first value and changes by pushes and imports only; each result
is a pure function of the block and the request, whatever the split into requests. Callable from any thread: one lock
per table, held while kernels run and memory grows, so requests to one table go one after the other and requests to
different tables side by side. (Locks by block are the next step; the descriptors already keep blocks apart.)

Keys arrive grouped by block: ``blocks`` names the blocks, ``counts`` how many of the keys belong to each, in order.
"""

import math
import threading
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding import index
from oarlock.embedding.block import Block, BlockRows
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.initial import constants, origin
from oarlock.embedding.optimizer import hyper_of, optimizer_of
from oarlock.embedding.pointer import check_output, kernel_array
from oarlock.embedding.slab import gather_rows, layout
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.update import refuse
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

Keys = NDArray[np.uint64]
Groups = NDArray[np.int32]
Values = NDArray[np.float32]

_NO_PLACES: NDArray[np.int32] = np.zeros(0, np.int32)


class PushCounts(NamedTuple):
    """What a push did: rows updated, those of them that are new, and rows refused for a gradient that is not finite."""

    applied: int
    created: int
    refused: int


class Table:
    """The rows of ``spec`` in the adopted blocks. ``seed`` is the job's, in [0, 2^64)."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        optimizer = optimizer_of(spec.optimizer)
        self.spec = spec
        self.state_columns = optimizer.state_columns(spec.dim)
        self.salt = table_salt(spec.name)
        self.bits = spec.blocks.bit_length() - 1
        self._update = optimizer.update
        self._hyper = hyper_of(spec.optimizer)
        self._state = optimizer.initial_state(spec.optimizer, spec.dim)
        self._layout = layout(spec.dim, self.state_columns)
        self._origin = origin(seed, spec.name)
        self._first = constants(spec.initializer)
        self._lock = threading.Lock()
        self._blocks: dict[int, Block] = {}
        self._descriptors: NDArray[np.int64] = np.zeros((spec.blocks, index.FIELDS), np.int64)
        self._seen: NDArray[np.uint8] = np.zeros(spec.blocks, np.uint8)

    # Blocks

    def adopt(self, block: int) -> None:
        """Store a block from now on, empty."""
        self._in_range(block)
        with self._lock:
            if block in self._blocks:
                raise InvalidArgument(f"table {self.spec.name}: block {block} is stored here already; drop it first")
            self._place(block, Block(self._layout, self.salt))

    def drop(self, block: int) -> None:
        """Forget a block and free its memory."""
        self._in_range(block)
        with self._lock:
            self._stored(block)
            self._descriptors[block] = 0
            del self._blocks[block]

    @property
    def owned(self) -> Groups:
        """Return the stored blocks, ascending: int32[m]."""
        with self._lock:
            return np.array(sorted(self._blocks), np.int32)

    @property
    def rows(self) -> int:
        with self._lock:
            return sum(block.rows for block in self._blocks.values())

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated for rows and indexes."""
        with self._lock:
            return self._descriptors.nbytes + sum(block.nbytes for block in self._blocks.values())

    # Requests

    def check(self, keys: Keys, blocks: Groups, counts: Groups, *, unique: bool = False) -> None:
        """Raise Malformed or StalePlacement unless the request can be served; ``unique``: no key twice (a push).

        Pull and push check only what keeps memory safe; a caller that did not group the keys itself calls this first.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        with self._lock:
            self._check_groups(keys.shape[0], blocks, counts)
        fault = np.zeros(1, np.int64)
        places = np.zeros(2 << keys.shape[0].bit_length(), np.int32) if unique else _NO_PLACES
        code = index.check_keys(self.salt, self.bits, keys, blocks, counts, places, fault)
        if code != index.FINE:
            at = int(fault[0])
            fact = "does not hash to the block it is sent for" if code == index.WRONG_BLOCK else "comes twice in a push"
            raise Malformed(
                f"table {self.spec.name}: key {int(keys[at])} at position {at} {fact}; "
                "group and merge keys with KeySorter",
                table=self.spec.name,
            )

    def pull(self, keys: Keys, blocks: Groups, counts: Groups, out: Values) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many rows are present.

        An absent key reads as its first value and stays absent.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        self._values("out", out, keys.shape[0])
        check_output(f"table {self.spec.name}: out", out)
        addresses = np.empty(keys.shape[0], np.int64)
        with self._lock:
            self._check_groups(keys.shape[0], blocks, counts)
            present = index.find_rows(self._descriptors, self.salt, self._layout, keys, blocks, counts, addresses)
            gather_rows(addresses, self._layout, keys, self._origin, self._first, out)
        return int(present)

    def push(self, keys: Keys, blocks: Groups, counts: Groups, gradients: Values, *, rate: float) -> PushCounts:
        """Apply one optimizer step with gradients: float32[n, dim]; absent rows are created at their first value.

        A row whose gradient holds an infinity or NaN is refused: neither changed nor created.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        n = keys.shape[0]
        self._values("gradients", gradients, n)
        gradients = kernel_array("gradients", gradients, np.float32, 2)
        rate = float(rate)
        if not math.isfinite(rate):
            raise InvalidArgument(f"table {self.spec.name}: rate = {rate}: give a finite number")
        flags = np.empty(n, np.uint8)
        refused = int(refuse(gradients.view(np.uint32), flags))
        addresses = np.empty(n, np.int64)
        with self._lock:
            self._check_groups(n, blocks, counts)
            self._make_room(blocks, counts)
            created = index.create_rows(
                self._descriptors,
                self.salt,
                self._layout,
                keys,
                blocks,
                counts,
                flags,
                self._origin,
                self._first,
                self._state,
                addresses,
            )
            self._update(addresses, self.spec.dim, gradients, rate, self._hyper)
        return PushCounts(n - refused, int(created), refused)

    # Whole blocks

    def export_block(self, block: int) -> BlockRows:
        """Return a copy of a stored block's rows, all of one instant."""
        self._in_range(block)
        with self._lock:
            return self._stored(block).export()

    def import_block(self, block: int, content: BlockRows) -> None:
        """Store a block with exactly these rows, replacing what it held; a Malformed content changes nothing."""
        self._in_range(block)
        keys = kernel_array("keys", content.keys, np.uint64)
        weights = kernel_array("weights", content.weights, np.float32, 2)
        state = kernel_array("state", content.state, np.float32, 2)
        where = f"table {self.spec.name}, block {block}"
        for name, array, columns in (("weights", weights, self.spec.dim), ("state", state, self.state_columns)):
            if array.shape != (keys.shape[0], columns):
                raise Malformed(f"{where}: {name} has shape {array.shape}, expected {(keys.shape[0], columns)}")
            if not np.isfinite(array).all():
                raise Malformed(f"{where}: {name} holds an infinity or NaN")
        if keys.shape[0]:
            fault = np.zeros(1, np.int64)
            whole = np.array([[block], [keys.shape[0]]], np.int32)
            if index.check_keys(self.salt, self.bits, keys, whole[0], whole[1], _NO_PLACES, fault) != index.FINE:
                raise Malformed(f"{where}: key {int(keys[fault[0]])} belongs to another block")
        fresh = Block(self._layout, self.salt)
        again = fresh.fill(BlockRows(keys, weights, state))
        if again >= 0:
            raise Malformed(f"{where}: key {int(keys[again])} comes twice")
        with self._lock:
            self._place(block, fresh)

    # Inside

    def _place(self, block: int, content: Block) -> None:
        content.move_descriptor(self._descriptors[block])
        self._blocks[block] = content

    def _in_range(self, block: int) -> None:
        if not 0 <= block < self.spec.blocks:
            raise InvalidArgument(f"table {self.spec.name}: block {block} is not in [0, {self.spec.blocks})")

    def _stored(self, block: int) -> Block:
        found = self._blocks.get(block)
        if found is None:
            self._stale(block)
        return found

    def _stale(self, block: int) -> NoReturn:
        raise StalePlacement(
            f"table {self.spec.name}: block {block} is not stored here; fetch the placement and send again",
            table=self.spec.name,
            block=block,
        )

    def _request(self, keys: Keys, blocks: Groups, counts: Groups) -> tuple[Keys, Groups, Groups]:
        keys = kernel_array("keys", keys, np.uint64)
        blocks = kernel_array("blocks", blocks, np.int32)
        counts = kernel_array("counts", counts, np.int32)
        if blocks.shape != counts.shape:
            raise Malformed(f"table {self.spec.name}: {blocks.shape[0]} blocks but {counts.shape[0]} counts")
        return keys, blocks, counts

    def _values(self, name: str, values: Values, n: int) -> None:
        if values.dtype != np.float32 or values.shape != (n, self.spec.dim):
            raise Malformed(
                f"table {self.spec.name}: {name} is {values.dtype}{list(values.shape)}, "
                f"expected float32[{n}, {self.spec.dim}]"
            )

    def _check_groups(self, n: int, blocks: Groups, counts: Groups) -> None:
        fault = np.zeros(1, np.int64)
        code = index.check_groups(self._descriptors, n, blocks, counts, self._seen, fault)
        if code == index.FINE:
            return
        if code == index.WRONG_SUM:
            raise Malformed(f"table {self.spec.name}: counts add up to {int(fault[0])}, but there are {n} keys")
        group = int(fault[0])
        block = int(blocks[group])
        if code == index.NOT_STORED:
            self._stale(block)
        facts = {
            index.OUT_OF_RANGE: f"block {block} is not in [0, {self.spec.blocks})",
            index.BAD_COUNT: f"the count of block {block} is {int(counts[group])}, expected 1 or more",
            index.REPEATED_BLOCK: f"block {block} comes twice",
        }
        raise Malformed(f"table {self.spec.name}: {facts[code]}", table=self.spec.name, block=block)

    def _make_room(self, blocks: Groups, counts: Groups) -> None:
        tight = np.empty(blocks.shape[0], np.int32)
        found = index.crowded(self._descriptors, blocks, counts, tight)
        for group in tight[:found]:
            block = self._blocks[int(blocks[group])]
            block.reserve(block.rows + int(counts[group]))
