# SPDX-License-Identifier: Apache-2.0
"""Numbers that options are given, in bounds. For ``type=`` of argparse; what is none is wrong usage.

Invariant: what is returned is in the bounds, whatever was typed. Pure.
"""

import argparse
from collections.abc import Callable


def between(least: int, most: int) -> Callable[[str], int]:
    """Return what reads an integer from ``least`` to ``most``, neither below 0."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: give an integer from {least} to {most}")
        return int(text)

    return read


def seconds_between(least: float, most: float) -> Callable[[str], float]:
    """Return what reads seconds, as a number."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = least - 1
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: give seconds from {least:g} to {most:g}")
        return found

    return read
