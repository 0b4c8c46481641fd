# SPDX-License-Identifier: Apache-2.0
"""All dense parameters of a process: their blocks pulled and pushed by one kernel call a request, not one a block.

Invariant: the parameters share one lock, held while a kernel runs, so a pull sees no block in the middle of an update; what a
push does to a block is what `DenseParameter.push_block` does. Callable from any thread.
"""

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.dense import DenseParameter, checked_rate
from oarlock.embedding.dense_view import DenseLedger, DenseView
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, address_in, address_of, copy, kernel_array
from oarlock.embedding.refusal import limit_bits, poisonous
from oarlock.embedding.regularise import BEFORE, update_rows
from oarlock.embedding.spec import DenseSpec
from oarlock.proto.errors import Malformed, StalePlacement

Values = NDArray[np.float32]
Numbers = NDArray[np.int64]

# Columns of what the kernels know of a block: its memory (0: not stored here), values, callback, passes and constants of its
# optimizer. The first is written whenever a block comes or goes.
WHERE: Final = 0
LENGTH: Final = 1
UPDATE: Final = 2
PASSES: Final = 3
HYPER: Final = 4
COLUMNS: Final = 5


@jit
def pull_blocks(blocks: Numbers, known: Numbers, out: Int) -> int:
    """Copy the weights of ``blocks`` one behind the other to an address; return -1, or the position of one that is not stored."""
    for i in range(len(blocks)):
        if known[WHERE, blocks[i]] == 0:
            return i
    for i in range(len(blocks)):
        size = 4 * known[LENGTH, blocks[i]]
        copy(out, known[WHERE, blocks[i]], size)
        out += size
    return -1


@jit
def push_blocks(
    blocks: Numbers,
    starts: Numbers,
    known: Numbers,
    gradients: Int,
    rates: NDArray[np.float64],
    step: Int,
    limit: np.uint32,
    scratch: Values,
    refused: NDArray[np.uint8],
) -> int:
    """Apply to each of ``blocks`` the gradient that starts at ``starts`` of those at an address, or mark it as refused.

    ``scratch`` has room for one prepared gradient. Return -1, or the position of a block that is not stored: nothing was changed.
    """
    for i in range(len(blocks)):
        if known[WHERE, blocks[i]] == 0:
            return i
    row = np.empty(2, np.int64)
    for i in range(len(blocks)):
        block = blocks[i]
        length = known[LENGTH, block]
        gradient = gradients + 4 * starts[i]
        refused[i] = poisonous(gradient, length, limit)
        if refused[i]:
            continue
        row[0] = known[WHERE, block]
        row[1] = row[0] + 4 * length
        update_rows(
            known[UPDATE, block],
            known[PASSES, block],
            address_in(row, 0),
            address_in(row, 8),
            1,
            gradient,
            4 * length,
            length,
            rates[i],
            step,
            known[HYPER, block],
            address_in(scratch, 0),
        )
    return -1


class DenseGroup:
    """The dense ``parameters`` of ``specs``; their blocks are numbered through, in the order of the specs."""

    def __init__(self, specs: Sequence[DenseSpec], *, seed: int) -> None:
        self._lock = threading.Lock()
        blocks = sum(spec.blocks for spec in specs)
        self._ledger = DenseLedger(blocks, self._lock)
        self._known = np.zeros((COLUMNS, blocks), np.int64)
        self.parameters: list[DenseParameter] = []
        # By block: which of the schedules, which are few, it follows.
        self._schedules = list(dict.fromkeys(spec.optimizer.schedule for spec in specs))
        self._schedule = np.zeros(blocks, np.int64)
        at = 0
        for spec in specs:
            mine = slice(at, at + spec.blocks)
            parameter = DenseParameter(spec, seed=seed, where=self._known[WHERE, mine], ledger=self._ledger, first=at)
            self._known[LENGTH, mine] = [parameter.length(block) for block in range(spec.blocks)]
            self._known[UPDATE, mine] = parameter.update
            self._known[PASSES, mine] = parameter.passes
            self._known[HYPER, mine] = address_of(parameter.hyper)
            self._schedule[mine] = self._schedules.index(spec.optimizer.schedule)
            self.parameters.append(parameter)
            at += spec.blocks
        before = (self._known[PASSES] & BEFORE) != 0
        self._scratch = int(self._known[LENGTH][before].max(initial=0))

    @property
    def lengths(self) -> Numbers:
        """Return the values of each block: int64[blocks]."""
        found: Numbers = self._known[LENGTH]
        return found

    def stored(self, blocks: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Return bool[m]: which of ``blocks`` are stored here."""
        found: NDArray[np.bool_] = self._known[WHERE, blocks] != 0
        return found

    def pull(self, blocks: Numbers, out: Values) -> None:
        """Copy the weights of ``blocks`` int64[m], one behind the other, to out: float32[their lengths in all]."""
        self._fits("out", out, int(self.lengths[blocks].sum()))
        with self._lock:
            self._found(blocks, pull_blocks(blocks, self._known, address_of(out)))

    def lives(self, blocks: Numbers) -> Numbers:
        """Return int64[m]: how often each of ``blocks`` int64[m] has come or gone here; pushes do not count."""
        found: Numbers = self._ledger.lives[blocks]
        return found

    def push(
        self, blocks: Numbers, starts: Numbers, gradients: Values, *, rate: float, step: int = 1
    ) -> NDArray[np.uint8]:
        """Apply one optimizer step to ``blocks`` int64[m], with gradients from ``starts`` int64[m] of float32[n] on.

        Return uint8[m]: 1 where a gradient was refused, since it holds an infinity or NaN. ``rate`` and ``step`` as in
        `DenseParameter.push_block`. A StalePlacement error changes nothing.
        """
        rate = checked_rate("dense parameters", rate, step)
        values = kernel_array("gradients", gradients, np.float32)
        ends = starts + self.lengths[blocks]
        if len(blocks) and not (starts.min() >= 0 and ends.max() <= len(values)):
            raise Malformed(f"{len(values)} dense gradients came, the blocks reach to {int(ends.max())}")
        factors = np.array([schedule.factor(step) for schedule in self._schedules], np.float64)
        rates = rate * factors[self._schedule[blocks]]
        refused = np.zeros(len(blocks), np.uint8)
        scratch = np.empty(self._scratch, np.float32)
        at = address_of(values)
        with self._lock:
            self._ledger.before_change(blocks)
            missing = push_blocks(blocks, starts, self._known, at, rates, step, limit_bits(), scratch, refused)
            self._found(blocks, missing)
        return refused

    def begin_view(self, number: int) -> DenseView:
        """Begin view ``number`` of all stored blocks, by their numbers, and end an older one (``embedding/dense_view.py``)."""
        return self._ledger.begin_view(number)

    def commit_view(self, number: int) -> bool:
        """Let changes count from view ``number``, which is on disk; False, and nothing is done, if another one began later."""
        return self._ledger.commit_view(number)

    def _found(self, blocks: Numbers, missing: int) -> None:
        if missing >= 0:
            block = int(blocks[missing])
            raise StalePlacement(
                f"dense block {block} is not stored here; fetch the placement and send again", block=block
            )

    def _fits(self, name: str, values: Values, length: int) -> None:
        if values.dtype != np.float32 or values.shape != (length,) or not values.flags.c_contiguous:
            raise Malformed(
                f"dense parameters: {name} is {values.dtype}{list(values.shape)}, expected float32[{length}]"
            )
