# SPDX-License-Identifier: Apache-2.0
"""`oarlock`: the commands, their options, and how they end: 0, 1 after one clear line, 2 for usage, 130 when interrupted."""

import argparse
import os
import sys
from collections.abc import Sequence

from oarlock import __version__
from oarlock.proto.errors import PSError


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--epochs", type=int)
    command.add_argument("--seed", type=int)
    command.add_argument("--servers", type=int, metavar="N", help="shards")
    command.add_argument("--workers", type=int, metavar="N")
    command.add_argument("--reader", choices=("petastorm", "arrow", "auto"))
    command.add_argument("--name", default="", help="the job's name (default: generated)")
    command.add_argument("--dir", default="", help="the job's folder (default: runs/NAME)")
    command.add_argument("--set", action="append", default=[], metavar="A.B=C", help="set any field of the job file")
    command.add_argument("--in-process", action="store_true", help="everything in this process")
    command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    command.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="oarlock", description="A parameter server for sparse recommender training.")
    parser.add_argument("--version", action="version", version=f"oarlock {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe or a job file on this machine")
    train.add_argument("recipe", help="a recipe's name (ncf), module:attribute, or a job file (*.toml)")
    train.add_argument("--data", help="the folder of the training data")
    train.add_argument("--resume", action="store_true", help="go on from the job's newest checkpoint")
    _add_run_options(train)

    prepare = commands.add_parser(
        "prepare", help="plan a job and write its folder, for processes started by other means"
    )
    prepare.add_argument("recipe")
    prepare.add_argument("--data", help="the folder of the training data, as the workers see it")
    _add_run_options(prepare)

    demo = commands.add_parser("demo", help="generate data and train NCF on it")
    _add_run_options(demo)

    data = commands.add_parser("data", help="import or generate data sets")
    verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB")
    bring = verbs.add_parser("import", help="convert published files to Parquet")
    bring.add_argument("kind", choices=("ncf",))
    bring.add_argument("source", metavar="SOURCE_DIR")
    bring.add_argument("out", metavar="OUT_DIR")
    bring.add_argument("--seed", type=int, default=0, help="of the shuffle")
    make = verbs.add_parser("generate", help="make a data set with known best results")
    make.add_argument("kind", choices=("ncf",))
    make.add_argument("out", metavar="OUT_DIR")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--users", type=int, default=1000)
    make.add_argument("--items", type=int, default=800)
    make.add_argument("--positives-per-user", type=int, default=25)

    status = commands.add_parser("status", help="show a job")
    status.add_argument("job", metavar="JOB", help="a name, a folder or host:port")
    status.add_argument("--json", action="store_true")

    stop = commands.add_parser("stop", help="end a running job, with a checkpoint")
    stop.add_argument("job", metavar="JOB")
    stop.add_argument("--no-checkpoint", action="store_true")

    commands.add_parser("warmup", help="compile all kernels into the cache")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command in ("train", "prepare"):
            from oarlock.cli.train import prepare, train

            return train(options) if options.command == "train" else prepare(options)
        if options.command == "demo":
            from oarlock.cli.train import demo

            return demo(options)
        if options.command == "data":
            from oarlock.cli.data import generate, import_

            return import_(options) if options.verb == "import" else generate(options)
        if options.command == "warmup":
            from oarlock.cli.warmup import warmup

            return warmup()
        from oarlock.cli.jobs import status, stop

        return status(options) if options.command == "status" else stop(options)
    except PSError as error:
        print(f"oarlock: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("oarlock: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
