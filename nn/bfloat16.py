# SPDX-License-Identifier: Apache-2.0
"""Products of Linear layers in bfloat16, by PyTorch, whose oneDNN has kernels for the CPUs that multiply such numbers.

Invariant: parameters, their gradients, and whatever an operation but these Linears sees are float32. A product's inputs
are rounded to bfloat16, its sums are float32, and its result is rounded once. Between two such Linears, where nobody else
looks, value and gradient stay bfloat16. The only file that knows PyTorch, and it is loaded only if a model asks for it.
``check_dense_dtype`` may be called by any thread; the rest belongs to the one that runs the program. torch.mm with ``out``
records nothing for autograd, since no tensor here asks for gradients.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from oarlock.nn import bfloat16_kernels, kernels
from oarlock.nn.graph import Linear, Node, consumers
from oarlock.nn.layout import aligned
from oarlock.nn.operations import ACTIVATE, IN_PLACE, Step
from oarlock.proto.errors import InvalidArgument

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

DENSE_DTYPES = ("float32", "bfloat16")
# Of fewer weights a product takes hardly longer than the conversions (measured: 64 x 16 is not worth it, 13 x 512 is).
LEAST_WEIGHTS = 4096
# What /proc/cpuinfo calls the instructions, on x86 and on ARM.
FAST = {"avx512_bf16", "amx_bf16", "bf16"}


def check_dense_dtype(dense_dtype: object) -> None:
    """Raise InvalidArgument unless models can be trained under ``dense_dtype`` here.

    For bfloat16 it loads PyTorch and compiles kernels. That takes seconds, so it is done as a model is made and not as
    it is bound, which a worker does where its heartbeats are sent.
    """
    if dense_dtype not in DENSE_DTYPES:
        raise InvalidArgument(f"dense_dtype = {dense_dtype!r}: give one of {', '.join(DENSE_DTYPES)}")
    if dense_dtype == "bfloat16":
        load_torch()
        _compile()


def load_torch() -> Any:
    """Return the module, or raise InvalidArgument with the way to get it."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InvalidArgument(
            f"dense_dtype = 'bfloat16' needs PyTorch ({error}): pip install oarlock[torch] for every process of the job,"
            " or set dense_dtype to 'float32'"
        ) from error


def cpu_is_fast(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU multiplies bfloat16; where that cannot be read, True, so that nobody is warned in vain."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return True
    return bool(words & FAST)


def _compile() -> None:
    wide, tile, no_bias = np.zeros((1, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32)
    half = np.zeros((1, 1), np.uint16)
    bfloat16_kernels.pack(wide, 0, 1, half)
    bfloat16_kernels.unpack(half, wide, 0)
    bfloat16_kernels.finish(half, no_bias, True)
    bfloat16_kernels.finish_wide(half, no_bias, True, wide, 0)
    bfloat16_kernels.bias_gradient(half, True, half, tile, no_bias)
    bfloat16_kernels.relu_bias_gradient_wide(wide, 0, wide, 0, tile, no_bias, half)


def in_bfloat16(node: Node) -> bool:
    """Whether ``node`` is a Linear whose products are taken in bfloat16."""
    if not isinstance(node.detail, Linear) or node.detail.units == 1:
        return False
    return node.inputs[0].width * node.width >= LEAST_WEIGHTS


def stays_narrow(node: Node, readers: Mapping[Node, list[tuple[Node, int]]]) -> bool:
    """Whether only one product in bfloat16 ever reads ``node``, so that its float32 values are not needed.

    The score, which others read, has one unit, so it is none of these.
    """
    if not in_bfloat16(node):
        return False
    assert isinstance(node.detail, Linear)
    those = readers[node]
    return node.detail.activation in (None, "relu") and len(those) == 1 and in_bfloat16(those[0][0])


class Half:
    """bfloat16[batch, width] in memory that may be shared: ``array`` for kernels, ``tensor`` and ``transposed`` for torch."""

    def __init__(self, torch: Any, memory: Array, width: int) -> None:
        self._torch = torch
        self._memory = memory
        self._width = width

    def resize(self, batch: int) -> None:
        """Be the first ``batch`` rows."""
        self.array: Array = self._memory[: batch * self._width].reshape(batch, self._width)
        # As int16, which every torch takes from numpy; the memory stays shared.
        self.tensor = self._torch.from_numpy(self.array.view(np.int16)).view(self._torch.bfloat16)
        self.transposed = self.tensor.t()


class HalfLinear:
    """A Linear of one program, in place of the operation of that name.

    ``input`` is the input rounded to bfloat16; of a Linear that reads ``before`` it is that one's output itself, and
    ``back``, the product that goes to the input, is that one's gradient itself.
    """

    def __init__(self, step: Step, before: "HalfLinear | None", narrow: bool, shared: "_Shared") -> None:
        layer = step.node.detail
        assert isinstance(layer, Linear)
        inputs, units = step.parameters[0].shape
        self._mm = shared.torch.mm
        self._layer = layer
        self._before = before
        self._narrow = narrow
        self._relu = layer.activation == "relu"
        self._bias = step.parameters[1] if layer.bias else np.zeros(units, np.float32)
        self._no_bias_gradient = np.empty(units, np.float32)
        self._weight = shared.fixed(inputs, units)
        self._weight_gradient = shared.fixed(inputs, units, shared.weight_gradient)
        self._output = shared.samples(units, None if narrow else shared.product)
        self._gradient = shared.samples(units, None if narrow else shared.product)
        self._input = before._output if before else shared.samples(inputs)
        self._back = before._gradient if before else shared.samples(inputs, shared.back)

    def forward(self, step: Step) -> None:
        """Write the output, to the program's memory or for the next product only."""
        weight, source, out = step.parameters[0], step.inputs[0], step.output
        assert out is not None
        if self._before is None:
            bfloat16_kernels.pack(source.rows, source.start, source.width, self._input.array)
        bfloat16_kernels.pack(weight, 0, weight.shape[1], self._weight.array)
        product = self._output
        self._mm(self._input.tensor, self._weight.tensor, out=product.tensor)
        if self._narrow:
            bfloat16_kernels.finish(product.array, self._bias, self._relu)
            return
        bfloat16_kernels.finish_wide(product.array, self._bias, self._relu, out.rows, out.start)
        if not self._relu and self._layer.activation is not None:
            ACTIVATE[self._layer.activation](out.rows, out.start, out.rows, out.start, out.width)

    def backward(self, step: Step) -> None:
        """Write the gradients of weight and bias, and that of the input if somebody wants it."""
        self._take_gradient(step)
        self._mm(self._input.transposed, self._gradient.tensor, out=self._weight_gradient.tensor)
        bfloat16_kernels.unpack(self._weight_gradient.array, step.gradients[0], 0)
        target = step.targets[0]
        if target is None:
            return
        self._mm(self._gradient.tensor, self._weight.transposed, out=self._back.tensor)
        if self._before is None:
            bfloat16_kernels.unpack(self._back.array, target.rows, target.start)

    def _take_gradient(self, step: Step) -> None:
        """Have the gradient before the activation in bfloat16, and write that of the bias."""
        out, g = step.output, step.gradient
        assert out is not None
        assert g is not None
        own = self._gradient.array
        bias_gradient = step.gradients[1] if self._layer.bias else self._no_bias_gradient
        if self._narrow:
            bfloat16_kernels.bias_gradient(self._output.array, self._relu, own, step.scratch, bias_gradient)
        elif self._relu:
            bfloat16_kernels.relu_bias_gradient_wide(
                out.rows, out.start, g.rows, g.start, step.scratch, bias_gradient, own
            )
        else:
            if self._layer.activation is not None:
                IN_PLACE[self._layer.activation](out.rows, out.start, g.rows, g.start, g.rows, g.start, g.width)
            if self._layer.bias:
                kernels.bias_gradient(g.rows, g.start, step.scratch, bias_gradient)
            bfloat16_kernels.pack(g.rows, g.start, g.width, own)


class _Shared:
    """Memory that Linears use one after the other, and all of which the rows change with the batch."""

    def __init__(self, torch: Any, steps: list[Step], max_batch: int) -> None:
        shapes = [step.parameters[0].shape for step in steps]
        self.torch = torch
        self.max_batch = max_batch
        self.product = _memory(max_batch * max(units for _, units in shapes))
        self.back = _memory(max_batch * max(inputs for inputs, _ in shapes))
        self.weight_gradient = _memory(max(inputs * units for inputs, units in shapes))
        self.halves: list[Half] = []

    def samples(self, width: int, memory: Array | None = None) -> Half:
        """Return one value per sample and column, in ``memory`` or in its own."""
        half = Half(self.torch, _memory(self.max_batch * width) if memory is None else memory, width)
        half.resize(self.max_batch)
        self.halves.append(half)
        return half

    def fixed(self, rows: int, width: int, memory: Array | None = None) -> Half:
        """Return what has the shape of a weight."""
        half = Half(self.torch, _memory(rows * width) if memory is None else memory, width)
        half.resize(rows)
        return half


class HalfLinears:
    """All Linears of a program whose products are taken in bfloat16: ``operations`` says which."""

    def __init__(self, nodes: Iterable[Node], steps: Mapping[Node, Step], max_batch: int) -> None:
        torch = load_torch()
        self._halves: list[Half] = []
        self.operations: dict[Node, HalfLinear] = {}
        order = tuple(nodes)
        chosen = [node for node in order if in_bfloat16(node)]
        if not chosen:
            return
        if not cpu_is_fast():
            logger.warning(
                "event=bfloat16_slow reason=%r", "this CPU cannot multiply bfloat16; dense_dtype = 'float32' is faster"
            )
        # For the whole process, as BLAS's own number is.
        torch.set_num_threads(blas_threads())
        readers = consumers(order)
        shared = _Shared(torch, [steps[node] for node in chosen], max_batch)
        for node in chosen:
            before = node.inputs[0]
            self.operations[node] = HalfLinear(
                steps[node],
                self.operations[before] if stays_narrow(before, readers) else None,
                stays_narrow(node, readers),
                shared,
            )
        self._halves = shared.halves

    def resize(self, batch: int) -> None:
        """Take the first ``batch`` rows of everything."""
        for half in self._halves:
            half.resize(batch)


def blas_threads() -> int:
    """Return on how many threads numpy's BLAS multiplies, the first that was loaded: PyTorch may bring another."""
    return next((int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), 1)


def _memory(size: int) -> Array:
    """Return zeros uint16[size] that begin at a cache line."""
    words: Array = aligned(1, (size + 1) // 2)[0].view(np.uint16)
    return words[:size]
