# SPDX-License-Identifier: Apache-2.0
"""An open split: its rows in training order, and how far it came.

Invariant: group n + 1 is pushed only after the push of group n was acknowledged by every block. One event loop.
"""

import asyncio
from dataclasses import dataclass, field

from oarlock.client.feedback import SplitFeedback
from oarlock.data.columns import Arrays, ColumnSpec, offsets_of
from oarlock.data.order import row_order
from oarlock.data.reader import Reader
from oarlock.data.splits import SplitPlan


@dataclass
class OpenSplit:
    """A leased split. Its ``batches`` are of equal size within one row and at most ``batch_rows``.

    A short last batch would move the parameters as far as a full one on a fraction of the evidence. A group is ``accumulate``
    batches, aligned; the last one may have fewer. ``scheduled`` is the next group to prepare; ``pushed`` is set
    once the last group that was computed is acknowledged. ``feedback``: what its groups have left out, where the job keeps that;
    ``encoded`` is set once the last group that was computed has gone through it.
    """

    id: int
    epoch: int
    rows: Arrays
    size: int
    batch_rows: int
    accumulate: int = 1
    scheduled: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    pushed: asyncio.Event | None = field(default=None, repr=False)
    feedback: SplitFeedback | None = field(default=None, repr=False)
    encoded: asyncio.Event | None = field(default=None, repr=False)

    @property
    def batches(self) -> int:
        return -(-self.size // self.batch_rows)

    @property
    def groups(self) -> int:
        return -(-self.batches // self.accumulate)

    def batches_of(self, group: int) -> range:
        """Return the numbers of a group's batches."""
        return range(group * self.accumulate, min((group + 1) * self.accumulate, self.batches))

    def batch(self, number: int) -> Arrays:
        """Return the rows of one batch, as views."""
        run = slice(number * self.size // self.batches, (number + 1) * self.size // self.batches)
        return {name: values[run] for name, values in self.rows.items()}


def read_split(
    reader: Reader, plan: SplitPlan, columns: list[ColumnSpec], *, seed: int, epoch: int, split: int
) -> Arrays:
    """Read a split and put its rows in the order of (seed, epoch, split). List columns are not trained on."""
    arrays = reader.read(plan, columns)
    order = row_order(seed, epoch, split, plan.rows)
    lists = {c.name for c in columns if c.kind == "key_list"}
    lists |= {offsets_of(name) for name in lists}
    return {name: values[order] for name, values in arrays.items() if name not in lists}
