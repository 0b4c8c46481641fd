# SPDX-License-Identifier: Apache-2.0
"""A dense parameter: float32 values by flat position, cut into blocks of one size (the last may be shorter).

    memory of a block of n values:   w0 ... w(n-1) | optimizer state, as a row of dim n has it

Invariant: a block is one row, so the optimizers of ``embedding/optimizers.py`` serve it as they are; norms are taken over a
block, and lamb, which needs whole ones, is refused where a parameter has several blocks. ``where`` names the memory of every
stored block, 0 for others. Callable from any thread: one lock per parameter, or of a group (``embedding/dense_group.py``), held
while kernels run.
"""

import math
import threading

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.dense_block import DenseBlock as DenseBlock
from oarlock.embedding.dense_view import DenseLedger, DenseView
from oarlock.embedding.initial import constants, first_dense, origin
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.pointer import address_of, kernel_array
from oarlock.embedding.refusal import limit_bits, refuse
from oarlock.embedding.regularise import BEFORE, passes, update_rows
from oarlock.embedding.spec import DenseSpec
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

Values = NDArray[np.float32]


def checked_rate(what: str, rate: float, step: int) -> float:
    """Return the learning rate of a push as a float; InvalidArgument if it, or the step, is none."""
    rate = float(rate)
    if not math.isfinite(rate):
        raise InvalidArgument(f"{what}: rate = {rate}: give a finite number")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 63:
        raise InvalidArgument(f"{what}: step = {step!r}: give an integer from 0 to 2^63 - 1")
    return rate


class DenseParameter:
    """The values of ``spec`` in the adopted blocks. ``seed`` is the job's, in [0, 2^64).

    ``where`` int64[blocks], zeros, and ``ledger``, whose blocks from number ``first`` on they are: of the group that the
    parameter is in.
    """

    def __init__(
        self,
        spec: DenseSpec,
        *,
        seed: int,
        where: NDArray[np.int64] | None = None,
        ledger: DenseLedger | None = None,
        first: int = 0,
    ) -> None:
        self.spec = spec
        self._optimizer = optimizer_of(spec.optimizer)
        if spec.optimizer.name == "lamb" and spec.blocks > 1:
            raise InvalidArgument(
                f"dense {spec.name}: lamb needs the norm of the whole parameter: give slice >= {spec.size}, its size"
            )
        self.hyper = self._optimizer.hyper(spec.optimizer)
        self.passes = passes(spec.optimizer)
        self._origin = origin(seed, f"dense/{spec.name}")  # no table's name holds a slash
        self._first = constants(spec.initializer)
        self._grouped = ledger is not None
        self._ledger = DenseLedger(spec.blocks, threading.Lock()) if ledger is None else ledger
        self._number = first
        self._lock = self._ledger.lock
        self._blocks: dict[int, Values] = {}
        self._where = np.zeros(spec.blocks, np.int64) if where is None else where

    @property
    def update(self) -> int:
        """Return the address of the optimizer's callback."""
        address: int = self._optimizer.update.address
        return address

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
            self._store(block, fresh)

    def drop(self, block: int) -> None:
        """Forget a block and free its memory."""
        self._in_range(block)
        with self._lock:
            self._stored(block)
            self._ledger.forget(self._number + block)
            self._where[block] = 0
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

    def push_block(self, block: int, gradient: Values, *, rate: float, step: int = 1) -> bool:
        """Apply one optimizer step with gradient: float32[length]; False = refused, it holds an infinity or NaN.

        ``rate`` is the learning rate before the parameter's schedule, ``step`` the job's step, from 1.
        """
        length = self.length(block)
        self._values("gradient", gradient, block, length)
        rate = checked_rate(f"dense {self.spec.name}", rate, step) * self.spec.optimizer.schedule.factor(step)
        line = kernel_array("gradient", gradient, np.float32).reshape(1, length)
        bad = bool(refuse(line.view(np.uint32), limit_bits(), np.empty(1, np.uint8)))
        with self._lock:
            row = self._stored(block)
            if not bad:
                self._ledger.before_change(np.array([self._number + block], np.int64))
                self._update(row, length, line, rate, step)
        return not bad

    def export_block(self, block: int) -> DenseBlock:
        """Return a copy of a stored block, all of one instant."""
        length = self.length(block)
        with self._lock:
            row = self._stored(block)
            return DenseBlock(row[:length].copy(), row[length:].copy())

    def import_block(self, block: int, content: DenseBlock) -> None:
        """Store a block with exactly this content, replacing what it held; a Malformed content changes nothing."""
        fresh = self._joined(block, content)
        if not np.isfinite(fresh).all():
            raise Malformed(f"dense {self.spec.name}, block {block}: content holds an infinity or NaN")
        with self._lock:
            self._store(block, fresh)

    def export_live(self, block: int) -> DenseBlock:
        """Return a copy of all that operations on a stored block depend on, which is no more than its content."""
        return self.export_block(block)

    def import_live(self, block: int, live: DenseBlock) -> None:
        """Store a block that is the one that ``live`` was made of, whatever values that has (``embedding/live.py``)."""
        fresh = self._joined(block, live)
        with self._lock:
            self._store(block, fresh)

    def _joined(self, block: int, content: DenseBlock) -> Values:
        """Return a content as the memory of a block; Malformed unless it has the shape of one."""
        self._values("weights", content.weights, block, self.length(block))
        self._values("state", content.state, block, self.state_length(block))
        return np.concatenate([content.weights, content.state])

    def begin_view(self, number: int) -> DenseView:
        """Begin view ``number`` of all stored blocks (``embedding/dense_view.py``); not of a parameter in a group."""
        self._alone()
        return self._ledger.begin_view(number)

    def commit_view(self, number: int) -> bool:
        """Let changes count from view ``number``, which is on disk; False, and nothing is done, if another one began later."""
        self._alone()
        return self._ledger.commit_view(number)

    def _alone(self) -> None:
        if self._grouped:
            raise InvalidArgument(f"dense {self.spec.name} is in a group: views are begun and committed by that")

    def _store(self, block: int, row: Values) -> None:
        self._ledger.store(self._number + block, row, self.length(block))
        self._where[block] = address_of(row)
        self._blocks[block] = row

    def _update(self, row: Values, length: int, line: Values, rate: float, step: int) -> None:
        weights = np.array([address_of(row)], np.int64)
        states = weights + 4 * length
        scratch = np.empty(length if self.passes & BEFORE else 0, np.float32)
        update_rows(
            self.update,
            self.passes,
            address_of(weights),
            address_of(states),
            1,
            address_of(line),
            line.strides[0],
            length,
            rate,
            step,
            address_of(self.hyper),
            address_of(scratch),
        )

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
