# SPDX-License-Identifier: Apache-2.0
"""Caches: the row caches of one worker, and what one pull asks with and gets because of them.

    Caches.ask     copies out what is kept of a pull's keys, and notes the versions
    Asked.request  says to a shard which versions are kept
    Asked.take     puts what came of a piece into its place; of a piece that was asked for twice, the last answer counts
    Asked.keep     once the pull is complete: keeps what came

Invariant: what is kept is of one run and one placement, and versions are told under no other one. A restore goes back to
lower versions; a block that was elsewhere may have forgotten what it evicted, and would count a new row's updates from 1 again.
So what an answer says about a kept row is always said of the row that is kept. One event loop, but for ``take`` of pieces
that have no key in common.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.cache import RowCache
from oarlock.client.pieces import Piece
from oarlock.embedding.keys import KeySet
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.versions import MOST
from oarlock.proto.arrays import Part, pack
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import Malformed
from oarlock.proto.shard_pb2 import TableKeys

Rows = NDArray[np.float32]


class _Table:
    """What a pull keeps in mind of one table: by key the version that was kept, whether its row came, and with which version."""

    def __init__(self, cache: RowCache, keys: NDArray[np.uint64], rows: Rows, bound: int) -> None:
        self.cache, self.keys, self.rows, self.bound = cache, keys, rows, bound
        self.kept = cache.versions_of(keys, rows)
        self.came: NDArray[np.bool_] = np.zeros(len(keys), np.bool_)
        self.versions: NDArray[np.uint32] = np.zeros(len(keys), np.uint32)


class Asked:
    """One pull of a worker with caches: tables by name, those that have one."""

    def __init__(self, caches: "Caches", place: tuple[int, int], tables: dict[str, _Table]) -> None:
        self._caches = caches
        self._place = place
        self._tables = tables

    def __contains__(self, name: str) -> bool:
        return name in self._tables

    def request(self, header: Header, name: str, piece: Piece, message: TableKeys, parts: list[Part] | None) -> None:
        """Add to ``message``, which asks for a piece of table ``name``, what is kept of it."""
        table = self._tables[name]
        if (header.run, header.generation) != self._place:
            # Cut anew by a newer placement, or one came between: these rows have to come.
            table.kept[piece.rows] = 0
        message.versions.CopyFrom(pack(table.kept[piece.rows].copy(), parts))
        message.bound = table.bound

    def take(
        self, name: str, piece: Piece, positions: NDArray[np.int32], versions: NDArray[np.uint32], rows: Rows
    ) -> None:
        """Put the rows: float32[m, dim] of a piece's keys at positions: int32[m] into their place.

        Malformed, before anything is changed, unless they are each there once, in order, with every row that is not kept.
        """
        table, n, m = self._tables[name], piece.size, len(positions)
        if len(rows) != m or len(versions) != m:
            raise Malformed(f"{len(rows)} rows and {len(versions)} versions of {name} for {m} positions")
        if m and not (positions[0] >= 0 and positions[-1] < n and (positions[1:] > positions[:-1]).all()):
            raise Malformed(f"rows of {name} came for positions that are not ascending within 0 to {n - 1}")
        came = np.zeros(n, np.bool_)
        came[positions] = True
        lacking = (table.kept[piece.rows] == 0) & ~came
        if lacking.any():
            at = int(lacking.argmax())
            key = int(table.keys[piece.rows][at])
            raise Malformed(f"the row of key {key} of {name} did not come, and no row of it is kept")
        table.came[piece.rows] = came
        where = piece.rows.start + positions if isinstance(piece.rows, slice) else piece.rows[positions]
        table.versions[where] = versions
        table.rows[where] = rows

    def lags(self, name: str) -> NDArray[np.int64]:
        """Return how many updates each row that was kept of a table lacked: int64[n], once the pull is complete.

        -1: none was kept, or it could not be used under any bound. Of rows that did not come nobody here knows it: 0, which
        holds if the bound was 0.
        """
        table = self._tables[name]
        lags = np.where(table.came, table.versions.astype(np.int64) - table.kept, 0)
        lags[(table.kept == 0) | (lags < 0) | (table.came & (table.versions == MOST))] = -1
        return lags

    def keep(self) -> None:
        """Keep what came, now that all of it did; unless the caches were emptied since the pull began."""
        if self._caches.place != self._place:
            return
        for table in self._tables.values():
            table.cache.merge_in_place(table.keys, table.kept, table.came, table.versions, table.rows)


class Caches:
    """A RowCache for each of ``tables`` whose spec has one, by name; ``bounds``: those that pulls ask with, from now on."""

    def __init__(self, tables: Iterable[TableSpec]) -> None:
        self.of = {spec.name: RowCache(spec.cache, spec.dim) for spec in tables if spec.cache is not None}
        self.bounds = {name: cache.spec.bound for name, cache in self.of.items()}
        self.place = (0, 0)

    def ask(
        self,
        run: int,
        generation: int,
        keys: Mapping[str, KeySet],
        rows: Mapping[str, Rows],
        *,
        fresh: Container[str] = (),
    ) -> Asked:
        """Begin a pull under a placement: write what is kept of ``keys`` to ``rows``, and remember which that is.

        ``fresh``: tables whose rows come if they lack a single update.
        """
        place = (run, generation)
        if place != self.place:
            for cache in self.of.values():
                cache.clear()
            self.place = place
        tables = {
            name: _Table(cache, keys[name].keys, rows[name], 0 if name in fresh else self.bounds[name])
            for name, cache in self.of.items()
            if name in keys
        }
        return Asked(self, place, tables)

    def told(self) -> dict[str, dict[str, Any]]:
        """Return what each cache holds and has done, as a worker's statistics tell it."""
        return {
            name: {
                "rows": len(cache),
                "bound": self.bounds[name],
                "hits": cache.hits,
                "misses": cache.misses,
                "outdated": cache.outdated,
                "evictions": cache.evictions,
                "saved_bytes": cache.saved_bytes,
            }
            for name, cache in self.of.items()
        }
