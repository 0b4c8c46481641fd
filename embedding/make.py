# SPDX-License-Identifier: Apache-2.0
"""Which class serves a table's spec. No state, any thread."""

from pathlib import Path

from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.table import Table

AnyTable = Table | ExpandingTable


def make_table(spec: TableSpec, *, seed: int, spill_folder: Path | None = None) -> AnyTable:
    """Return an empty table of ``spec``; cold rows, if it spills any, go to ``spill_folder``."""
    if spec.expand_score:
        return ExpandingTable(spec, seed=seed)  # a spec that spills has no expand_score
    return Table(spec, seed=seed, spill_folder=spill_folder)
