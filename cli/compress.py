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
from oarlock.export.compress import Method, compress, cost
from oarlock.export.evaluation import evaluate
from oarlock.export.tables import chosen_tables, dense_values
from oarlock.launch.origin import Origin, find_origin, reading
from oarlock.proto.errors import InvalidArgument, PSError
from oarlock.serving.snapshot import Snapshot, open_snapshot


def compress_command(options: argparse.Namespace) -> int:
    """Write the copy; say what it costs."""
    for name, value, only in (("--parts", options.parts, "pq"), ("--keep", options.keep, "prune")):
        if value is not None and options.method != only:
            raise InvalidArgument(f"{name} and --method {options.method} contradict each other: leave one of them out")
    method = Method(options.method, options.parts or 0, 0.5 if options.keep is None else options.keep)
    origin = find_origin(options.checkpoint)
    with reading(origin.path):
        specs = chosen_tables(origin.manifest, options.table)
        with bytes_progress("compressing") as show:
            methods = {spec.name: method for spec in specs}
            made = compress(origin.store, origin.manifest, methods, Path(options.to), progress=show)
        before = open_snapshot(origin.store, origin.manifest, trust=True)
        after = open_snapshot(made, origin.manifest)
        facts: dict[str, Any] = {"cut": origin.manifest.cut, "to": options.to, "method": options.method, "tables": {}}
        for spec in specs:
            costs = {"before": asdict(cost(before.tables[spec.name])), "after": asdict(cost(after.tables[spec.name]))}
            facts["tables"][spec.name] = costs
        facts |= {"why": "--no-evaluation"} if options.no_evaluation else _quality(origin, before, after)
    print(json.dumps(facts)) if options.json else _print(facts)
    return 0


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
    table = Table("", "", "before", "after", "ratio", title=f"cut {facts['cut']} as {facts['method']} in {facts['to']}")
    table.title_justify = "left"
    for name, costs in facts["tables"].items():
        first = name
        for label, field in (
            ("rows", "rows"),
            ("bytes of a row", "row_bytes"),
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
