# SPDX-License-Identifier: Apache-2.0
"""A dense parameter: float32 values by flat position, cut into blocks of one size (the last may be shorter).

    memory of a block of n values:   w0 ... w(n-1) | optimizer state, as a row of dim n has it

Invariant: a block is one row, so the update kernels of ``embedding/update.py`` serve it as they are. Callable from any
thread: one lock per parameter, held while kernels run.
"""

import math
import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.initial import constants, first_dense, origin
from oarlock.embedding.optimizer import hyper_of, optimizer_of
from oarlock.embedding.pointer import address_of, kernel_array
from oarlock.embedding.spec import DenseSpec
from oarlock.embedding.update import refuse
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

Values = NDArray[np.float32]


class DenseBlock(NamedTuple):
    """A dense block's content: weights: float32[length], state: float32[state columns of that length]."""

    weights: Values
    state: Values


class DenseParameter:
    """The values of ``spec`` in the adopted blocks. ``seed`` is the job's, in [0, 2^64)."""

    def __init__(self, spec: DenseSpec, *, seed: int) -> None:
        self.spec = spec
        self._optimizer = optimizer_of(spec.optimizer)
        self._hyper = hyper_of(spec.optimizer)
        self._origin = origin(seed, f"dense/{spec.name}")  # no table's name holds a slash
        self._first = constants(spec.initializer)
        self._lock = threading.Lock()
        self._blocks: dict[int, Values] = {}

    def length(self, block: int) -> int:
        """Return the number of values in a block."""
        self._in_range(block)
        return min(self.spec.slice, self.spec.size - block * self.spec.slice)

    def state_length(self, block: int) -> int:
        """Return the number of state values of a block."""
        return self._optimizer.state_columns(self.length(block))

    def adopt(self, block: int) -> None:
        """Store a block from now on, at its first values."""
        length = self.length(block)
        fresh = np.empty(length + self.state_length(block), np.float32)
        first_dense(self._origin, block * self.spec.slice, self._first, fresh[:length])
        fresh[length:] = self._optimizer.initial_state(self.spec.optimizer, length)
        with self._lock:
            if block in self._blocks:
                raise InvalidArgument(f"dense {self.spec.name}: block {block} is stored here already; drop it first")
            self._blocks[block] = fresh

    def drop(self, block: int) -> None:
        """Forget a block and free its memory."""
        self._in_range(block)
        with self._lock:
            self._stored(block)
            del self._blocks[block]

    @property
    def owned(self) -> NDArray[np.int32]:
        """Return the stored blocks, ascending: int32[m]."""
        with self._lock:
            return np.array(sorted(self._blocks), np.int32)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(block.nbytes for block in self._blocks.values())

    def pull_block(self, block: int, out: Values) -> None:
        """Copy a block's weights to out: float32[length]."""
        length = self.length(block)
        self._values("out", out, block, length)
        with self._lock:
            out[:] = self._stored(block)[:length]

    def push_block(self, block: int, gradient: Values, *, rate: float) -> bool:
        """Apply one optimizer step with gradient: float32[length]; False = refused, it holds an infinity or NaN."""
        length = self.length(block)
        self._values("gradient", gradient, block, length)
        rate = float(rate)
        if not math.isfinite(rate):
            raise InvalidArgument(f"dense {self.spec.name}: rate = {rate}: give a finite number")
        line = kernel_array("gradient", gradient, np.float32).reshape(1, length)
        bad = bool(refuse(line.view(np.uint32), np.empty(1, np.uint8)))
        with self._lock:
            row = self._stored(block)
            if not bad:
                self._optimizer.update(np.array([address_of(row)], np.int64), length, line, rate, self._hyper)
        return not bad

    def export_block(self, block: int) -> DenseBlock:
        """Return a copy of a stored block, all of one instant."""
        length = self.length(block)
        with self._lock:
            row = self._stored(block)
            return DenseBlock(row[:length].copy(), row[length:].copy())

    def import_block(self, block: int, content: DenseBlock) -> None:
        """Store a block with exactly this content, replacing what it held; a Malformed content changes nothing."""
        self._values("weights", content.weights, block, self.length(block))
        self._values("state", content.state, block, self.state_length(block))
        fresh = np.concatenate([content.weights, content.state])
        if not np.isfinite(fresh).all():
            raise Malformed(f"dense {self.spec.name}, block {block}: content holds an infinity or NaN")
        with self._lock:
            self._blocks[block] = fresh

    def _in_range(self, block: int) -> None:
        if not 0 <= block < self.spec.blocks:
            raise InvalidArgument(f"dense {self.spec.name}: block {block} is not in [0, {self.spec.blocks})")

    def _stored(self, block: int) -> Values:
        found = self._blocks.get(block)
        if found is None:
            raise StalePlacement(
                f"dense {self.spec.name}: block {block} is not stored here; fetch the placement and send again",
                dense=self.spec.name,
                block=block,
            )
        return found

    def _values(self, name: str, values: Values, block: int, length: int) -> None:
        if values.dtype != np.float32 or values.shape != (length,):
            raise Malformed(
                f"dense {self.spec.name}, block {block}: {name} is {values.dtype}{list(values.shape)}, "
                f"expected float32[{length}]"
            )
