# SPDX-License-Identifier: Apache-2.0
"""Stats: what a shard holds and has done, JSON-ready, for the coordinator and people. A pure view; what is read beside a push may
be a push apart.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from oarlock.embedding.descriptor import PENDING_KEYS, ROWS, SPILLED_ROWS
from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import AnyTable

if TYPE_CHECKING:
    from oarlock.ps.shard import Shard

# What policies did, by table: keys that wait for a row, rows in the spill file, rows that were expanded, and since the shard
# began rows evicted and gradients refused.
_TOLD: dict[str, Callable[[AnyTable], int]] = {
    "waiting": lambda table: int(table.descriptors[:, PENDING_KEYS].sum()),
    "spilled": lambda table: int(table.descriptors[:, SPILLED_ROWS].sum()),
    "expanded": lambda table: table.expanded if isinstance(table, ExpandingTable) else 0,
    "evicted": lambda table: table.evicted,
    "refused": lambda table: table.refused,
}


def stats_of(shard: "Shard") -> dict[str, Any]:
    """Return what a shard holds and has done. Rows are those that it owns; bytes are of copies of others' blocks, too."""
    copies = int(shard.holdings.copies.sum())
    rows = {table.spec.name: _owned_rows(shard, number) for number, table in enumerate(shard.tables)}
    return {
        **dict(shard.counters),
        "staleness": shard.staleness.summary(),
        "rows": sum(rows.values()),
        "bytes": sum(t.nbytes for t in shard.tables) + sum(d.nbytes for d in shard.dense),
        "marks_bytes": shard.marks.nbytes,
        **({"staged_bytes": shard.staged.nbytes} if shard.staged is not None else {}),
        "blocks": int(shard.owned.sum()),
        **({"copies": copies} if copies else {}),
        "sweeps": shard.sweeper.slices,
        "tables": rows,
        "table_bytes": {t.spec.name: t.nbytes for t in shard.tables},
        # Rows that workers asked for and pushed.
        "table_served": {
            t.spec.name: asked + pushed
            for t, asked, pushed in zip(shard.tables, shard.rows_asked, shard.rows_pushed, strict=True)
        },
        # Of most tables there is nothing to say here.
        **{what: found for what in _TOLD if (found := _told(shard, what))},
    }


def _owned_rows(shard: "Shard", number: int) -> int:
    """Return how many rows a table's blocks have that are owned here."""
    table, base = shard.tables[number], shard.layout.table_base[number]
    words = table.descriptors[shard.owned[base : base + table.spec.blocks]]
    return int(words[:, ROWS].sum() + words[:, SPILLED_ROWS].sum())


def _told(shard: "Shard", what: str) -> dict[str, int]:
    return {t.spec.name: n for t in shard.tables if (n := _TOLD[what](t))}
