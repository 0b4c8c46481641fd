# SPDX-License-Identifier: Apache-2.0
"""What all update kernels share: where each constant lies, sums over a row, powers.

Invariant: a sum over a row has one fixed order, so it has the same bits at any vector width. Nothing checks bounds. No
state, any thread.

The sum of squares of a row: its columns in parts of 64, the last one filled up with zeros. In a part the float32 squares of
columns k, k + 16, k + 32, k + 48 are added in pairs, then the 16 sums as a tree (lane i and i + 8, then i + 4, i + 2, i + 1).
The parts are added in order, in float64.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, store_f32

RUN = 16  # columns of one run of a sum
PART = 64  # columns of one part

_ZERO = np.float32(0.0)

# Positions in the constants of an optimizer, float64[CONSTANTS]; embedding/optimizers.py fills them in.
BETA1, BETA2, EPSILON, MOMENTUM, RHO, L1, L2, L21, DECAY, BETA, DELAY, BY_STEP = range(12)
# The same for the passes of embedding/regularise.py: 0 there where the update itself has the constant in its formula.
CLIP_VALUE, CLIP_NORM, PASS_L1, PASS_L2, PASS_DECAY, LOWER, UPPER = range(12, 19)
CONSTANTS = 19


def _tree(builder: Any, x: Any) -> Any:
    word, half = ir.IntType(32), RUN // 2
    while half:
        ends = [ir.Constant(ir.VectorType(word, half), list(range(b, b + half))) for b in (0, half)]
        x = builder.fadd(*(builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), end) for end in ends))
        half //= 2
    return builder.extract_element(x, ir.Constant(word, 0))


def _load_some(builder: Any, start: Any, run: int, count: Any) -> Any:
    """Load run number ``run`` at ``start``, zeros in place of the columns from ``count`` on."""
    word, lanes = ir.IntType(32), ir.VectorType(ir.FloatType(), RUN)
    longs, mask = ir.VectorType(ir.IntType(64), RUN), ir.VectorType(ir.IntType(1), RUN)
    name = f"llvm.masked.load.v{RUN}f32.p0"
    kind = ir.FunctionType(lanes, [ir.PointerType(), word, mask, lanes])
    load = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    undefined = ir.Constant(longs, ir.Undefined)
    one = builder.insert_element(undefined, count, ir.Constant(word, 0))
    counts = builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(word, RUN), [0] * RUN))
    inside = builder.icmp_signed("<", ir.Constant(longs, list(range(RUN * run, RUN * run + RUN))), counts)
    place = builder.gep(start, [ir.Constant(ir.IntType(64), run)], source_etype=lanes)
    return builder.call(load, [place, ir.Constant(word, 4), inside, ir.Constant(lanes, [0.0] * RUN)])


def _squares(runs: int, whole: bool) -> Callable[..., Any]:
    def squares(typing: Any, address: Any, count: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            lanes = ir.VectorType(ir.FloatType(), RUN)
            start = builder.inttoptr(arguments[0], ir.PointerType())
            sums = []
            for run in range(runs):
                if whole:
                    place = builder.gep(start, [ir.Constant(ir.IntType(64), run)], source_etype=lanes)
                    x = builder.load(place, align=4, typ=lanes)
                else:
                    x = _load_some(builder, start, run, arguments[1])
                sums.append(builder.fmul(x, x))
            while len(sums) > 1:
                sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            return _tree(builder, sums[0])

        return types.float32(types.int64, types.int64), code

    return squares


def _plain_squares(address: Any, count: Any) -> Any:
    count = min(int(count), PART)
    x = np.zeros(PART, np.float32)
    x[:count] = (ctypes.c_float * count).from_address(int(address))
    x = (x * x).reshape(-1, RUN)
    x = (x[0] + x[1]) + (x[2] + x[3])
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


# part_squares(address, count) sums the squares of min(count, 64) columns, run_squares those of count <= 16 and whole_squares
# those of 64: to the same bits, but faster.
run_squares: Callable[[Any, Any], Any]
part_squares: Callable[[Any, Any], Any]
whole_squares: Callable[[Any, Any], Any]

if numba.config.DISABLE_JIT:
    run_squares = part_squares = whole_squares = _plain_squares
else:
    run_squares = intrinsic(_squares(1, False))
    part_squares = intrinsic(_squares(PART // RUN, False))
    whole_squares = intrinsic(_squares(PART // RUN, True))


@jit
def sum_squares(address: Int, width: Int) -> Any:
    """Return the sum of the squares of ``width`` float32 values, float64, in the order above."""
    total = np.float64(0.0)
    whole = width & -PART
    for c in range(0, whole, PART):
        total += np.float64(whole_squares(address + 4 * c, PART))
    if whole < width:
        total += np.float64(part_squares(address + 4 * whole, width - whole))
    return total


@jit
def sum_part(part: Int, count: Int) -> Any:
    """Return the sum of the squares of min(count, 64) values of a scratch of 64, whose rest is set to zeros.

    Whole loads, because a masked one has to wait for values that were only just written.
    """
    for k in range(count, PART):
        store_f32(part, k, _ZERO)
    return np.float64(whole_squares(part, PART))


@jit
def powers(first: float, second: float, exponent: Int) -> tuple[float, float]:
    """Return both bases to an integer exponent >= 0, by repeated squaring: the same bits on every CPU."""
    a = 1.0
    b = 1.0
    while exponent > 0:
        if exponent & 1:
            a *= first
            b *= second
        first *= first
        second *= second
        exponent >>= 1
    return a, b
