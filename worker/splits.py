# SPDX-License-Identifier: Apache-2.0
"""An open split: its rows in training order, how far it came, and its last push.

Invariant: group n + 1 is pushed only after the push of group n was acknowledged by every block. One event loop.
"""

import asyncio
from dataclasses import dataclass, field

from oarlock.client.push import PushCounts
from oarlock.data.columns import Arrays, ColumnSpec, offsets_of
from oarlock.data.order import row_order
from oarlock.data.reader import Reader
from oarlock.data.splits import SplitPlan


@dataclass
class OpenSplit:
    """A leased split. ``groups`` are its batches, of equal size within one row and at most ``batch_rows``.

    A short last batch would move the parameters as far as a full one on a fraction of the evidence. ``scheduled`` is the
    next batch to prepare.
    """

    id: int
    epoch: int
    rows: Arrays
    size: int
    batch_rows: int
    scheduled: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    pushing: asyncio.Task[PushCounts] | None = field(default=None, repr=False)

    @property
    def groups(self) -> int:
        return -(-self.size // self.batch_rows)

    def batch(self, group: int) -> Arrays:
        """Return the rows of one batch, as views."""
        run = slice(group * self.size // self.groups, (group + 1) * self.size // self.groups)
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
