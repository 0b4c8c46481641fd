# SPDX-License-Identifier: Apache-2.0
"""`oarlock export`: a checkpoint's rows or model as files for other programs.

Invariant: what was made is told on standard output, how far it is on standard error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from oarlock.cli.export_options import FORMATS
from oarlock.cli.export_progress import bytes_progress
from oarlock.client.job import JobSpec
from oarlock.export.model import export_model
from oarlock.export.tables import chosen_tables, export_tables
from oarlock.launch.origin import Origin, find_origin, reading
from oarlock.launch.prediction import NoPrediction, predictor_of, spec_of
from oarlock.proto.errors import InvalidArgument


def export(options: argparse.Namespace) -> int:
    """Write what was asked for."""
    to = Path(options.to)
    format = options.format or to.suffix[1:]
    if format not in FORMATS:
        raise InvalidArgument(
            f"{to} does not say in which form: give --format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    for name, wrong in (
        ("--table", format == "onnx" and options.table),
        ("--state", format == "onnx" and options.state),
        ("--with-rows", format != "onnx" and options.with_rows),
    ):
        if wrong:
            raise InvalidArgument(f"{name} and --format {format} contradict each other: leave one of them out")
    origin = find_origin(options.checkpoint)
    with reading(origin.path):
        facts = _model(origin, to, options) if format == "onnx" else _tables(origin, to, format, options)
    if options.json:
        print(json.dumps({"job": origin.manifest.job, "run": origin.manifest.run, "cut": origin.manifest.cut, **facts}))
        return 0
    for made in facts["files"]:
        rows = f"{made['rows']:,} rows of {made['table']}, " if "table" in made else ""
        print(f"{made['file']}: {rows}{made['bytes']:,} bytes")
    return 0


def _tables(origin: Origin, to: Path, format: str, options: argparse.Namespace) -> dict[str, Any]:
    specs = chosen_tables(origin.manifest, options.table)
    with bytes_progress("exporting rows") as show:
        made = export_tables(origin.store, origin.manifest, specs, to, format, whole=options.state, progress=show)
    files = [{"table": one.table, "file": str(one.path), "rows": one.rows, "bytes": one.bytes} for one in made]
    return {"format": format, "files": files}


def _model(origin: Origin, to: Path, options: argparse.Namespace) -> dict[str, Any]:
    size = export_model(
        origin.store,
        origin.manifest,
        _spec_of(origin),
        to,
        rows=options.with_rows,
        max_row_bytes=options.max_row_bytes,
    )
    return {"format": "onnx", "files": [{"file": str(to), "bytes": size}]}


def _spec_of(origin: Origin) -> JobSpec:
    """Return the job whose graph is exported: what is beside the checkpoint, or what that says itself."""
    if origin.spec is not None:
        return origin.spec
    files = origin.store.files
    try:
        # Whether there is such a recipe here, that may be imported, and whether the cut is of its graph.
        predictor_of(origin.manifest, files=files)
    except NoPrediction as error:
        raise InvalidArgument(
            f"{origin.path} has no job.json of its job beside it, and does not say itself what the graph is ({error}): give the "
            "job's folder"
        ) from None
    return spec_of(origin.manifest, files)
