# SPDX-License-Identifier: Apache-2.0
"""`oarlock data import` and `oarlock data generate`."""

import argparse
import sys

from rich.console import Console
from rich.progress import Progress

from oarlock.data.interactions import DatasetInfo
from oarlock.data.ncf_files import import_ncf
from oarlock.data.planted import generate_ncf


class _Shown:
    """Progress by stage: a bar on a terminal, nothing otherwise."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._stages: dict[str, object] = {}

    def __enter__(self) -> "_Shown":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._stages[stage], completed=done, total=total)  # type: ignore[arg-type]


def _report(out: str, info: DatasetInfo) -> int:
    print(
        f"{out}: {info.users} users, {info.items} items, {info.train_rows} training pairs, {info.test_rows} test users"
        + "".join(f", {name} {value:.4f}" for name, value in info.figures.items())
    )
    sys.stdout.flush()
    return 0


def import_(options: argparse.Namespace) -> int:
    """Import published rating files."""
    with _Shown() as shown:
        info = import_ncf(options.source, options.out, seed=options.seed, progress=shown)
    return _report(options.out, info)


def generate(options: argparse.Namespace) -> int:
    """Generate planted preferences."""
    with _Shown() as shown:
        info = generate_ncf(
            options.out,
            users=options.users,
            items=options.items,
            positives_per_user=options.positives_per_user,
            seed=options.seed,
            progress=shown,
        )
    return _report(options.out, info)
