# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock export`."""

from typing import Any

from oarlock.cli.numbers import between

FORMATS = ("parquet", "arrow", "safetensors", "onnx")
MAX_ROW_BYTES = 1 << 30


def add_export(commands: Any) -> None:
    """Add `oarlock export`."""
    export = commands.add_parser(
        "export",
        help="write a checkpoint's rows or model for other programs",
        description="Write the rows of a checkpoint as Parquet, Arrow or safetensors, or its model as ONNX (docs/export.md).\n"
        "Checksums are verified, and what is there already is never replaced.",
    )
    export.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a job's name or folder, a folder of checkpoints or a URL (its newest cut), with @12 behind it, or one cut's folder",
    )
    export.add_argument(
        "--to", required=True, metavar="PATH", help="the file to write, or the folder, in which each table is a file"
    )
    export.add_argument("--format", choices=FORMATS, help="default: as the name of the file ends")
    export.add_argument("--table", action="append", default=[], metavar="T", help="only this one; may be repeated")
    export.add_argument("--state", action="store_true", help="optimizer state and counters of rows, too")
    export.add_argument("--with-rows", action="store_true", help="onnx: the rows of small tables inside, fed with keys")
    export.add_argument(
        "--max-row-bytes",
        type=between(1, MAX_ROW_BYTES),
        default=MAX_ROW_BYTES,
        metavar="N",
        help=f"of keys and rows inside (default {MAX_ROW_BYTES})",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")
