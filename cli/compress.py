# SPDX-License-Identifier: Apache-2.0
"""`oarlock compress`: a checkpoint with smaller tables for serving, and what that costs: bytes, time of look-ups, quality.

Invariant: the result is standard output, how far it is standard error. Quality is told where the job's folder and data are at
hand; where they are not, it says so.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from oarlock.cli.export_progress import bytes_progress
from oarlock.cli.show import result_console
from oarlock.export.compress import compress, cost
from oarlock.export.evaluation import evaluate
from oarlock.export.method import FIELDS, NONE, SHARES, Method, read_method
from oarlock.export.tables import chosen_tables, dense_values
from oarlock.launch.origin import Origin, find_origin, reading
from oarlock.proto.errors import InvalidArgument, PSError
from oarlock.serving.snapshot import Snapshot, open_snapshot


def compress_command(options: argparse.Namespace) -> int:
    """Write the copy; say what it costs."""
    general, of_tables, only = _methods(options)
    origin = find_origin(options.checkpoint)
    with reading(origin.path):
        names = [spec.name for spec in chosen_tables(origin.manifest, [*only, *of_tables])]
        if general is not None and not only:
            names = list(origin.manifest.table_specs())
        methods = {name: of_tables.get(name) or general or Method(NONE) for name in names}
        with bytes_progress("compressing") as show:
            made = compress(origin.store, origin.manifest, methods, Path(options.to), progress=show)
        before = open_snapshot(origin.store, origin.manifest, trust=True)
        after = open_snapshot(made, origin.manifest)
        facts: dict[str, Any] = {"cut": origin.manifest.cut, "to": options.to, "tables": {}}
        for name, method in methods.items():
            costs = {"before": asdict(cost(before.tables[name])), "after": asdict(cost(after.tables[name]))}
            facts["tables"][name] = {"method": method.name, **costs}
        facts |= {"why": "--no-evaluation"} if options.no_evaluation else _quality(origin, before, after)
    print(json.dumps(facts)) if options.json else _print(facts)
    return 0


def _methods(options: argparse.Namespace) -> tuple[Method | None, dict[str, Method], list[str]]:
    """Return --method, what --table says of other tables, and those tables that --method is for alone."""
    own = {
        name: read_method(text, options.by or "") for name, _, text in map(_parted, options.table) if text is not None
    }
    only = [name for name, _, text in map(_parted, options.table) if text is None]
    if len({*own, *only}) < len(options.table):
        raise InvalidArgument("--table names one table twice: give each a method of its own, or none")
    if options.method is None:
        if only or not own:
            raise InvalidArgument("give --method METHOD, or a method for each table: --table T=METHOD")
        named = [("--parts", options.parts), ("--keep", options.keep)]
        if wrong := [name for name, value in named if value is not None]:
            raise InvalidArgument(f"{wrong[0]} is for --method: write it behind the table's method, as in T=pq:8")
    for name, value, field in (("--parts", options.parts, "parts"), ("--keep", options.keep, "keep")):
        if value is not None and field not in FIELDS.get(options.method, ()):
            raise InvalidArgument(f"{name} and --method {options.method} contradict each other: leave one of them out")
    if options.by and not any(name in SHARES for name in (options.method, *(each.name for each in own.values()))):
        raise InvalidArgument("--by is for mixed and prune, which choose rows: leave it out")
    if options.method is None:
        return None, own, only
    by = options.by if options.method in SHARES and options.by else ""
    return Method(options.method, options.parts or 0, options.keep or 0.0, by), own, only


def _parted(text: str) -> tuple[str, str, str | None]:
    """Return (table, "=", method), the method None if there is none."""
    name, sign, method = text.partition("=")
    return name, sign, method if sign else None


def _quality(origin: Origin, before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """Return the metrics before and after, or why there are none."""
    spec = origin.spec
    if spec is None:
        return {"why": "the job's folder, which names its data, is not beside the checkpoint"}
    try:
        parameters = dense_values(origin.store, origin.manifest)
        return {"metrics": {n: evaluate(spec, s.tables, parameters) for n, s in (("before", before), ("after", after))}}
    except (PSError, OSError) as error:
        return {"why": f"it cannot be evaluated: {error}"}


def _print(facts: dict[str, Any]) -> None:
    table = Table("", "", "before", "after", "ratio", title=f"cut {facts['cut']} in {facts['to']}")
    table.title_justify = "left"
    for name, costs in facts["tables"].items():
        first = f"{name}: {costs['method']}"
        for label, field in (
            ("rows", "rows"),
            ("bytes of a row", "row_bytes"),
            ("bytes of all rows", "values_bytes"),
            ("bytes of keys, rows and index", "bytes"),
            ("microseconds to look up 1,000", "lookup_us"),
        ):
            was, now = costs["before"][field], costs["after"][field]
            table.add_row(first, label, f"{was:,.0f}", f"{now:,.0f}", f"{now / was:.3f}" if was else "")
            first = ""
    for name, was in facts.get("metrics", {}).get("before", {}).items():
        now = facts["metrics"]["after"][name]
        if was is not None and now is not None:
            table.add_row("model", name, f"{was:.5f}", f"{now:.5f}", f"{now - was:+.5f}")
    result_console().print(table)
    if "why" in facts:
        print(f"quality is not told: {facts['why']}")
