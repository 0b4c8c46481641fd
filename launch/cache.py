# SPDX-License-Identifier: Apache-2.0
"""The caches of a job file: which tables of the recipe workers keep rows of (docs/cache.md).

Invariant: every table that is named is one of the recipe's, and every field one of CacheSpec. Pure functions.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarlock.embedding.spec import CacheSpec, TableSpec
from oarlock.launch.config import build
from oarlock.proto.errors import InvalidArgument


def with_caches(tables: tuple[TableSpec, ...], caches: Mapping[str, Any]) -> tuple[TableSpec, ...]:
    """Return the recipe's tables with the caches of the tables ``[cache.NAME]`` of a job file."""
    known = [table.name for table in tables]
    for name, values in caches.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InvalidArgument(f"cache.{name}: the recipe has no such table{hint} Its tables: {', '.join(known)}")
        if not isinstance(values, Mapping):
            raise InvalidArgument(f"cache.{name} = {values!r}: give a table with rows, bound and policy")
        if "rows" not in values:
            raise InvalidArgument(f"cache.{name}: rows must be given: how many rows of the table a worker keeps")
    return tuple(
        replace(table, cache=build(CacheSpec, caches[table.name], f"cache.{table.name}"))
        if table.name in caches
        else table
        for table in tables
    )
