# SPDX-License-Identifier: Apache-2.0
"""How far `oarlock export` and `oarlock compress` are: bytes that were read, as a moving line on a terminal.

Invariant: nothing is shown elsewhere, and nothing stays.
"""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def bytes_progress() -> Progress:
    """Return what shows it while it is entered."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
