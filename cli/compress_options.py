# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock compress`."""

import argparse
from typing import Any

from oarlock.cli.numbers import between

METHODS = ("int8", "int4", "pq", "mixed", "prune")
RANKS = ("occurrences", "score", "change")
MAX_DIM = 65536


def add_compress(commands: Any) -> None:
    """Add `oarlock compress`."""
    compress = commands.add_parser(
        "compress",
        help="make the tables of a checkpoint smaller, for serving",
        description="Write a copy of a checkpoint with smaller tables, which `oarlock serve` opens, and say what it costs\n"
        "(docs/export.md). The checkpoint stays as it is; training cannot go on from the copy.",
    )
    compress.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a job's name or folder, a folder of checkpoints or a URL (its newest cut), with @12 behind it, or one cut's folder",
    )
    compress.add_argument("--to", required=True, metavar="DIR", help="the folder to write")
    compress.add_argument(
        "--method",
        choices=METHODS,
        help="in which form rows are kept, or which of them, of all tables that --table gives no other method",
    )
    compress.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="T[=METHOD]",
        help="T: --method is for this one only; T=METHOD: another method for this one: int8, int4, pq:PARTS, mixed:SHARE:VALUES, "
        "prune:SHARE; may be repeated (default: --method for all; without --method the others stay as they are)",
    )
    compress.add_argument(
        "--parts",
        type=between(1, MAX_DIM),
        metavar="N",
        help="pq: bytes of a row; mixed: values of a row that is not whole (default: a quarter of the dim)",
    )
    compress.add_argument(
        "--keep",
        type=_share,
        metavar="F",
        help="prune: the share of rows that stays (default 0.5); mixed: that stays whole (default 0.1)",
    )
    compress.add_argument(
        "--by",
        choices=RANKS,
        help="prune, mixed: which rows those are (default: mixed: what the table keeps of occurrences or score, prune: change, "
        "the distance from what a key without a row reads as)",
    )
    compress.add_argument(
        "--no-evaluation", action="store_true", help="do not evaluate the model before and after on the job's data"
    )
    compress.add_argument("--json", action="store_true", help="print one JSON object")


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give a share, above 0 and up to 1")
    return found
