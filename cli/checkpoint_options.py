# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock checkpoint`."""

from typing import Any

from oarlock.client.security import add_security

_WHERE = (
    "a job, a folder of checkpoints or a URL like s3://bucket/folder (its newest cut), with @12 behind it, or one cut's "
    "folder"
)


def add_checkpoint(commands: Any) -> None:
    """Add `oarlock checkpoint` and its verbs; a first word that is none of them is a job."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="check checkpoints, say what is in them and what differs",
        description="Check the files of checkpoints, say what is in them, and what differs between two. Nothing is changed.",
        epilog="oarlock checkpoint JOB: have a running job make a checkpoint now, and wait until it is there",
    )
    # What is meant if the first word is no verb.
    checkpoint.bare = "now"
    verbs = checkpoint.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = verbs.add_parser(
        "verify",
        help="read every file and name all that are damaged",
        description="Read every file of a cut, and name all that are damaged: file, column, and the cut to go back to.\n"
        "The exit code is 1 if there is any damage.",
    )
    verify.add_argument("paths", metavar="PATH[@CUT]", nargs="+", help=_WHERE)
    verify.add_argument("--all", action="store_true", help="all cuts of each folder")
    describe = verbs.add_parser(
        "describe",
        help="show cuts, sizes, chains, tables, marks, open splits and metrics",
        description="Show the cuts of a folder, and of one of them its tables, chains of files, marks, open splits and metrics.",
    )
    describe.add_argument("paths", metavar="PATH[@CUT]", nargs=1, help=_WHERE)
    diff = verbs.add_parser(
        "diff",
        help="show what differs between two cuts",
        description="Show for each table how many keys came, left and changed between two cuts, and the largest change of a "
        "weight.",
    )
    diff.add_argument("paths", metavar="PATH[@CUT]", nargs=2, help=_WHERE)
    now = verbs.add_parser("now", description="Have a running job make a checkpoint now, and wait until it is there.")
    for verb in (verify, describe, diff, now):
        verb.add_argument("--json", action="store_true", help="print one JSON object")
    now.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
    add_security(now, listens=False)
