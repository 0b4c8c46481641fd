# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.compress [--json] [--quick]`: bytes of a row under every codec, and its time each way.

Requests of 15,000 rows, normally distributed with a size of their own; all cases take turns, and the fastest of each is
what is told, per row. Invariant: it writes no file, starts nothing, and leaves OPENBLAS_* as it finds them.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.compress")

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.compress import Compression, Draw, RowCodec, draw_start
from oarlock.embedding.compress_residuals import Residuals
from oarlock.embedding.refusal import GRADIENT_LIMIT

ROWS = 15_000
KEYS = 200_000
REQUESTS = 8  # different ones, so that no branch is known by heart
DIMS = (16, 64)


def cases(dim: int) -> list[tuple[Compression, bool]]:
    """Return compressions, each with or without error feedback."""
    plain = [
        Compression(),
        Compression("float16"),
        Compression("float16", rounding="stochastic"),
        Compression("bfloat16"),
        Compression("bfloat16", rounding="stochastic"),
        Compression("int8"),
        Compression("int8", rounding="stochastic"),
        Compression("topk", dim // 8),
        Compression("topk", dim // 4),
    ]
    packed = [Compression(zstd=1), Compression("bfloat16", zstd=1), Compression("int8", zstd=1)]
    kept = [Compression("int8"), Compression("topk", dim // 8), Compression("topk", dim // 4)]
    return [*((c, False) for c in [*plain, *packed]), *((c, True) for c in kept)]


@dataclass
class Case:
    """A codec with what it needs, and the fastest times so far, in seconds a request."""

    codec: RowCodec
    residuals: Residuals | None
    out: NDArray[np.uint8]
    back: NDArray[np.float32]
    start: np.uint64
    size: int = 0
    left_out: float = 0.0
    encode: float = float("inf")
    decode: float = float("inf")

    def turn(self, step: int, keys: NDArray[np.uint64], values: NDArray[np.float32]) -> None:
        """Measure one request."""
        draw = Draw(keys, self.start, step)

        def send() -> int:
            if self.residuals is not None:
                return self.residuals.encode(keys, values, self.out, draw)
            return self.codec.encode(values, self.out, draw)

        seconds, self.size = timed(send)
        self.encode = min(self.encode, seconds)
        seconds, _ = timed(lambda: self.codec.decode(self.out[: self.size], self.back))
        self.decode = min(self.decode, seconds)
        if self.residuals is None:
            off = np.square(self.back - values, dtype=np.float64).sum(axis=1)
            self.left_out = float(np.sqrt((off / np.square(values, dtype=np.float64).sum(axis=1)).mean()))

    def told(self) -> dict[str, Any]:
        compression = self.codec.compression
        return {
            "dim": self.codec.dim,
            "codec": compression.codec,
            "k": compression.k,
            "rounding": compression.rounding,
            "zstd": compression.zstd,
            "error_feedback": self.residuals is not None,
            "bytes_per_row": round(self.size / len(self.back), 2),
            "encode_ns": round(self.encode / len(self.back) * 1e9, 1),
            "decode_ns": round(self.decode / len(self.back) * 1e9, 1),
            "left_out": None if self.residuals is not None else round(self.left_out, 5),
        }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def measure(rows: int, turns: int) -> dict[str, Any]:
    """Return one figure of each kind for every case."""
    rng = np.random.default_rng(0)
    found = []
    for dim in DIMS:
        requests = [
            (
                rng.choice(KEYS, rows, replace=False).astype(np.uint64),
                (rng.normal(size=(rows, dim)) * np.exp2(rng.uniform(-14, -6, (rows, 1)))).astype(np.float32),
            )
            for _ in range(REQUESTS)
        ]
        ready = []
        for compression, feedback in cases(dim):
            codec = RowCodec(compression, dim, GRADIENT_LIMIT)
            residuals = Residuals(codec, KEYS * (4 * dim + 32)) if feedback else None
            out: NDArray[np.uint8] = np.zeros(codec.size(rows), np.uint8)
            back: NDArray[np.float32] = np.zeros((rows, dim), np.float32)
            ready.append(Case(codec, residuals, out, back, draw_start(0, "benchmark", "push")))
        for step in range(turns):
            for case in ready:
                case.turn(step, *requests[step % REQUESTS])
        found += [case.told() for case in ready]
    return {"rows": rows, "turns": turns, "cases": found, "surroundings": surroundings(("numpy", "numba", "pyarrow"))}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, for tests")
    chosen = parser.parse_args()
    result = measure(100 if chosen.tiny else ROWS, 2 if chosen.tiny else 24 if chosen.quick else 120)
    if chosen.json:
        print(json.dumps(result))
        return 0
    print("dim  codec                          bytes/row  ns to encode  ns to decode  left out")
    for case in result["cases"]:
        name = case["codec"] + (f" {case['k']}" if case["k"] else "")
        name += " stochastic" if case["rounding"] == "stochastic" else ""
        name += " zstd" if case["zstd"] else ""
        name += " + feedback" if case["error_feedback"] else ""
        off = "-" if case["left_out"] is None else f"{case['left_out']:.5f}"
        times = f"{case['encode_ns']:>12}  {case['decode_ns']:>12}"
        print(f"{case['dim']:>3}  {name:<30} {case['bytes_per_row']:>9}  {times}  {off:>8}")
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
