# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock rows`."""

import argparse
import re
from typing import Any

from oarlock.client.security import add_security

_KEY = re.compile(r"0[xX][0-9a-fA-F]{1,32}|[0-9]{1,32}")


def read_key(text: str) -> int:
    """Return the key that ``text`` is; ValueError says why it is none."""
    if not _KEY.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no key: give an integer from 0 to 2^64 - 1, decimal or as 0x...")
    key = int(text, 16 if text[:2].lower() == "0x" else 10)
    if key >= 1 << 64:
        raise ValueError(f"{text} is no key: it is over 2^64 - 1")
    return key


def _key(text: str) -> int | str:
    if text == "-":
        return text
    try:
        return read_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_rows(commands: Any) -> None:
    """Add `oarlock rows` and its verbs."""
    rows = commands.add_parser(
        "rows",
        help="look at single rows of a running job, export them, take updates back",
        description="Ask the shards of a running job about single rows. Whoever else asks or trains goes on meanwhile.",
    )
    verbs = rows.add_subparsers(dest="verb", required=True, metavar="VERB")
    get = verbs.add_parser("get", help="show the weights of keys", description="Show the weights of keys.")
    explain = verbs.add_parser(
        "explain",
        help="show all that is known of keys",
        description="Show all that is known of keys: where they are, what their rows hold, how they stand with admission and "
        "eviction.",
    )
    export = verbs.add_parser(
        "export",
        help="write whole rows to a Parquet or Arrow file",
        description="Write rows of keys, or of the whole table, to a file: key, weights, state and counters. Training goes on, "
        "so\nthe rows of a block are of one instant, those of different blocks are not.",
    )
    undo = verbs.add_parser(
        "undo",
        help="take back the last updates of keys",
        description="Take back the last updates of keys, in a table whose spec keeps old values (guard.undo). Training goes on\n"
        "from there: this changes what is learned.",
    )
    quarantine = verbs.add_parser(
        "quarantine",
        help="show what was refused",
        description="Show how many gradients each table refused since its shards began, and a sample of their keys.",
    )
    for verb in (get, explain, export, undo, quarantine):
        verb.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
        table = {"nargs": "?", "help": "a table's name (default: all)"} if verb is quarantine else {"help": "its name"}
        verb.add_argument("table", metavar="TABLE", **table)
        if verb is not quarantine:
            count = "*" if verb is export else "+"
            verb.add_argument(
                "keys", metavar="KEY", nargs=count, type=_key, help="decimal or 0x...; -: read keys from standard input"
            )
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        add_security(verb, listens=False)
    export.add_argument("--all", action="store_true", help="all rows of the table")
    export.add_argument("--out", required=True, metavar="FILE", help="what to write: *.parquet or *.arrow")
    export.add_argument("--force", action="store_true", help="replace FILE if it is there")
    undo.add_argument("--steps", type=int, default=1, metavar="N", help="how many updates (default 1)")
    undo.add_argument("--yes", action="store_true", help="do not ask")
