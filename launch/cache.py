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

AUTO = "auto"
HIGHEST = 100  # the upper end of an adaptive bound, unless the job file says another


def cache_of(values: Mapping[str, Any], owner: str) -> CacheSpec:
    """Return the CacheSpec of a table ``[cache.NAME]``; its bound is a number, or "auto" and then at most ``highest``."""
    fields = dict(values)
    if "adaptive" in fields:
        raise InvalidArgument(f"{owner}: unknown field 'adaptive'; write bound = {AUTO!r}")
    if fields.get("bound") != AUTO:
        if "highest" in fields:
            raise InvalidArgument(
                f"{owner}: highest = {fields['highest']!r} is the upper end of bound = {AUTO!r}: "
                "write that, or leave highest out"
            )
        if isinstance(fields.get("bound"), str):
            raise InvalidArgument(f"{owner}: bound = {fields['bound']!r}: give an integer, or {AUTO!r}")
        spec: CacheSpec = build(CacheSpec, fields, owner)
        return spec
    highest = fields.pop("highest", HIGHEST)
    if isinstance(highest, bool) or not isinstance(highest, int) or not 1 <= highest <= 1 << 30:
        raise InvalidArgument(f"{owner}: highest = {highest!r}: give an integer from 1 to {1 << 30}")
    found: CacheSpec = build(CacheSpec, {**fields, "bound": highest, "adaptive": True}, owner)
    return found


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
        replace(table, cache=cache_of(caches[table.name], f"cache.{table.name}")) if table.name in caches else table
        for table in tables
    )
