# SPDX-License-Identifier: Apache-2.0
"""How far `oarlock export` and `oarlock compress` are: bytes that were read, as a moving line on a terminal.

Invariant: nothing is shown elsewhere, and nothing stays.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how many bytes are read, and of how many, and shows it."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield show
