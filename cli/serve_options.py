# SPDX-License-Identifier: Apache-2.0
"""The options of `oarlock serve`."""

import argparse
from typing import Any

from oarlock.cli.numbers import between, seconds_between
from oarlock.client.security import add_security
from oarlock.proto.work import REQUEST_MEMORY_BYTES, REQUEST_MEMORY_RANGE
from oarlock.telemetry.prometheus import LOOPBACK, read_port

_THREADS, _THREADS_RANGE = 256, (16, 65536)
_MAX_KEYS = 1 << 20


def add_serve(commands: Any) -> None:
    """Add `oarlock serve` and its verbs; a first word that is none of them is a checkpoint."""
    serve = commands.add_parser(
        "serve",
        help="serve the rows of a checkpoint by key",
        description="Serve the rows of a checkpoint, read-only, for other programs to look up by key (docs/serving.md).",
        epilog="oarlock serve CHECKPOINT[@CUT]: serve a job's folder, a folder of checkpoints, or one cut of it\n"
        "oarlock serve CHECKPOINT --part 0/2, and --part 1/2: in parts; --rows-at HOST:PORT ...: predictions in front of them\n"
        "oarlock serve --follow JOB: serve what a job trains, as it changes",
    )
    # What is meant if the first word is no verb.
    serve.bare = "run"
    verbs = serve.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser(
        "run",
        help="what is done without a verb",
        description="Serve the rows of a checkpoint until SIGTERM or Ctrl-C. The address is printed once it listens, and a line "
        "when it\nis ready.",
    )
    run.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="a folder of checkpoints or a URL like s3://bucket/folder (its newest cut), with @12 behind it, or one cut's folder",
    )
    run.add_argument(
        "--follow",
        metavar="JOB",
        help="in place of CHECKPOINT: a job (its name or folder) which is served as it changes while it trains",
    )
    run.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: any free one (default)")
    run.add_argument(
        "--http",
        default="",
        metavar="HOST:PORT",
        help="answer the Open Inference Protocol over HTTP there, too (port 0: any free one)",
    )
    run.add_argument(
        "--follow-cuts",
        action="store_true",
        help="take newer cuts of the folder as they are committed, without a pause",
    )
    run.add_argument(
        "--part",
        default="",
        metavar="I/N",
        help="hold only the blocks of each table whose number modulo N is I (0/2 and 1/2 for two processes); clients are given "
        "the addresses of all parts",
    )
    run.add_argument(
        "--rows-at",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="hold no rows: ask the server there for them, one of those with the parts of the same model; given for each of "
        "them. What is served is the cut that they serve",
    )
    run.add_argument(
        "--trust",
        action="store_true",
        help="do not compute the files' checksums, which is most of the time to be ready",
    )
    run.add_argument(
        "--recipe",
        default="",
        metavar="NAME",
        help="the recipe that predicts, if it is none of Oarlock's own, as the job has it (module:attribute); none: rows alone",
    )
    run.add_argument(
        "--job",
        default="",
        metavar="FOLDER",
        help="the job's folder, for a checkpoint that has no transforms beside it",
    )
    run.add_argument(
        "--predict-threads", type=between(0, 64), default=0, metavar="N",
        help="batches that are computed at once (0: one for each processor, 4 at most)",
    )  # fmt: skip
    run.add_argument(
        "--drain-seconds",
        type=seconds_between(0, 86400),
        default=0.0,
        metavar="S",
        help="answer so long after SIGTERM, while health says NOT_SERVING (default 0)",
    )
    run.add_argument(
        "--threads", type=between(*_THREADS_RANGE), default=_THREADS, metavar="N",
        help=f"connections and calls at once (default {_THREADS})",
    )  # fmt: skip
    run.add_argument(
        "--max-keys", type=between(1, 1 << 31), default=_MAX_KEYS, metavar="N",
        help=f"keys of one request (default {_MAX_KEYS})",
    )  # fmt: skip
    run.add_argument(
        "--request-memory-bytes",
        type=between(*REQUEST_MEMORY_RANGE),
        default=REQUEST_MEMORY_BYTES,
        metavar="N",
        help=f"memory of all requests in work, beside the tables (default {REQUEST_MEMORY_BYTES})",
    )
    run.add_argument(
        "--recall",
        action="append",
        default=[],
        metavar="TABLE[:METRIC[:FIRST-END]]",
        help="answer which rows of a table are nearest to a vector, by inner product (inner) or cosine, over all columns or "
        "some; with :exact behind it without an index; may be repeated",
    )
    run.add_argument(
        "--metrics-port",
        type=read_port,
        metavar="N",
        help="serve metrics for Prometheus at this port (0: any free one)",
    )
    run.add_argument(
        "--metrics-host", default=LOOPBACK, metavar="HOST", help="where to serve them (default: this host alone)"
    )
    run.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="of the lines on standard error (default warning)",
    )
    status = verbs.add_parser(
        "status",
        help="show what a server serves",
        description="Show what a server serves: cut, age, tables, and what is wrong.",
    )
    rollback = verbs.add_parser(
        "rollback",
        help="have a server, or all of them, serve an older cut",
        description="Have a server serve an older cut, and keep to it: newer ones are not taken until --newest says so. It\nends "
        "once that cut is served. Several servers are told at the same time, once each has said that it has the cut.",
    )
    which = rollback.add_mutually_exclusive_group()
    which.add_argument(
        "--cut", type=between(1, 1 << 62), default=0, metavar="N", help="default: the next older one, that all have"
    )
    which.add_argument("--newest", action="store_true", help="the newest, and newer ones again as they come")
    for verb in (status, rollback):
        verb.add_argument(
            "address",
            nargs="+",
            metavar="HOST:PORT",
            help="where the server listens; or all servers of a model, with its parts and replicas",
        )
    for verb in (run, status, rollback):
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        add_security(verb, listens=verb is run)


def unserved(options: argparse.Namespace) -> str:
    """Return what is wrong with the options of `oarlock serve`, empty if nothing is."""
    if options.command != "serve" or options.verb != "run":
        return ""
    if bool(options.checkpoint) == bool(options.follow):
        return "give a CHECKPOINT, or --follow JOB"
    return (
        "--follow-cuts goes with a CHECKPOINT: a job that is followed is newer"
        if options.follow and options.follow_cuts
        else ""
    )
