# SPDX-License-Identifier: Apache-2.0
"""The options of copies and of `oarlock scale`."""

import argparse
from typing import Any

from oarlock.cli.numbers import between
from oarlock.client.autoscale import MOST_MEMBERS
from oarlock.client.job import MAX_REPLICAS, RELOAD, ROLLBACK
from oarlock.client.security import add_security


def add_copies(command: argparse.ArgumentParser) -> None:
    """Add what a new job may say about copies of its blocks."""
    command.add_argument(
        "--replicas",
        type=int,
        choices=range(MAX_REPLICAS + 1),
        metavar="N",
        help="shards that have a copy of each block, beside the one that serves it: 0, 1 or 2 (default 0)",
    )
    command.add_argument(
        "--on-loss",
        choices=(ROLLBACK, RELOAD),
        help="when no copy of a block is left: the job goes back to its last cut, or those blocks alone are "
        "loaded from it (default rollback)",
    )
    command.add_argument(
        "--moves-in-flight", type=int, metavar="N", help="blocks that wait at once for their new shard (default 16)"
    )


def add_scale(commands: Any) -> None:
    """Add `oarlock scale`."""
    scale = commands.add_parser(
        "scale",
        help="have more or fewer shards and workers while a job trains",
        description="Have more or fewer shards and workers while a job trains. `oarlock train` starts those that are missing; "
        "shards that\nare too many give their blocks away first, workers finish their splits.",
    )
    scale.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
    scale.add_argument(
        "--servers", type=between(1, MOST_MEMBERS), metavar="N", help="shards (default: as many as before)"
    )
    scale.add_argument(
        "--workers", type=between(1, MOST_MEMBERS), metavar="M", help="workers (default: as many as before)"
    )
    scale.add_argument(
        "--dry-run", action="store_true", help="ask for nothing: tell what the job's own scaler would do now, and why"
    )
    scale.add_argument("--wait", action="store_true", help="until all are there, and no block moves any more")
    scale.add_argument("--json", action="store_true", help="print one JSON object")
    add_security(scale, listens=False)


def unscaled(options: argparse.Namespace) -> str:
    """Return what is wrong with the options of `oarlock scale`, empty if nothing is."""
    if options.command != "scale":
        return ""
    numbers = options.servers is not None or options.workers is not None
    if options.dry_run and (numbers or options.wait):
        return "--dry-run asks for nothing: leave --servers, --workers and --wait out"
    return "" if numbers or options.dry_run else "give --servers N, --workers M, or both"
