# SPDX-License-Identifier: Apache-2.0
"""The options of every command, and what is said of wrong ones: one line, with the near name, and exit code 2."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from oarlock import __version__
from oarlock.cli.chaos_options import add_chaos, aimless
from oarlock.cli.checkpoint_options import add_checkpoint
from oarlock.cli.compress_options import add_compress
from oarlock.cli.export_options import add_export
from oarlock.cli.restore_options import add_accept_signature, add_restore, add_warm_start, complaint
from oarlock.cli.rows_options import add_rows
from oarlock.cli.scale_options import add_copies, add_scale, unscaled
from oarlock.cli.serve_options import add_serve, unserved
from oarlock.client.job import MODES
from oarlock.client.security import add_security
from oarlock.telemetry.prometheus import read_port

_EXAMPLES = """\
examples:
  oarlock demo                                         train on generated data, to see it work
  oarlock data import ncf ml1m-ncf ml1m                rating files to Parquet
  oarlock train ncf --data ml1m --name first           train NCF with 2 shards and 2 workers
  oarlock train ncf --name first --resume --epochs 30  go on from its newest checkpoint
  oarlock train ncf --restore first@4 --name second    a new job that goes on from a cut of another one
  oarlock status first                                 what it did, or does
  oarlock scale first --servers 4                      more shards while it trains
  oarlock rows explain first user 42                   all that is known of a key while it trains
  oarlock chaos --demo                                 kill its processes, to see that nothing is lost
  oarlock serve runs/first/checkpoints --follow-cuts   rows by key for other programs, newer cuts as they come
  oarlock serve --follow runs/first                    the same while the job trains, as its rows change
  oarlock export first --to first.onnx                 its graph, or rows, as files that other programs read

exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage, 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line and takes no abbreviations."""

    # The verb that is meant where the first word is none.
    bare = ""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **arguments}
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.bare and args and args[0] not in ("-h", "--help"):
            verbs = next(a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
            args = args if args[0] in verbs else [self.bare, *args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _setting(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=VALUE or TABLE.NAME=VALUE")
    return text


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="DIR", help="folder of the training data")
    command.add_argument("--name", default="", help="the job's name (default: generated)")
    command.add_argument("--dir", default="", metavar="DIR", help="the job's folder (default: runs/NAME)")


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--epochs", type=int, metavar="N", help="passes over the data (default 20)")
    command.add_argument("--seed", type=int, metavar="N", help="of first values, order and draws (default 0)")
    command.add_argument("--servers", type=int, metavar="N", help="shards, which hold the model (default 2)")
    command.add_argument("--workers", type=int, metavar="N", help="processes that train it (default 2)")
    command.add_argument(
        "--mode",
        choices=MODES,
        help="how far workers may be apart, and what they push (default async; docs/consistency.md)",
    )
    command.add_argument(
        "--staleness", type=int, metavar="S", help="of --mode ssp: groups that workers may be apart (default 0)"
    )
    command.add_argument(
        "--ranks",
        type=int,
        metavar="R",
        help="of --mode sync and hybrid: batches that make a step together (default: --workers)",
    )
    command.add_argument(
        "--accumulate", type=int, metavar="K", help="batches that are pushed as one group; the k of geo (default 1)"
    )
    command.add_argument(
        "--compute-threads", type=int, metavar="N", help="batches that a worker computes at once (default 1)"
    )
    command.add_argument("--blas-threads", type=int, metavar="N", help="threads of a matrix product (default 1)")
    command.add_argument(
        "--network-threads", type=int, metavar="N", help="requests that a shard serves at once (default 512)"
    )
    command.add_argument(
        "--request-memory-bytes",
        type=int,
        metavar="N",
        help="memory of each shard for requests in work, beside its tables (default 1073741824)",
    )
    command.add_argument(
        "--server-pin-cores",
        metavar="LIST",
        help="cores of the shards, like 0-3,8; auto: share out all cores (default: anywhere)",
    )
    command.add_argument("--worker-pin-cores", metavar="LIST", help="the same for the workers")
    command.add_argument(
        "--reader",
        choices=("petastorm", "arrow", "auto"),
        help="how Parquet is read (default auto: petastorm if installed)",
    )
    command.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="how often a killed process is started again, all in all (default 1000; 0: never)",
    )
    add_copies(command)
    add_security(command)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="A.B=C",
        help="set any field of the job file, as in --set recipe_options.factors=16; may be repeated",
    )


def _add_show_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--in-process", action="store_true", help="run shards and workers inside this process")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line")
    command.add_argument(
        "--metrics-port",
        type=read_port,
        metavar="N",
        help="serve metrics for Prometheus on this host: the coordinator at port N, the shards and workers at those after it "
        "(0: any free ones, which `oarlock status` tells)",
    )
    command.add_argument(
        "--trace",
        metavar="FILE",
        help="record what every process does when, and write it as one timeline in Chrome's trace format when the job is over "
        "(an earlier trace there is replaced)",
    )
    command.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error"), help="of the job's log files"
    )


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="oarlock",
        description="A parameter server for sparse recommender training on CPU clusters.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"oarlock {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    train = commands.add_parser(
        "train",
        help="train a recipe or a job file on this machine",
        description="Train a recipe or a job file on this machine: a coordinator, shards and workers as local processes. "
        "Ctrl-C ends\nthe job with a checkpoint, a second one without. Progress goes to standard error, the result to "
        "standard output.",
    )
    train.add_argument("recipe", help="a recipe's name (ncf), module:attribute, or a job file (*.toml)")
    _add_plan_options(train)
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the job in --name or --dir"
    )
    add_restore(train)
    add_warm_start(train)
    add_accept_signature(train)
    _add_run_options(train)
    _add_show_options(train)

    prepare = commands.add_parser(
        "prepare",
        help="plan a job and write its folder, for processes started by other means",
        description="Plan a job and write its folder; print the folder. Start the job's processes yourself:\n"
        "`python -m oarlock.cluster`, `python -m oarlock.ps` and `python -m oarlock.worker`.",
    )
    prepare.add_argument("recipe", help="a recipe's name (ncf), module:attribute, or a job file (*.toml)")
    _add_plan_options(prepare)
    add_restore(prepare)
    add_warm_start(prepare)
    _add_run_options(prepare)

    demo = commands.add_parser(
        "demo",
        help="generate data and train on it",
        description="Generate planted preferences, whose best HR@10 is known, and train NCF on them: no download.",
    )
    demo.add_argument("--name", default="", help="keep the job under this name (default: a temporary folder)")
    demo.add_argument("--dir", default="", metavar="DIR", help="keep the job in this folder")
    _add_run_options(demo)
    _add_show_options(demo)

    data = commands.add_parser("data", help="make training data: import or generate")
    verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    bring = verbs.add_parser(
        "import",
        help="convert published rating files to Parquet",
        description="Convert NAME.train.rating, NAME.test.rating and NAME.test.negative (plain or .zst) to Parquet.",
    )
    bring.add_argument("kind", choices=("ncf",), help="the form of the data")
    bring.add_argument("source", metavar="SOURCE_DIR", help="folder of the rating files")
    bring.add_argument("out", metavar="OUT_DIR", help="folder to write, for `oarlock train --data`")
    bring.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default 0)")
    make = verbs.add_parser(
        "generate",
        help="make a data set with known best results",
        description="Make planted preferences: clusters of users like clusters of items. Prints the best HR@10 that any model "
        "can reach.",
    )
    make.add_argument("kind", choices=("ncf",), help="the form of the data")
    make.add_argument("out", metavar="OUT_DIR", help="folder to write, for `oarlock train --data`")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    make.add_argument("--users", type=int, default=1000, metavar="N", help="default 1000")
    make.add_argument("--items", type=int, default=800, metavar="N", help="default 800")
    make.add_argument("--positives-per-user", type=int, default=25, metavar="N", help="default 25")

    status = commands.add_parser("status", help="show a job that runs or ran")
    status.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
    status.add_argument("--json", action="store_true", help="print one JSON object")

    stop = commands.add_parser("stop", help="ask a running job to end, with a checkpoint")
    stop.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
    stop.add_argument("--no-checkpoint", action="store_true", help="lose what came after the last checkpoint")

    add_scale(commands)
    add_chaos(commands, _setting)
    add_checkpoint(commands)
    rollback = commands.add_parser(
        "rollback",
        help="let one table of a running job go back to a checkpoint",
        description="Let one table of a running job go back to a checkpoint, at one moment between two pushes. All else goes "
        "on:\nwhat was pushed to the table before that moment is gone, what comes after it is applied.",
    )
    rollback.add_argument("job", metavar="JOB", help="a name, a folder or the coordinator's host:port")
    rollback.add_argument("--table", required=True, metavar="NAME", help="the table")
    where = rollback.add_mutually_exclusive_group(required=True)
    where.add_argument("--cut", type=int, metavar="N", help="to this cut of the job itself")
    where.add_argument(
        "--restore", default="", metavar="PATH@CUT", help="to a checkpoint with a table of the same kind"
    )
    rollback.add_argument("--json", action="store_true", help="print one JSON object")
    add_rows(commands)
    add_serve(commands)
    add_export(commands)
    add_compress(commands)

    digest = commands.add_parser(
        "digest",
        help="print one number for all that a checkpoint holds",
        description="Print 128 bits that are the same for two checkpoints with the same rows and dense values to the bit:\n"
        "on however many shards, and in whatever order they were written.",
    )
    digest.add_argument(
        "target", metavar="TARGET", help="a job's name or folder (its newest checkpoint), or a checkpoint"
    )
    digest.add_argument(
        "--live",
        action="store_true",
        help="of a running job: of all that its shards hold at one moment, as a checkpoint would have it; nothing is written",
    )
    digest.add_argument("--json", action="store_true", help="print one JSON object")

    for each in (status, stop, rollback, digest):
        add_security(each, listens=False)

    tokens = commands.add_parser(
        "tokens",
        help="make a file of new tokens, for a job that others than this machine can reach",
        description="Write FILE, which only its owner may read, with a new token for each role: read, train and admin.\n"
        "Give it to the job's processes with --token-file; docs/security.md.",
    )
    tokens.add_argument("file", metavar="FILE", help="what to write; a file that is there stays as it is")

    commands.add_parser(
        "warmup",
        help="compile all kernels into the cache",
        description="Compile all kernels into the cache, as every process otherwise does when it first starts.",
    )
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options in ``arguments``; end with code 2 and one line if they are wrong."""
    options: argparse.Namespace
    options, unknown = parser.parse_known_args(arguments)
    chosen = _chosen(parser, options)
    if unknown:
        known = [name for action in chosen._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        chosen.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    if wrong := complaint(options) or unscaled(options) or unserved(options) or aimless(options):
        chosen.error(wrong)
    if not hasattr(options, "data") and options.command == "demo":
        options.data = None
    return options


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Parser:
    """Return the parser of the command that was given."""
    for name in (getattr(options, "command", None), getattr(options, "verb", None)):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                parser = action.choices[name]
    assert isinstance(parser, Parser), type(parser)
    return parser
