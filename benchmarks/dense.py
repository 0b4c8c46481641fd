# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.dense [--json] [--quick]`: a step of Wide & Deep and DLRM in float32 and in bfloat16.

Beside each, the products alone that its Linears cannot do without: numpy's in float32, PyTorch's in bfloat16, each with its
inputs and its result in arrays of their own. A step is forward, backward and the rows' gradients of 2,048 samples of 13
numbers and 26 fields; no wire, no optimizer, one thread. All take turns. Where PyTorch is not installed its figures are null, and
``why`` says so. Invariant: it writes no file, starts nothing, and leaves OPENBLAS_* as it finds them.
"""

from oarlock.benchmarks.surroundings import settle, surroundings

if __name__ == "__main__":
    settle("oarlock.benchmarks.dense")

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from oarlock.data.transforms import Fitted
from oarlock.nn import Linear, Model
from oarlock.nn.bfloat16 import load_torch
from oarlock.nn.graph import trainable
from oarlock.nn.layout import aligned
from oarlock.recipes import dlrm, wide_deep

NUMBERS, FIELDS, DIM = 13, 26, 16
BATCH = 2048
ROWS = 10_000  # distinct ones in a batch


@dataclass(frozen=True)
class Shape:
    """As much of a fitted schema as a graph asks for."""

    width: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """One Linear: its shape, and whether its input's gradient is wanted."""

    inputs: int
    units: int
    back: bool

    def gflop(self, batch: int) -> float:
        return (2 + self.back) * 2e-9 * batch * self.inputs * self.units


def models(tiny: bool) -> dict[str, Model]:
    """Return the graphs, in float32."""
    shape = cast(Fitted, Shape(NUMBERS, tuple(f"c{n}" for n in range(FIELDS))))
    wide = wide_deep.WideDeepConfig(dim=DIM, layers=(32, 32) if tiny else (400, 400, 400))
    deep = dlrm.DlrmConfig(dim=DIM, bottom=(16,), top=(32,)) if tiny else dlrm.DlrmConfig(dim=DIM)
    return {"wide_deep": wide_deep.model(wide, shape), "dlrm": dlrm.model(deep, shape)}


def products(model: Model) -> list[Product]:
    """Return the products of a step; those of a single unit are left out, being no work for a matrix product."""
    learning = trainable(model.loss_nodes)
    return [
        Product(node.inputs[0].width, node.width, node.inputs[0] in learning)
        for node in model.loss_nodes
        if isinstance(node.detail, Linear) and node.width > 1
    ]


def feeds_of(model: Model, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    (rows,) = model.lookups
    values = rng.normal(0, 0.05, (ROWS, rows.dim)).astype(np.float32)
    return {
        rows.name: (values, rng.integers(0, ROWS, (batch, rows.fields)).astype(np.int32)),
        "numbers": rng.standard_normal((batch, NUMBERS), dtype=np.float32),
        model.label: (rng.random(batch) < 0.25).astype(np.float32),
    }


def step_of(model: Model, dense_dtype: str, batch: int) -> tuple[Callable[[], Any], NDArray[np.float32]]:
    """Return a step, and where it leaves the gradients."""
    program = replace(model, dense_dtype=dense_dtype).bind(batch)
    program.flat_parameters[:] = np.random.default_rng(1).normal(0, 0.05, program.flat_parameters.shape)
    feeds = feeds_of(model, batch)
    return lambda: program.train(feeds, batch), program.flat_gradients


def in_numpy(wanted: list[Product], batch: int) -> Callable[[], Any]:
    rng = np.random.default_rng(2)

    def drawn(rows: int, width: int) -> NDArray[np.float32]:
        out = aligned(rows, width)
        out[:] = rng.standard_normal(out.shape, dtype=np.float32)
        return out

    made = [[drawn(*shape) for shape in 2 * ((batch, p.inputs), (p.inputs, p.units), (batch, p.units))] for p in wanted]

    def run() -> None:
        for p, (x, w, g, back, weight, out) in zip(wanted, made, strict=True):
            np.matmul(x, w, out=out)
            np.matmul(x.T, g, out=weight)
            if p.back:
                np.matmul(g, w.T, out=back)

    return run


def in_torch(wanted: list[Product], batch: int) -> Callable[[], Any]:
    torch = load_torch()
    torch.set_num_threads(1)
    torch.manual_seed(2)
    made = [
        [
            torch.randn(shape).to(torch.bfloat16)
            for shape in 2 * ((batch, p.inputs), (p.inputs, p.units), (batch, p.units))
        ]
        for p in wanted
    ]

    def run() -> None:
        for p, (x, w, g, back, weight, out) in zip(wanted, made, strict=True):
            torch.mm(x, w, out=out)
            torch.mm(x.t(), g, out=weight)
            if p.back:
                torch.mm(g, w.t(), out=back)

    return run


def timed(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Call each in turn; return the milliseconds of all turns but the first."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                found[name].append((time.perf_counter() - begin) * 1e3)
    return found


def measure_model(model: Model, batch: int, turns: int, torch: bool) -> dict[str, Any]:
    wanted = products(model)
    full, gradients = step_of(model, "float32", batch)
    calls = {"float32_step": full, "float32_products": in_numpy(wanted, batch)}
    difference = None
    if torch:
        calls["bfloat16_step"], rounded = step_of(model, "bfloat16", batch)
        calls["bfloat16_products"] = in_torch(wanted, batch)
        full(), calls["bfloat16_step"]()
        difference = round(float(np.linalg.norm(rounded - gradients) / np.linalg.norm(gradients)), 5)
    times = timed(calls, turns)
    gflop = sum(product.gflop(batch) for product in wanted)
    out: dict[str, Any] = {"gflop": round(gflop, 3), "gradient_difference": difference}
    for dtype in ("float32", "bfloat16"):
        step, alone = times.get(f"{dtype}_step"), times.get(f"{dtype}_products")
        if step is None or alone is None:
            names = ("step_ms", "step_median_ms", "products_ms", "products_gflops", "products_share")
            out |= {f"{dtype}_{name}": None for name in names}
            continue
        out |= {
            f"{dtype}_step_ms": round(min(step), 3),
            f"{dtype}_step_median_ms": round(float(np.median(step)), 3),
            f"{dtype}_products_ms": round(min(alone), 3),
            f"{dtype}_products_gflops": round(gflop / min(alone) * 1e3, 1),
            f"{dtype}_products_share": round(min(alone) / min(step), 3),
        }
    out["bfloat16_speedup"] = round(out["float32_step_ms"] / out["bfloat16_step_ms"], 3) if torch else None
    return out


def measure(batch: int, turns: int, tiny: bool) -> dict[str, Any]:
    """Return the figures of both models; times are of the fastest turn, medians beside them."""
    torch = importlib.util.find_spec("torch") is not None
    return {
        "batch": batch,
        "turns": turns,
        "models": {name: measure_model(model, batch, turns, torch) for name, model in models(tiny).items()},
        "why": None if torch else "torch is not installed beside Oarlock: make setup-torch",
        "surroundings": surroundings(("numpy", "numba", "torch")),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, for tests")
    chosen = parser.parse_args()
    result = measure(64 if chosen.tiny else BATCH, 2 if chosen.tiny else 40 if chosen.quick else 200, chosen.tiny)
    if chosen.json:
        print(json.dumps(result))
        return 0
    for name, figures in result["models"].items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:<28} {value}")
    if result["why"]:
        print(result["why"])
    print(json.dumps(result["surroundings"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
