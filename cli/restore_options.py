# SPDX-License-Identifier: Apache-2.0
"""The options that say with which checkpoint a job begins, and what is said of those that contradict each other.

    --restore PATH[@CUT]         a new job goes on with another one's training
    --resume                     the job goes on from the newest cut of its line
    --resume --restore @CUT      the job goes back to that cut of its own

Invariant: no form means two things; what is none of these ends with what to write instead.
"""

import argparse

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


def complaint(options: argparse.Namespace) -> str:
    """Return what is wrong with how the options go together; empty: nothing."""
    resume, restore = getattr(options, "resume", False), getattr(options, "restore", "")
    if resume and not (options.name or options.dir):
        return "--resume needs the --name or --dir of the job"
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
