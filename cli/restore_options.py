# SPDX-License-Identifier: Apache-2.0
"""The options that say with which checkpoint a job begins, and what is said of those that contradict each other.

    --restore PATH[@CUT]         a new job goes on with another one's training
    --resume                     the job goes on from the newest cut of its line
    --resume --restore @CUT      the job goes back to that cut of its own
    --warm-start PATH[@CUT]      a new job begins with rows of a checkpoint, and trains anew

Invariant: no form means two things; what is none of these ends with what to write instead.
"""

import argparse
from typing import Any

from oarlock.proto.errors import InvalidArgument


def add_restore(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that plans a job."""
    command.add_argument(
        "--restore",
        default="",
        metavar="PATH[@CUT]",
        help="begin a new job that goes on with another one's training from its checkpoint: a job's name, a folder or a URL "
        "(default: its newest cut). With --resume: @CUT, and the job goes back to that cut of its own",
    )


def add_warm_start(command: argparse.ArgumentParser) -> None:
    """Add the options of a new job whose rows begin with those of a checkpoint."""
    command.add_argument(
        "--warm-start",
        default="",
        metavar="PATH[@CUT]",
        help="begin a new job with rows of another one's checkpoint, named as for --restore; its training starts anew",
    )
    names = "NAME or NAME=NAME_THERE, with commas between"
    command.add_argument(
        "--tables",
        default="",
        metavar="NAMES",
        help=f"of --warm-start: the tables to take over, as {names} (default: all tables and dense parameters of equal names)",
    )
    command.add_argument("--dense", default="", metavar="NAMES", help="of --warm-start: the same of dense parameters")


def add_accept_signature(command: argparse.ArgumentParser) -> None:
    """Add the option of a sync job that goes on with other processors or libraries."""
    command.add_argument(
        "--accept-signature",
        action="store_true",
        help="of --mode sync, with --resume or --restore: go on with workers of another CPU, BLAS or library version; that is "
        "recorded, and bits may differ from there on",
    )


def warm_start_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return ``[warm_start]`` of a job file as the options say it; empty: they do not."""
    if not options.warm_start:
        return {}
    tables, dense = (_renames(name, getattr(options, name)) for name in ("tables", "dense"))
    return {"path": options.warm_start, "tables": tables, "dense": dense}


def _renames(option: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in text.split(",") if text else ():
        mine, equals, its = (part.strip() for part in each.partition("="))
        if not mine or (equals and not its) or mine in found:
            raise InvalidArgument(
                f"--{option} {text}: give names with commas between, each once, as NAME or NAME=NAME_THERE"
            )
        found[mine] = its or mine
    return found


def complaint(options: argparse.Namespace) -> str:
    """Return what is wrong with how the options go together; empty: nothing."""
    if options.command not in ("train", "prepare"):
        return ""
    resume, restore = getattr(options, "resume", False), options.restore
    if resume and not (options.name or options.dir):
        return "--resume needs the --name or --dir of the job"
    warm = getattr(options, "warm_start", "")
    if (getattr(options, "tables", "") or getattr(options, "dense", "")) and not warm:
        return "--tables and --dense say what --warm-start takes over: give that, too"
    if warm and (resume or restore):
        other = "--resume" if resume else "--restore"
        return f"--warm-start and {other} contradict each other: one begins training anew, the other goes on with it"
    if getattr(options, "accept_signature", False) and not resume and not restore:
        return "--accept-signature is for a job that goes on: give it with --resume or --restore"
    if restore.startswith("@") and not resume:
        return (
            f"--restore {restore}: of which job? Give PATH{restore} to begin a new job with it, or --resume to go back within "
            "the job of --name or --dir"
        )
    if restore and resume and not restore.startswith("@"):
        return (
            f"--resume and --restore {restore} contradict each other: with --resume a job goes on from a cut of its own, "
            "--restore @CUT; to begin a new job with that checkpoint leave out --resume"
        )
    return ""


def cut_of(text: str) -> int:
    """Return the number in ``@12``."""
    number = text.removeprefix("@")
    if not (text.startswith("@") and number.isascii() and number.isdigit() and len(number) < 19):
        raise InvalidArgument(f"--restore {text}: with --resume write it as @CUT, such as @12")
    return int(number)
