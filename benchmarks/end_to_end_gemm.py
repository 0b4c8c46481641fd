# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.end_to_end_gemm`: the matrix products of a training step and nothing else, as often as asked.

Of each layer the forward product and the two of the backward pass, float32, by numpy's BLAS on as many threads as the environment
says: no training that uses this BLAS can be faster. One JSON object a line on standard input,
{"layers": [[inputs, outputs], ...], "batch": n, "steps": k}, is answered by one on standard output. Invariant: between questions
it uses no processor. Main thread.
"""

import json
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


class Layer:
    """The operands and results of one layer's products, made once."""

    def __init__(self, inputs: int, outputs: int, batch: int, rng: np.random.Generator) -> None:
        self._x, self._gradient = _matrix(rng, batch, inputs), _matrix(rng, batch, outputs)
        self._weight = _matrix(rng, inputs, outputs)
        self._y, self._dx, self._dw = (np.empty_like(a) for a in (self._gradient, self._x, self._weight))

    def multiply(self) -> None:
        np.matmul(self._x, self._weight, out=self._y)
        np.matmul(self._x.T, self._gradient, out=self._dw)
        np.matmul(self._gradient, self._weight.T, out=self._dx)


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> Matrix:
    return rng.standard_normal((rows, columns), np.float32)


def main() -> int:
    """Answer until the input ends."""
    rng = np.random.default_rng(0)
    known: dict[str, list[Layer]] = {}
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        name = json.dumps([asked["layers"], asked["batch"]])
        if name not in known:
            known = {name: [Layer(shape[0], shape[1], asked["batch"], rng) for shape in asked["layers"]], **known}
        begun, worked = time.perf_counter(), time.process_time()
        for _ in range(asked["steps"]):
            for layer in known[name]:
                layer.multiply()
        answer = {"seconds": time.perf_counter() - begun, "processor": time.process_time() - worked}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
