# SPDX-License-Identifier: Apache-2.0
"""How a job is shown: progress while it runs (a live line on a terminal, plain lines otherwise), a table of epochs after; and
where any command shows its tables.

Invariant: a screen that goes away (a pipe whose reader ended) costs the view, not the job. One thread.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from oarlock.cli.autoscale_lines import decision_line
from oarlock.cli.cut_lines import progress_line

# A cut that takes longer is told of in lines, so often.
CUT_SECONDS = 10.0


def result_console() -> Console:
    """Return where tables that are a command's result are shown: standard output."""
    console = Console()
    # What reads a pipe or a file wants whole values; the width of a screen that is not there is a guess.
    return console if console.is_terminal else Console(width=160)


class RunView:
    """Shows the statuses of a running job. Everything goes to standard error, so that standard output is the result."""

    def __init__(self, scheme: str = "http") -> None:
        """``scheme``: of the pages of metrics."""
        self._scheme = scheme
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._gone = False
        self._epochs = 0
        self._run = 0
        self._warnings = 0
        # Number of the scaler's last decision that was shown.
        self._decision = 0
        self._phase = ""
        self._metrics = ""
        self._samples = 0
        self._since = time.monotonic()
        self._speed = 0.0
        # When it was last said how far a cut is, or there was none.
        self._cut_told = self._since

    def __enter__(self) -> "RunView":
        self._safely(self._progress.start)
        self._task = self._progress.add_task("starting", total=1, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._safely(self._progress.stop)

    def _safely(self, draw: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            draw()
        except (OSError, SystemExit):
            # Newer rich ends the process when a pipe breaks.
            self._gone = True

    def say(self, text: str) -> None:
        # Lines are not broken: what reads a pipe wants them whole.
        self._safely(lambda: self._console.print(text, highlight=False, markup=False, soft_wrap=True))

    def show(self, status: dict[str, Any]) -> None:
        """Show what changed since the last status."""
        if status["phase"] != self._phase and status["phase"] in ("gathering", "stopping"):
            self.say(f"{status['phase']}{': ' + status['reason'] if status['reason'] else ''}")
        self._phase = status["phase"]
        if status.get("metrics", self._metrics) not in ("", self._metrics):
            self._metrics = status["metrics"]
            self.say(f"metrics at {self._scheme}://{self._metrics}/metrics")
        restored = restored_epochs(status)
        if status.get("run", self._run) != self._run:
            if self._run:
                # It went back: what it trains again is shown again.
                self._epochs = min(self._epochs, len(status["history"]))
            self._run = status["run"]
        for result in status["history"][self._epochs :]:
            where = "  (from the checkpoint)" if result["epoch"] < restored else ""
            self.say(_line(result, status["epochs"]) + where)
        self._epochs = max(self._epochs, len(status["history"]))
        self._show_cut(status)
        warnings = status.get("warnings", [])
        for warning in warnings[self._warnings :]:
            self.say(f"warning: {warning}")
        self._warnings = len(warnings)
        for decision in status.get("autoscale", {}).get("decisions", []):
            if decision["number"] > self._decision:
                self._decision = decision["number"]
                self.say(decision_line(decision))
        if self._task is not None and "splits" in status:
            self._safely(lambda: self._update(status))

    def _show_cut(self, status: dict[str, Any]) -> None:
        """Say every now and then how far a cut is, where there is no bar that shows it."""
        line, now = progress_line(status), time.monotonic()
        if not line:
            self._cut_told = now
        elif not self._console.is_terminal and now - self._cut_told >= CUT_SECONDS:
            self._cut_told = now
            self.say(line)

    def _update(self, status: dict[str, Any]) -> None:
        if self._task is not None:
            # A status that comes with a note is an old one: nothing in it moves.
            note = status.get("note", "")
            if not note:
                self._measure(status)
                note = f"{self._speed:,.0f} samples/s" if self._speed else ""
                note = "; ".join(part for part in (note, progress_line(status)) if part)
            evaluating = status["splits_closed"] == status["splits"]
            done, total = ("evaluated", "evaluation_splits") if evaluating else ("splits_closed", "splits")
            self._progress.update(
                self._task,
                description=f"epoch {status['epoch'] + 1}/{status['epochs']} {'evaluate' if evaluating else status['phase']}",
                completed=status[done],
                total=max(1, status[total]),
                note=note,
            )

    def _measure(self, status: dict[str, Any]) -> None:
        samples = sum(s for m in status["members"] if isinstance(s := m["stats"].get("samples"), int))
        now = time.monotonic()
        if now - self._since >= 1.0:
            self._speed = max(0.0, (samples - self._samples) / (now - self._since))
            self._samples, self._since = samples, now

    def table(self, status: dict[str, Any]) -> None:
        """Show the table of epochs."""
        if status["history"]:
            self._safely(lambda: self._console.print(epochs_table(status)))


def restored_epochs(status: dict[str, Any]) -> int:
    """Return how many epochs had been trained where this run of the job began."""
    epochs = {made["path"]: made["epoch"] for made in status.get("checkpoints", [])}
    began = [e for e in status.get("events", []) if isinstance(e, dict) and e.get("event") == "restore"]
    return next((int(epochs.get(e.get("path"), 0)) for e in began if e.get("run") == status.get("run")), 0)


def event_lines(status: dict[str, Any]) -> list[str]:
    """Return a line for each thing that was done to a job besides training."""
    return [_event(event, status["job"]) for event in status.get("events", []) if isinstance(event, dict)]


def _event(event: dict[str, Any], job: object) -> str:
    what = event.get("event")
    if what == "restore":
        whose = "" if event.get("of_job") == job else f" of job {event.get('of_job')}"
        what = f"went on from cut {event.get('cut')}{whose}, made in run {event.get('of_run')}"
        if event.get("cut") == 0:
            what = "began again from the beginning"
    if what == "rollback":
        what = f"table {event.get('table')} went back to {event.get('path')} at step {event.get('step')}"
    if what == "signature":
        was, now = (dict(event.get(name, {})) for name in ("was", "now"))
        changes = ", ".join(f"{name} {now.get(name)!r} in place of {before!r}" for name, before in was.items())
        what = f"workers of another compute signature were accepted at step {event.get('step')}, bits may differ: {changes}"
    if what == "warm_start":
        chosen = [
            f"{mine} from {its}" for kind in ("tables", "dense") for mine, its in dict(event.get(kind, {})).items()
        ]
        what = f"began warm with {event.get('path')}: {', '.join(chosen)}"
    return f"run {event.get('run')}: {what} ({event.get('created')})"


def wire_lines(status: dict[str, Any]) -> list[str]:
    """Return a line on the forms in which a job's values travel, if it says any, and one for each table of which rows are kept.

    Counts are of the members that are alive, each since it joined.
    """
    stats = [m["stats"] for m in status["members"]]
    lines = []
    if forms := status.get("compression"):
        forms_of = "; ".join(f"{name}: {_ways(wire)}" for name, wire in forms.items())
        saved = [_saved(stats, way, words) for way, words in (("pull", "pulls"), ("push", "pushes"))]
        lines.append(f"compression of {forms_of}" + "".join(f"; {each}" for each in saved if each))
    for name in sorted({n for each in stats if isinstance(kept := each.get("caches"), dict) for n in kept}):
        told = [
            found
            for each in stats
            if isinstance(kept := each.get("caches"), dict) and isinstance(found := kept.get(name), dict)
        ]
        hits, asked = _sum(told, "hits"), _sum(told, "hits") + _sum(told, "misses")
        if asked:
            saved_bytes = _sum(told, "saved_bytes")
            lines.append(
                f"cache of {name}: {hits / asked:.1%} of {asked:,} rows did not have to come; {saved_bytes / 1e6:,.1f} MB saved"
            )
    return lines


def _ways(wire: dict[str, Any]) -> str:
    """Return both forms of a WireSpec as they are spelt."""
    return f"pull {wire['pull']}, push {wire['push']}" + (", zstd" if wire["zstd"] else "")


def _saved(stats: list[dict[str, Any]], way: str, named: str) -> str:
    """Return what compression saved of one direction, empty while nothing was moved."""
    saved = _sum(stats, f"{way}_bytes_saved")
    whole = saved + _sum(stats, f"{way}_bytes")
    return f"{named}: {saved / 1e6:,.1f} of {whole / 1e6:,.1f} MB saved ({saved / whole:.0%})" if whole else ""


def _sum(told: list[dict[str, Any]], name: str) -> int:
    """Return the sum of a count; members may tell anything."""
    return sum(value for each in told if isinstance(value := each.get(name), int))


def metric(value: float | None) -> str:
    """Return how a metric is shown; one that the evaluated samples leave without a meaning as a dash."""
    return "-" if value is None else f"{value:.4f}"


def _line(result: dict[str, Any], epochs: int) -> str:
    metrics = "  ".join(f"{name} {metric(value)}" for name, value in result["metrics"].items())
    # How many samples a recipe's own sums are of only the recipe knows.
    of = f" on {result['evaluated']:,}" if result.get("evaluated") else ""
    speed = result["samples"] / result["train_seconds"] if result["train_seconds"] else 0.0
    return (
        f"epoch {result['epoch'] + 1}/{epochs}  loss {result['loss']:.4f}  {metrics}  "
        f"{result['samples']:,} samples in {result['train_seconds']:.1f} s ({speed:,.0f}/s), "
        f"evaluated{of} in {result['evaluate_seconds']:.1f} s"
    )


def epochs_table(status: dict[str, Any]) -> Table:
    """Return the table of a job's epochs; the best one is marked."""
    best = status["best"]["epoch"] if status.get("best") else -1
    table = Table(title=f"{status['name']}: {status['phase']}", title_justify="left")
    names = list(status["history"][0]["metrics"]) if status["history"] else []
    for name in ("epoch", "loss", *names, "samples", "train s", "evaluate s"):
        table.add_column(name, justify="right")
    for r in status["history"]:
        table.add_row(
            f"{r['epoch'] + 1}{' *' if r['epoch'] == best else ''}",
            f"{r['loss']:.4f}",
            *(metric(r["metrics"].get(n)) for n in names),
            f"{r['samples']:,}",
            f"{r['train_seconds']:.1f}",
            f"{r['evaluate_seconds']:.1f}",
            style="bold" if r["epoch"] == best else None,
        )
    return table
