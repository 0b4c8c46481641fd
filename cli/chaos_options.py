# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock chaos`."""

import argparse
from collections.abc import Callable
from typing import Any

from oarlock.cli.numbers import between, seconds_between
from oarlock.launch.chaos_events import MOST_EVENTS

EVENTS, GAP_SECONDS, DEMO_EPOCHS = 20, 4.0, 40


def add_chaos(commands: Any, setting: Callable[[str], str]) -> None:
    """Add `oarlock chaos`; ``setting`` reads what ``--set`` is given."""
    chaos = commands.add_parser(
        "chaos",
        help="train a job while its processes are killed and stopped, and tell what followed",
        description="Train a job as `oarlock train` does, while shards, workers and the coordinator are killed, stopped for\n"
        "longer than their lease, other numbers of them are asked for, and checkpoints. A ledger tells what was done\n"
        "when, what followed, and how long training took to go on. A shard is left alone while its blocks are nowhere\nelse.",
    )
    chaos.add_argument("job", nargs="?", default="", metavar="JOB.toml", help="a job file, of which a new job is made")
    chaos.add_argument("--demo", action="store_true", help="a job on generated data instead, with a copy of each block")
    chaos.add_argument("--data", metavar="DIR", help="folder of the training data")
    chaos.add_argument(
        "--dir", default="", metavar="DIR", help="keep the job in this folder (default: a temporary one)"
    )
    chaos.add_argument(
        "--events", type=between(1, MOST_EVENTS), default=EVENTS, metavar="N", help=f"how many (default {EVENTS})"
    )
    chaos.add_argument(
        "--gap",
        type=seconds_between(0.05, 3600),
        default=GAP_SECONDS,
        metavar="SECONDS",
        help=f"between two events, on the average (default {GAP_SECONDS:g}); some wait until they may be",
    )
    chaos.add_argument(
        "--seed",
        type=between(0, (1 << 31) - 1),
        default=0,
        metavar="N",
        help="of what is done when to whom, not of the job (default 0)",
    )
    chaos.add_argument(
        "--quiet-runs",
        type=between(0, 100),
        default=0,
        metavar="N",
        help="train the job so often in peace, with other seeds, and compare its first metric (default 0)",
    )
    chaos.add_argument(
        "--set",
        action="append",
        default=[],
        type=setting,
        metavar="A.B=C",
        help="set any field of the job file; may be repeated",
    )
    chaos.add_argument("--json", action="store_true", help="print one JSON object, the last line")


def aimless(options: argparse.Namespace) -> str:
    """Return what is wrong with the options of `oarlock chaos`, empty if nothing is."""
    if options.command != "chaos":
        return ""
    if bool(options.job) == options.demo:
        return "give one of JOB.toml and --demo"
    if options.job and not options.job.endswith(".toml"):
        return f"{options.job[:80]!r} is no job file: give one that ends in .toml, as `oarlock train` takes it"
    return "--demo makes its own data: leave --data out" if options.demo and options.data else ""
