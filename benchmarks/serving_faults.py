# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.serving_faults [--json] [--quick] [--seed N]`: answers that are counted while everything changes.

    parts       a checkpoint in 2 parts, 2 servers of each (`oarlock serve --part I/2 --follow-cuts`); a new cut again and again
    followed    a job whose rows change all the time, 2 servers of it (`oarlock serve --follow`)
    killed      of all but one of these servers one is killed (SIGKILL), started again and waited for, then the next one
    asked       by processes of their own, with a blocking and an asynchronous client; each answer is checked whole

An answer is one request of a few keys. ``failed``: it was an error; ``wrong``: a row is not that of the cut that the answer
names, or of a state that the followed rows had lately, or older than what the same server had answered before.
Invariant: it writes to a temporary folder only, leaves no process, and the last line printed is the result.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.serving_faults")

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from oarlock.benchmarks.serving_faults_asker import (
    ASYNCIO,
    BLOCKING,
    BOARD_WORDS,
    CUT,
    EDGES,
    FOLLOWED,
    MARKS,
    PUSHED,
    PUSHED_LATELY,
    STOP,
    Asker,
    written_cut,
)
from oarlock.benchmarks.serving_freshness import Pusher
from oarlock.checkpoint.store import LocalStore
from oarlock.proto.errors import PSError
from oarlock.proto.rpc import BlockingTransport

PARTS, REPLICAS = 2, 2
# Cuts that the folder keeps, as jobs do.
KEEP_CUTS = 4
# How far what is served of a followed job may be behind: it is a fraction of a second on a machine that has time.
LATELY_SECONDS = 15.0
PUSH_SECONDS = 0.02
BEGIN_SECONDS, END_SECONDS = 120.0, 60.0


@dataclass(frozen=True)
class Size:
    """When it is enough: so many ``answers``, or ``most_seconds``. ``least_seconds`` it goes on in any case."""

    answers: int
    least_seconds: float
    most_seconds: float
    cut_seconds: float
    calm_seconds: float


QUICK = Size(1_000, 12.0, 18.0, cut_seconds=1.0, calm_seconds=1.0)
FULL = Size(1_000_000, 60.0, 560.0, cut_seconds=2.0, calm_seconds=10.0)


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result alone")
    parser.add_argument("--quick", action="store_true", help="some seconds alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before = surroundings(("numpy", "grpcio"))
    with tempfile.TemporaryDirectory(prefix="oarlock-") as folder:
        result = measure(QUICK if options.quick else FULL, Path(folder), seed=options.seed, say=not options.json)
    after = {"load_average_after": surroundings(())["load_average"]}
    print(json.dumps({"benchmark": "serving_faults", **result, "surroundings": {**before, **after}}))
    return 0


class Server:
    """`oarlock serve` with ``options``, which may be killed and started again where it was."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self.address = "127.0.0.1:0"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin; ``wait`` until it is ready."""
        command = [sys.executable, "-P", "-m", "oarlock.cli.main", "serve", *self._options]
        command += ["--listen", self.address, "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        assert self._process is not None, "started"
        assert self._process.stdout is not None, "made with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"oarlock serve ended with {self._process.wait()}")
        self.address = json.loads(line)["address"]

    def end(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Cuts:
    """Commits a cut after the other, and deletes old ones."""

    def __init__(self, folder: Path, board: Any) -> None:
        self.store = LocalStore(folder)
        self._folder = folder
        self._board = board

    def write(self) -> None:
        number = int(self._board[CUT]) + 1
        # Before anybody can be answered from it.
        self._board[CUT] = number
        written_cut(self.store, number)
        for old in self.store.cuts()[:-KEEP_CUTS]:
            shutil.rmtree(self._folder / f"cut-{old:06d}", ignore_errors=True)


def measure(size: Size, folder: Path, *, seed: int = 0, say: bool = False) -> dict[str, Any]:
    """Return what was counted."""
    begun = time.monotonic()
    board: Any = np.memmap(folder / "board", np.int64, "w+", shape=BOARD_WORDS)
    cuts = _Cuts(folder / "checkpoints", board)
    cuts.write()
    over = Event()
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(_peer(folder / "job"))
        parts = [
            Server(str(folder / "checkpoints"), "--follow-cuts", "--part", f"{part}/{PARTS}")
            for part in range(PARTS)
            for _ in range(REPLICAS)
        ]
        followers = [Server("--follow", str(folder / "job")) for _ in range(REPLICAS)]
        for server in (*parts, *followers):
            stack.callback(server.end)
            server.start()
        for server in (*parts, *followers):
            server.wait()
        changing = _Changing(size, cuts, peer["shard"], board, over)
        # Each part has one that lives while the other is killed; the last follower is asked whether it ever goes back.
        killing = _Killing([parts[0], parts[2], followers[0], parts[1], parts[3]], size.calm_seconds, over)
        stack.callback(over.set)
        addresses = [server.address for server in parts]
        askers = [
            Asker.started(folder / "board", number, kind, asked, seed)
            for number, (kind, asked) in enumerate(
                ((BLOCKING, addresses), (ASYNCIO, addresses), (FOLLOWED, [server.address for server in followers]))
            )
        ]
        for asker in askers:
            stack.callback(asker.end)
        _wait_for(askers, board)
        asking = time.monotonic()
        for each in (changing, killing):
            each.thread.start()
            stack.callback(each.thread.join)
            stack.callback(over.set)
        while not _enough(size, board, len(askers), time.monotonic() - asking, killing.kills):
            if killing.error or changing.error or any(asker.gone for asker in askers):
                break
            time.sleep(0.25)
            if say:
                print(f"{_answers(board, len(askers)):,} answers, {killing.kills} kills, cut {board[CUT]}", flush=True)
        board[STOP] = 1
        seconds = time.monotonic() - asking
        told = [asker.told(END_SECONDS) for asker in askers]
    if wrong := killing.error or changing.error:
        raise RuntimeError(wrong)
    counts = np.sum([one["histogram"] for one in told], axis=0)
    by_kind = {one.pop("kind"): {k: v for k, v in one.items() if k != "histogram"} for one in told}
    return {
        **{name: sum(one[name] for one in told) for name in ("answers", "failed", "wrong", "hedges", "hedges_won")},
        **{name: sum(one[name] for one in told) for name in ("failovers", "asked_again")},
        "swaps": max(one["swaps"] for one in told),
        "kills": killing.kills,
        "pushes": int(board[PUSHED]),
        "p50_ms": _quantile(counts, 0.5),
        "p99_ms": _quantile(counts, 0.99),
        "p999_ms": _quantile(counts, 0.999),
        "answers_per_second": round(sum(one["answers"] for one in told) / seconds),
        "asking_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "by_kind": by_kind,
    }


def _wait_for(askers: list[Asker], board: Any) -> None:
    """Return once every asker has had an answer."""
    until = time.monotonic() + BEGIN_SECONDS
    while not all(board[Asker.word(number)] for number in range(len(askers))):
        if any(asker.gone for asker in askers) or time.monotonic() > until:
            raise RuntimeError("an asker had no first answer")
        time.sleep(0.05)


def _answers(board: Any, askers: int) -> int:
    return sum(int(board[Asker.word(number)]) for number in range(askers))


def _enough(size: Size, board: Any, askers: int, seconds: float, kills: int) -> bool:
    if seconds >= size.most_seconds:
        return True
    return seconds >= size.least_seconds and kills > 0 and _answers(board, askers) >= size.answers


def _quantile(counts: Any, share: float) -> float:
    """Return a quantile in milliseconds: the upper edge of the bin that it is in."""
    at = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return round(1e3 * float(EDGES[min(at, len(EDGES) - 1)]), 3)


@contextlib.contextmanager
def _peer(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what the job that is followed says of itself."""
    command = [sys.executable, "-P", "-m", "oarlock.benchmarks.serving_peer", str(folder), "1000"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "made with a pipe"
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the job to follow ended with {process.wait()}")
        yield json.loads(line)
    finally:
        process.kill()
        process.communicate()


class _Changing:
    """New cuts, and pushes to the followed job: each adds one to every mark."""

    def __init__(self, size: Size, cuts: _Cuts, shard: str, board: Any, over: Event) -> None:
        self._size = size
        self._cuts = cuts
        self._shard = shard
        self._board = board
        self._over = over
        self.error = ""
        self.thread = Thread(target=self._run, name="changing")

    def _run(self) -> None:
        transport = BlockingTransport()
        pusher = Pusher(transport, self._shard, 1, self._over)
        marks = np.arange(MARKS, dtype=np.uint64)
        cut_at = time.monotonic() + self._size.cut_seconds
        lately: list[tuple[float, int]] = []
        try:
            while not self._over.wait(PUSH_SECONDS):
                now = time.monotonic()
                self._board[PUSHED] += 1
                pusher.push(marks, -1.0)
                lately.append((time.monotonic(), int(self._board[PUSHED])))
                while lately and lately[0][0] < now - LATELY_SECONDS:
                    self._board[PUSHED_LATELY] = lately.pop(0)[1]
                if now >= cut_at:
                    self._cuts.write()
                    cut_at = time.monotonic() + self._size.cut_seconds
        except (PSError, OSError) as error:
            self.error = f"the load failed: {error}"
        finally:
            transport.close()


class _Killing:
    """Kills a server after the other; each is ready again before the next one goes."""

    def __init__(self, servers: list[Server], calm_seconds: float, over: Event) -> None:
        self._servers = servers
        self._calm_seconds = calm_seconds
        self._over = over
        self.kills = 0
        self.error = ""
        self.thread = Thread(target=self._run, name="killing")

    def _run(self) -> None:
        try:
            while not self._over.wait(self._calm_seconds):
                server = self._servers[self.kills % len(self._servers)]
                server.end()
                self.kills += 1
                server.start()
                server.wait()
        except (RuntimeError, OSError, ValueError) as error:
            self.error = f"a server did not come back: {error}"


if __name__ == "__main__":
    sys.exit(main())
