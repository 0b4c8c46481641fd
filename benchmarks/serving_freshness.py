# SPDX-License-Identifier: Apache-2.0
"""How long it takes until what was pushed to a shard is served, and until what was evicted is not, beside a load of pushes.

    load       pushes of 5,000 random rows each to a table of dim 16, at a fixed rate
    marks      every 10 ms a push creates the row of a new key in another table; the oldest rows leave there, as it has a budget
    looking    who asks the serving process, again and again, which of the marks are there; an answer counts when it is here

Invariant: all goes through real processes: a shard, `oarlock serve --follow`, its client; times are this process's, from a push's
answer to the first answer that shows it. What never shows is ``unseen``, and no time is left out for it.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from oarlock.benchmarks.serving_peer import INCARNATION, MARKS, SPEC
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySorter
from oarlock.proto.arrays import Part, pack
from oarlock.proto.bulk import Bulk
from oarlock.proto.common_pb2 import Header
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport
from oarlock.proto.shard_pb2 import PushRequest, TableGradients, TableKeys
from oarlock.serving import Client

ROWS_PER_PUSH = 5_000
ROWS_PER_SECOND = 100_000
MARK_SECONDS = 0.01
LOOK_SECONDS = 0.005
CALL_SECONDS = 10.0
# After the last mark, for what is still to be seen.
PATIENCE_SECONDS = 5.0


def measure_freshness(folder: Path, *, rows: int, seconds: float, seed: int) -> dict[str, Any]:
    """Return percentiles of both times, in seconds, over so long a load."""
    with contextlib.ExitStack() as stack:
        peer = _started(stack, "oarlock.benchmarks.serving_peer", str(folder), str(rows))
        serve = _started(stack, "oarlock.cli.main", "serve", "--follow", str(folder), "--json")
        transport = BlockingTransport()
        stack.callback(transport.close)
        client = stack.enter_context(Client(serve["address"], timeout_seconds=CALL_SECONDS))
        over = Event()
        load = _Load(transport, peer["shard"], rows, seed, over)
        marks = _Marks(transport, peer["shard"], over)
        threads = [Thread(target=each.run) for each in (load, marks)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        looking = _Looking(client, marks)
        try:
            while time.perf_counter() - begun < seconds:
                looking.look()
        finally:
            over.set()
            for thread in threads:
                thread.join()
        lasted = time.perf_counter() - begun
        until = time.perf_counter() + PATIENCE_SECONDS
        while not looking.all_seen() and time.perf_counter() < until:
            looking.look()
        return {
            **looking.told(),
            "updated_rows_per_second": round(load.pushed / lasted),
            "failed": looking.failed + load.failed + marks.failed,
            "answers": looking.answers,
            "ready_seconds": serve["seconds"],
        }


def _started(stack: contextlib.ExitStack, module: str, *arguments: str) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.enter_context(process)
    stack.callback(process.terminate)
    assert process.stdout is not None, "made with a pipe"
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{module} ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


class Pusher:
    """Pushes groups of one split to one table, one after the other."""

    def __init__(self, transport: BlockingTransport, address: str, table: int, over: Event) -> None:
        self._transport = transport
        self._address = address
        self._table = table
        self._spec = SPEC.tables[table]
        self._over = over
        self._group = 0
        self._sorter = KeySorter()
        self._ranks = np.arange(self._spec.blocks, dtype=np.int32)
        self.pushed = self.failed = 0

    def push(self, raw: np.ndarray[Any, np.dtype[np.uint64]], value: float) -> None:
        spec = self._spec
        found = self._sorter.build(raw, table_salt(spec.name), spec.blocks.bit_length() - 1, self._ranks)
        beside: list[Part] = []
        keys = TableKeys(
            table=self._table,
            keys=pack(found.keys, beside),
            blocks=pack(found.blocks, beside),
            counts=pack(found.counts, beside),
        )
        gradients = np.full((len(found.keys), spec.dim), value, np.float32)
        part = TableGradients(keys=keys, gradients=pack(gradients, beside), rate=1.0)
        header = Header(protocol=PROTOCOL, job=SPEC.job_bytes, run=1, target=INCARNATION)
        request = PushRequest(header=header, split=self._table, group=self._group, tables=[part], step=self._group + 1)
        self._transport.call(self._address, "Shard.Push", Bulk(request, beside), timeout_seconds=CALL_SECONDS)
        self._group += 1
        self.pushed += len(found.keys)


class _Load(Pusher):
    """The load, at its rate: who comes late makes up for it."""

    def __init__(self, transport: BlockingTransport, address: str, rows: int, seed: int, over: Event) -> None:
        super().__init__(transport, address, 0, over)
        self._rng = np.random.default_rng(seed)
        self._rows = rows

    def run(self) -> None:
        begun = time.perf_counter()
        while not self._over.wait(max(0.0, begun + self.pushed / ROWS_PER_SECOND - time.perf_counter())):
            try:
                self.push(self._rng.choice(self._rows, ROWS_PER_PUSH, replace=False).astype(np.uint64), 0.01)
            except PSError:
                self.failed += 1
                return


class _Marks(Pusher):
    """Rows that come, and leave when there are too many: mark n is key n, whose value is n + 1."""

    def __init__(self, transport: BlockingTransport, address: str, over: Event) -> None:
        super().__init__(transport, address, 1, over)
        # When each mark's push was answered; when that of the push was which evicted it.
        self.came: list[float] = []
        self.left: list[float] = []

    def run(self) -> None:
        due = time.perf_counter()
        while not self._over.wait(max(0.0, due - time.perf_counter())):
            due += MARK_SECONDS
            number = len(self.came)
            try:
                self.push(np.array([number], np.uint64), -float(number + 1))
            except PSError:
                self.failed += 1
                return
            now = time.perf_counter()
            rows = number - len(self.left)
            # As the table's budget has it (embedding/upkeep.py).
            if rows + 1 > MARKS:
                self.left += [now] * (rows + 1 - MARKS + MARKS // 10)
            self.came.append(now)


class _Looking:
    """Asks for marks that are not seen yet, and for those that are there."""

    def __init__(self, client: Client, marks: _Marks) -> None:
        self._client = client
        self._marks = marks
        self._first = self._next = 0
        self._fresh: list[float] = []
        self._gone: list[float] = []
        self.failed = self.answers = 0

    def look(self) -> None:
        """Ask once for all marks from the oldest that is not seen gone to the newest that was answered."""
        came, left = len(self._marks.came), len(self._marks.left)
        if came == self._first:
            time.sleep(LOOK_SECONDS)
            return
        keys = np.arange(self._first, came, dtype=np.uint64)
        try:
            found = self._client.lookup({"marks": keys})["marks"][:, 0]
        except PSError:
            self.failed += 1
            return
        now = time.perf_counter()
        self.answers += 1
        there = found == (keys + np.uint64(1)).astype(np.float32)
        self.failed += int((~there & (found != 0)).sum())
        # A mark that is not there yet, or not any more.
        while self._next < came and there[self._next - self._first]:
            self._fresh.append(now - self._marks.came[self._next])
            self._next += 1
        while self._first < min(left, self._next) and not there[self._first - int(keys[0])]:
            self._gone.append(now - self._marks.left[self._first])
            self._first += 1
        time.sleep(LOOK_SECONDS)

    def all_seen(self) -> bool:
        return self._next == len(self._marks.came) and self._first == len(self._marks.left)

    def told(self) -> dict[str, Any]:
        def quantiles(seconds: list[float]) -> dict[str, float | None]:
            wanted = {"p50": 0.5, "p99": 0.99, "max": 1.0}
            return {name: round(float(np.quantile(seconds, q)), 3) if seconds else None for name, q in wanted.items()}

        unseen = len(self._marks.came) - self._next + len(self._marks.left) - self._first
        return {
            "freshness_s": quantiles(self._fresh),
            "tombstone_s": quantiles(self._gone),
            "marks": len(self._marks.came),
            "evicted": len(self._marks.left),
            "unseen": unseen,
        }
