# SPDX-License-Identifier: Apache-2.0
"""The other side of `oarlock.benchmarks.table_dedup`: times numpy.unique or torch.unique in an environment of its own.

Run as a file, for that environment need not hold Oarlock. It says its version as soon as it can begin; then it answers lines on
its standard input: {"sets": m, "keys": n} comes before m times n uint64, {"time": [numbers]} asks for the seconds of a call for
each of those sets. Invariant: one thread; it ends when its standard input closes.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def unique_of(package: str) -> tuple[str, Callable[[Any], Any], Callable[[Any], Any]]:
    """Return (version, what makes an array of keys the package's own, the function to time)."""
    if package == "numpy":
        return np.__version__, lambda keys: keys, lambda keys: np.unique(keys, return_inverse=True)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    return (
        str(torch.__version__),
        lambda keys: torch.from_numpy(keys.view(np.int64)),
        lambda keys: torch.unique(keys, return_inverse=True),
    )


def seconds(function: Callable[[Any], Any], values: list[Any]) -> list[float]:
    """Return the seconds of one call for each of ``values``, after one that does not count: the caches were another's."""
    function(values[-1])
    spent = []
    for value in values:
        begun = time.perf_counter()
        function(value)
        spent.append(time.perf_counter() - begun)
    return spent


def main() -> None:
    """Answer until there is no more to read."""
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def say(what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    version, own, unique = unique_of(sys.argv[1])
    say(version)
    sets: list[Any] = []
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "time" in asked:
            say(seconds(unique, [sets[i] for i in asked["time"]]))
            continue
        size = 8 * asked["keys"]
        raw = [bytearray(sys.stdin.buffer.read(size)) for _ in range(asked["sets"])]
        sets = [own(np.frombuffer(part, np.uint64)) for part in raw]


if __name__ == "__main__":
    main()
