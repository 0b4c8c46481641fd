# SPDX-License-Identifier: Apache-2.0
"""What a shard lets be observed: what it holds and has done, read off its own counters.

Invariant: nothing is changed and the push lock is not taken, so that a scrape holds up nobody; what is read beside a push
under way may be a push apart. Called from the thread of the page.
"""

from typing import Any

from oarlock.embedding.descriptor import PENDING_KEYS, SPILLED_ROWS
from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import AnyTable
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard
from oarlock.ps.staleness import Staleness
from oarlock.telemetry.histogram import Histogram
from oarlock.telemetry.registry import Source

STALENESS_BOUNDS = 16


def shard_source(service: ShardService, shard: Shard) -> Source:
    """Return the source of the metrics of ``shard``, which ``service`` answers for."""

    def source() -> dict[str, Any]:
        counters, compacted, writing = shard.counters.copy(), service.compacting.told(), service.writing or {}
        return {
            "oarlock_shard_pulls_total": counters["pulls"],
            "oarlock_shard_pushes_total": counters["pushes"],
            "oarlock_shard_pull_seconds": service.pull_seconds,
            "oarlock_shard_push_seconds": service.push_seconds,
            "oarlock_shard_push_staleness": _staleness(shard.staleness),
            "oarlock_shard_pull_bytes_total": counters["pull_bytes"],
            "oarlock_shard_pull_saved_bytes_total": counters["pull_bytes_saved"],
            "oarlock_shard_push_bytes_total": counters["push_bytes"],
            "oarlock_shard_push_saved_bytes_total": counters["push_bytes_saved"],
            "oarlock_shard_blocks": int(shard.owned.sum()),
            "oarlock_shard_generation": shard.generation,
            "oarlock_shard_step": shard.step,
            "oarlock_shard_marks_bytes": shard.marks.nbytes,
            "oarlock_shard_open_splits": shard.marks.splits,
            "oarlock_shard_dense_bytes": sum(d.nbytes for d in shard.dense),
            "oarlock_shard_refused_dense_gradients_total": counters["dense_refused"],
            "oarlock_shard_not_admitted_gradients_total": counters["rows_not_admitted"],
            "oarlock_shard_undone_rows_total": counters["rows_undone"],
            "oarlock_shard_copied_bytes_total": counters["copied_bytes"],
            "oarlock_shard_feed_bytes": shard.feed.nbytes,
            "oarlock_shard_feed_rows_total": shard.feed.rows,
            "oarlock_shard_feed_tombstones_total": shard.feed.tombstones,
            "oarlock_shard_feed_overflows_total": shard.feed.overflows,
            "oarlock_shard_told_bytes_total": shard.changes.bytes,
            "oarlock_shard_told_whole_bytes_total": shard.changes.whole_bytes,
            "oarlock_shard_told_dense_bytes_total": shard.changes.dense.bytes,
            "oarlock_shard_sweep_slices_total": shard.sweeper.slices,
            "oarlock_shard_cut_bytes": {
                state: writing.get(name, 0) for state, name in (("written", "written_bytes"), ("in_all", "bytes"))
            },
            "oarlock_shard_compacted_blocks_total": compacted["blocks"],
            "oarlock_shard_compacted_bytes_total": compacted["bytes"],
            "oarlock_shard_compacting_seconds_total": compacted["seconds"],
            "oarlock_shard_compaction_failures_total": compacted["failed"],
            "oarlock_shard_compactions_due": compacted["due"],
            **_tables(shard),
        }

    return source


def _staleness(found: Staleness) -> Histogram:
    """Return a histogram by powers of two; those that are beyond its last bound are nobody's wish to tell apart."""
    counts = found.counts.copy()
    out = Histogram([(1 << i) - 1 for i in range(STALENESS_BOUNDS)])
    out.counts = [*counts[:STALENESS_BOUNDS], sum(counts[STALENESS_BOUNDS:])]
    out.sum = found.total
    return out


def _tables(shard: Shard) -> dict[str, dict[str, int]]:
    tables = {t.spec.name: t for t in shard.tables}
    return {
        "oarlock_table_rows": {name: t.rows for name, t in tables.items()},
        "oarlock_table_bytes": {name: t.nbytes for name, t in tables.items()},
        "oarlock_table_asked_rows_total": dict(zip(tables, shard.rows_asked, strict=True)),
        "oarlock_table_pulled_rows_total": dict(zip(tables, shard.rows_pulled, strict=True)),
        "oarlock_table_pushed_rows_total": dict(zip(tables, shard.rows_pushed, strict=True)),
        "oarlock_table_refused_gradients_total": {name: t.refused for name, t in tables.items()},
        "oarlock_table_waiting_keys": {name: _sum(t, PENDING_KEYS) for name, t in tables.items()},
        "oarlock_table_spilled_rows": {name: _sum(t, SPILLED_ROWS) for name, t in tables.items()},
        # Of a table whose rows have all their parts from the first there is nothing to say.
        "oarlock_table_expanded_rows": {
            name: t.expanded for name, t in tables.items() if isinstance(t, ExpandingTable)
        },
        "oarlock_table_evicted_rows_total": {name: t.evicted for name, t in tables.items()},
    }


def _sum(table: AnyTable, field: int) -> int:
    return int(table.descriptors[:, field].sum())
