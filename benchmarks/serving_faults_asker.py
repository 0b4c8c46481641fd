# SPDX-License-Identifier: Apache-2.0
"""A process that asks servers all the time and checks each answer; for ``serving_faults``, which starts it by `Asker.started`.

    board      int64 words in a file that all map: newest cut, pushes begun, pushes acknowledged a while ago, whether to stop,
               and of each asker how many answers it has had

Invariant: every answer is checked whole before the next question of its asker, and what cannot be had is counted, never left out.
`python -m oarlock.benchmarks.serving_faults_asker BOARD NUMBER KIND SEED ADDRESS...`: its last line is what it counted.
"""

import asyncio
import json
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.spec import TableSpec, to_json
from oarlock.proto.errors import PSError
from oarlock.serving import AsyncClient, Client, Found

CUT, PUSHED, PUSHED_LATELY, STOP, _FIRST = range(5)
BOARD_WORDS = 64
BLOCKING, ASYNCIO, FOLLOWED = "blocking", "asyncio", "followed"
SPECS = (TableSpec("user", 8, blocks=8), TableSpec("item", 4, blocks=4))
ROWS = 2_000
KEYS = np.arange(11, 11 + ROWS, dtype=np.uint64)
KEYS_PER_TABLE = 4
# Rows of the followed job that every push adds one to.
MARKS = 32
TASKS = 8
TIMEOUT_SECONDS = 5.0
DRAWN = 512
EDGES: NDArray[np.float64] = np.geomspace(1e-5, 20.0, 400)
# Of one follower, asked by a client of its own in so many turns of all.
ALONE = 4


def values_of(cut: int, keys: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return float32[n]: what each weight of keys is at a cut."""
    return (1000 * cut + (keys % np.uint64(1000))).astype(np.float32)


def written_cut(store: LocalStore, number: int) -> None:
    """Commit a cut whose every row says of which cut it is."""
    entries = []
    for spec in SPECS:
        blocks = np.empty(ROWS, np.int32)
        blocks_of(KEYS, table_salt(spec.name), spec.blocks.bit_length() - 1, blocks)
        for block in range(spec.blocks):
            mine = KEYS[blocks == block]
            weights = np.repeat(values_of(number, mine)[:, None], spec.dim, axis=1)
            image = BlockImage(
                "rows", spec.name, block, number, {}, mine, weights, np.zeros((len(mine), 1), np.float32)
            )
            entries.append(store.write_block(number, image))
    lists: dict[str, Any] = {"dense": (), "files": (), "open_splits": (), "blocks": tuple(entries)}
    objects: dict[str, Any] = {"config": {}, "metrics": {}, "best": {}, "closed": ClosedSet()}
    store.commit(
        Manifest(
            job="fa" * 16,
            run=0,
            cut=number,
            created="2026-01-01T00:00:00Z",
            seed=0,
            tables=tuple(to_json(spec) for spec in SPECS),
            recipe="none:none",
            epoch=0,
            step=number,
            **lists,
            **objects,
        )
    )


class Asker:
    """A process that asks."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @staticmethod
    def word(number: int) -> int:
        """Return where on the board asker ``number`` counts."""
        return _FIRST + number

    @classmethod
    def started(cls, board: Path, number: int, kind: str, addresses: list[str], seed: int) -> "Asker":
        command = [sys.executable, "-P", "-m", "oarlock.benchmarks.serving_faults_asker", str(board), str(number), kind]
        command += [str(seed), *addresses]
        return cls(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def told(self, seconds: float) -> dict[str, Any]:
        """Return what it counted, once it has ended."""
        out, _ = self._process.communicate(timeout=seconds)
        if self._process.returncode:
            raise RuntimeError(f"an asker ended with {self._process.returncode}")
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


class _Counting:
    """What an asker counts. A question's keys are drawn beforehand, with what their rows are at cut 0."""

    def __init__(self, board: Any, number: int, kind: str, seed: int) -> None:
        self.board = board
        self._word = Asker.word(number)
        self._kind = kind
        rng = np.random.default_rng((seed, number))
        self.drawn = [{spec.name: rng.choice(KEYS, KEYS_PER_TABLE) for spec in SPECS} for _ in range(DRAWN)]
        self._bases = [{name: values_of(0, keys)[:, None] for name, keys in one.items()} for one in self.drawn]
        self.marks = [rng.choice(MARKS, KEYS_PER_TABLE).astype(np.uint64) for _ in range(DRAWN)]
        self.answers = self.failed = self.wrong = 0
        self._seconds = array("d")
        self._cuts: set[int] = set()
        self._said: list[str] = []
        # Of the follower that is asked alone: the least that each mark may be by now.
        self._least = np.zeros(MARKS, np.float32)

    @property
    def over(self) -> bool:
        return bool(self.board[STOP])

    def took(self, begun: float) -> None:
        self._seconds.append(time.perf_counter() - begun)
        self.answers += 1
        self.board[self._word] = self.answers

    def fails(self, error: PSError) -> None:
        self.failed += 1
        self._say(f"{type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        if len(self._said) < 5:
            self._said.append(text[:500])

    def check(self, at: int, found: Found) -> None:
        """Check rows of the parts: all are of the cut that the answer names, and there is such a cut."""
        cut = found.version.cut
        self._cuts.add(cut)
        right = 1 <= cut <= self.board[CUT] and not any(found.missing.values())
        for spec in SPECS:
            rows = found[spec.name]
            right = right and rows.shape == (KEYS_PER_TABLE, spec.dim)
            right = right and bool((rows == self._bases[at][spec.name] + np.float32(1000 * cut)).all())
        if not right:
            self.wrong += 1
            self._say(
                f"wrong: {found.version} of {int(self.board[CUT])} cuts, {[r[:, 0].tolist() for r in found.values()]}"
            )

    def check_marks(self, at: int, found: Found, least: int, *, alone: bool) -> None:
        """Check rows of the followed job: whole numbers of pushes, none from the future, nor from long ago."""
        values = found["marks"][:, 0]
        right = bool(
            (values == np.floor(values)).all() and values.min() >= least and values.max() <= self.board[PUSHED]
        )
        if alone:
            keys = self.marks[at]
            right = right and bool((values >= self._least[keys]).all())
            np.maximum.at(self._least, keys, values)
        if not right:
            self.wrong += 1
            self._say(f"wrong: {values.tolist()} of {least} to {int(self.board[PUSHED])} pushes, alone: {alone}")

    def told(self, counts: Any) -> dict[str, Any]:
        histogram = np.bincount(np.searchsorted(EDGES, np.frombuffer(self._seconds)), minlength=len(EDGES) + 1)
        return {
            "kind": self._kind,
            "answers": self.answers,
            "failed": self.failed,
            "wrong": self.wrong,
            "swaps": max(0, len(self._cuts) - 1),
            "hedges": counts.hedges,
            "hedges_won": counts.hedges_won,
            "failovers": counts.failovers,
            "asked_again": counts.asked_again,
            "said": self._said,
            "histogram": histogram.tolist(),
        }


def _ask(counting: _Counting, addresses: list[str]) -> Any:
    with Client(addresses, timeout_seconds=TIMEOUT_SECONDS) as client:
        at = 0
        while not counting.over:
            at = (at + 1) % DRAWN
            begun = time.perf_counter()
            try:
                found = client.lookup(counting.drawn[at])
            except PSError as error:
                counting.fails(error)
                continue
            counting.took(begun)
            counting.check(at, found)
        return client.counts


def _ask_followed(counting: _Counting, addresses: list[str]) -> Any:
    """The last address is that of a follower which is not killed, asked alone now and then."""
    options: dict[str, Any] = {"timeout_seconds": TIMEOUT_SECONDS}
    with Client(addresses, **options) as client, Client(addresses[-1], **options) as one:
        turn = 0
        while not counting.over:
            turn += 1
            at, alone = turn % DRAWN, turn % ALONE == 0
            least = int(counting.board[PUSHED_LATELY])
            begun = time.perf_counter()
            try:
                found = (one if alone else client).lookup({"marks": counting.marks[at]})
            except PSError as error:
                counting.fails(error)
                continue
            counting.took(begun)
            counting.check_marks(at, found, least, alone=alone)
        return client.counts


async def _ask_asyncio(counting: _Counting, addresses: list[str]) -> Any:
    async with AsyncClient(addresses, timeout_seconds=TIMEOUT_SECONDS) as client:

        async def ask(task: int) -> None:
            at = task
            while not counting.over:
                at = (at + TASKS) % DRAWN
                begun = time.perf_counter()
                try:
                    found = await client.lookup(counting.drawn[at])
                except PSError as error:
                    counting.fails(error)
                    continue
                counting.took(begun)
                counting.check(at, found)

        await asyncio.gather(*(ask(task) for task in range(TASKS)))
        return client.counts


def main() -> int:
    """Ask until the board says that it is over."""
    _, path, number, kind, seed, *addresses = sys.argv
    board = np.memmap(path, np.int64, "r+", shape=BOARD_WORDS)
    counting = _Counting(board, int(number), kind, int(seed))
    if kind == ASYNCIO:
        counts = asyncio.run(_ask_asyncio(counting, addresses))
    else:
        counts = (_ask if kind == BLOCKING else _ask_followed)(counting, addresses)
    print(json.dumps(counting.told(counts)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
