# SPDX-License-Identifier: Apache-2.0
"""Row groups through plain pyarrow.

Invariant: the table has exactly the rows of the split's row groups, in file order. It decodes in the caller's thread:
a worker's cores belong to its kernels. Holds nothing between calls.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from oarlock.data.splits import SplitPlan


class ArrowTables:
    """The TableSource of ``--reader arrow``."""

    def table(self, plan: SplitPlan, names: Sequence[str]) -> Any:
        """Return the Arrow table of a split's row groups with the named columns."""
        groups = list(range(plan.first_group, plan.stop_group))
        with pq.ParquetFile(plan.file.path) as file:
            return file.read_row_groups(groups, columns=list(names), use_threads=False)
