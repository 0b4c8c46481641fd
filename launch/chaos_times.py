# SPDX-License-Identifier: Apache-2.0
"""How long training took to go on after a process was killed or stopped, of the notes of pushes alone.

    a shard      from the signal to the first acknowledged push on *every* block that was its own: a block is its own if the last
                 answer for the block before the signal came from it. Answers of a killed shard do not count, nor, for a
                 stopped one, of pushes that were sent before it was stopped.
    a worker     from the signal until the last of its splits (of its ranks, in sync and hybrid) had a push of another process
                 acknowledged; splits that it had finished are not trained again, and are not waited for

Blocks that no push touches afterwards tell nothing, and are counted. Pure functions over the lines of client/push_notes.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.client.push_notes import blocks_done

# Who owns a block is read off as many seconds before the signal.
BEFORE_SECONDS = 20.0
# Of lines after it so many are looked at at once.
CHUNK = 4096


@dataclass(frozen=True)
class Recovered:
    """``seconds`` until all ``parts`` (blocks, splits or ranks) were trained again; ``silent`` ones had no push since."""

    seconds: float | None
    parts: int
    silent: int = 0


def shard_recovered(
    lines: NDArray[np.void], blocks: int, shard: int, at: float, *, killed: bool, until: float = np.inf
) -> Recovered:
    """Return when the blocks of ``shard``, an incarnation, went on after ``at``. ``lines`` are ordered by ``told``."""
    told = lines["told"]
    before = lines[np.searchsorted(told, at - BEFORE_SECONDS) : np.searchsorted(told, at, "right")]
    left = _owned(before, blocks, shard)
    parts, last = int(left.sum()), None
    first, end = int(np.searchsorted(told, at, "right")), int(np.searchsorted(told, until, "right"))
    for begin in range(first, end, CHUNK):
        if not left.any():
            break
        after = lines[begin : min(end, begin + CHUNK)]
        after = after[after["shard"] != shard] if killed else after[after["sent"] > at]
        done = blocks_done(after, blocks) & left
        again = done.any(axis=0)
        if again.any():
            last = float(after["told"][done.argmax(axis=0)[again].max()])
        left &= ~again
    return Recovered(None if last is None else last - at, parts, int(left.sum()))


def _owned(before: NDArray[np.void], blocks: int, shard: int) -> NDArray[np.bool_]:
    """Return bool[blocks]: whose last line is of ``shard``."""
    if not len(before):
        return np.zeros(blocks, np.bool_)
    done = blocks_done(before, blocks)[::-1]
    owned: NDArray[np.bool_] = done.any(axis=0) & (before["shard"][::-1][done.argmax(axis=0)] == shard)
    return owned


def worker_recovered(
    lines: NDArray[np.void], worker: int, at: float, *, ranked: bool, until: float = np.inf
) -> Recovered:
    """Return when what ``worker``, an incarnation, had begun went on after ``at``, trained by others."""
    name = "rank" if ranked else "split"
    begun = np.unique(lines[name][(lines["worker"] == worker) & (lines["told"] <= at)])
    others = lines[(lines["worker"] != worker) & (lines["told"] > at) & (lines["told"] <= until)]
    others = others[np.isin(others[name], begun)]
    parts, first = np.unique(others[name], return_index=True)
    return Recovered(float(others["told"][first].max() - at) if len(parts) else None, len(parts))


def groups_acknowledged(lines: NDArray[np.void]) -> int:
    """Return how many different groups had a push acknowledged."""
    return len(np.unique(lines[["split", "group"]]))
