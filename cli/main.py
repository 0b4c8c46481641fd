# SPDX-License-Identifier: Apache-2.0
"""`oarlock`: the commands, and how they end: 0, 1 after one clear line, 2 for wrong usage, 130 when interrupted.

Invariant: results go to standard output, everything else to standard error; bad input never ends in a traceback.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from oarlock.cli.options import build_parser, parse
from oarlock.proto.errors import PSError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    _open_standard_streams()
    options = parse(build_parser(), sys.argv[1:] if arguments is None else arguments)
    try:
        code = _command(options)
        # What is still in the buffer would meet a reader that is gone only when Python exits.
        sys.stdout.flush()
        return code
    except PSError as error:
        return _complain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output is gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _command(options: argparse.Namespace) -> int:
    """Run the command that was asked for; return its exit code."""
    if options.command in ("train", "prepare"):
        from oarlock.cli.train import prepare, train

        return train(options) if options.command == "train" else prepare(options)
    if options.command == "demo":
        from oarlock.cli.train import demo

        return demo(options)
    if options.command == "data":
        from oarlock.cli.data import generate, import_

        return import_(options) if options.verb == "import" else generate(options)
    if options.command == "rows":
        from oarlock.cli.rows import rows

        return rows(options)
    if options.command == "checkpoint":
        from oarlock.cli.checkpoint import checkpoint

        return checkpoint(options)
    if options.command == "rollback":
        from oarlock.cli.rollback import rollback

        return rollback(options)
    if options.command == "scale":
        from oarlock.cli.scale import scale

        return scale(options)
    if options.command == "chaos":
        from oarlock.cli.chaos import chaos

        return chaos(options)
    if options.command == "serve":
        from oarlock.cli.serve import serve

        return serve(options)
    if options.command == "export":
        from oarlock.cli.export import export

        return export(options)
    if options.command == "compress":
        from oarlock.cli.compress import compress_command

        return compress_command(options)
    if options.command == "digest":
        from oarlock.cli.digest import digest

        return digest(options)
    if options.command == "tokens":
        from oarlock.cli.tokens import tokens

        return tokens(options)
    if options.command == "warmup":
        from oarlock.cli.warmup import warmup

        return warmup()
    from oarlock.cli.jobs import status, stop

    return status(options) if options.command == "status" else stop(options)


def _complain(text: str) -> int:
    try:
        print(f"oarlock: {text}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return 1


def _open_standard_streams() -> None:
    """Point standard streams that the caller closed at nothing, or files opened later would take their place."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


if __name__ == "__main__":
    sys.exit(main())
