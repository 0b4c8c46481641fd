# SPDX-License-Identifier: Apache-2.0
"""A tile of a matrix product in the processor's registers: what BLAS's kernels are, with what follows a product done in them.

A tile has ``ROWS`` rows and one or two vectors of ``LANES`` float32; its sums stay in registers over the whole loop, so a
result is written once, biased and clipped or masked already. Invariant: nothing here checks bounds; each sum is one chain of
fused multiply-adds in order of the summed index, so it depends on its own factors alone, not on which tile holds it. Callable
from kernels only. No state, any thread.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# 28 sums, two vectors of one factor and one of the other: 31 of the 32 registers of AVX-512.
ROWS, LANES = 14, 16

_WORD, _INT, _BIT, _POINTER = ir.IntType(64), ir.IntType(32), ir.IntType(1), ir.PointerType()
_FLOAT = ir.FloatType()
_VECTOR, _INTS, _BITS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _BIT))
_ZERO = ir.Constant(_VECTOR, [ir.Constant(_FLOAT, 0.0)] * LANES)
_ALL, _NONE = ir.Constant(_BITS, [1] * LANES), ir.Constant(_BITS, [0] * LANES)


def suits_cpu() -> bool:
    """Return whether this CPU has registers for a tile; where kernels are not compiled at all, none has."""
    return not numba.config.DISABLE_JIT and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def _word(value: int) -> Any:
    return ir.Constant(_WORD, value)


def _place(builder: Any, address: Any, offset: int) -> Any:
    return builder.gep(builder.inttoptr(address, _POINTER), [_word(offset)], source_etype=ir.IntType(8))


def _read(builder: Any, address: Any, offset: int, kind: Any = _VECTOR) -> Any:
    return builder.load(_place(builder, address, offset), align=4, typ=kind)


def _ask(builder: Any, vectors: int, address: Any, step: Any, write: int) -> None:
    """Ask for a tile's lines in memory, which then come while its sums are made."""
    name = "llvm.prefetch.p0"
    kind = ir.FunctionType(ir.VoidType(), [_POINTER, _INT, _INT, _INT])
    prefetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    # To be kept in all levels, data cache.
    flags = [ir.Constant(_INT, n) for n in (write, 3, 1)]
    for _ in range(ROWS):
        for v in range(vectors):
            builder.call(prefetch, [_place(builder, address, 4 * LANES * v), *flags])
        address = builder.add(address, step)


def _everywhere(builder: Any, value: Any, kind: Any = _VECTOR) -> Any:
    """Return a vector of ``value`` in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * LANES))


def _sums(builder: Any, vectors: int, across: bool, a: Any, a_step: Any, b: Any, b_step: Any, length: Any) -> Any:
    """Return [row][vector] of the sums over ``length`` >= 1 products.

    ``a_step``: bytes from one row of the tile to the next or, ``across`` memory's rows, from one summed index to the next.
    """
    name = f"llvm.fma.v{LANES}f32"
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    multiply_add = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    before = builder.block
    loop, after = builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.after")
    builder.branch(loop)
    builder.position_at_end(loop)

    def changing(kind: Any, first: Any) -> Any:
        phi = builder.phi(kind)
        phi.add_incoming(first, before)
        return phi

    at, left, right = changing(_WORD, _word(0)), changing(_WORD, a), changing(_WORD, b)
    sums = [[changing(_VECTOR, _ZERO) for _ in range(vectors)] for _ in range(ROWS)]
    factors = [_read(builder, right, 4 * LANES * v) for v in range(vectors)]
    results = []
    for m, row in enumerate(sums):
        if across:
            value = _read(builder, left, 4 * m, _FLOAT)
        else:
            value = _read(builder, builder.add(left, builder.mul(a_step, _word(m))), 0, _FLOAT)
        value = _everywhere(builder, value)
        results.append([builder.call(multiply_add, [value, f, s]) for f, s in zip(factors, row, strict=True)])
    following = builder.add(at, _word(1))
    at.add_incoming(following, loop)
    left.add_incoming(builder.add(left, a_step if across else _word(4)), loop)
    right.add_incoming(builder.add(right, b_step), loop)
    for row, new in zip(sums, results, strict=True):
        for phi, result in zip(row, new, strict=True):
            phi.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
    builder.position_at_end(after)
    return results


def _write(builder: Any, rows: Any, out: Any, out_step: Any) -> None:
    for row in rows:
        for v, value in enumerate(row):
            builder.store(value, _place(builder, out, 4 * LANES * v), align=4)
        out = builder.add(out, out_step)


def _fresh(builder: Any, vectors: int, columns: Any) -> list[Any]:
    """Return for each vector which lanes are not among the first ``columns``."""
    first = _everywhere(builder, builder.trunc(columns, _INT), _INTS)
    lanes = [ir.Constant(_INTS, list(range(LANES * v, LANES * (v + 1)))) for v in range(vectors)]
    return [builder.icmp_signed("<=", first, these) for these in lanes]


def _biased(vectors: int) -> Callable[..., Any]:
    """Out = max(A B + bias, floor), where NaN stays NaN; A's rows are memory's."""

    def tile(
        typing: Any,
        a: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        length: Any,
        out: Any,
        out_step: Any,
        bias: Any,
        floor: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *factors, out, out_step, bias, floor = arguments
            _ask(builder, vectors, out, out_step, 1)
            rows = _sums(builder, vectors, False, *factors)
            low = _everywhere(builder, floor)
            biases = [_read(builder, bias, 4 * LANES * v) for v in range(vectors)]
            for row in rows:
                for v, value in enumerate(row):
                    value = builder.fadd(value, biases[v])
                    row[v] = builder.select(builder.fcmp_ordered("<", value, low), low, value)
            _write(builder, rows, out, out_step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, types.float32), code

    return tile


def _masked(vectors: int) -> Callable[..., Any]:
    """Out = A B where ``active`` > 0 or is NaN, else 0, and its columns are added to ``totals``; A's rows are memory's.

    Of the first ``old_rows`` rows and ``old_columns`` columns another tile has added them.
    """

    def tile(
        typing: Any,
        a: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        length: Any,
        out: Any,
        out_step: Any,
        active: Any,
        active_step: Any,
        totals: Any,
        old_rows: Any,
        old_columns: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *factors, out, out_step, active, active_step, totals, old_rows, old_columns = arguments
            _ask(builder, vectors, out, out_step, 1)
            _ask(builder, vectors, active, active_step, 0)
            rows = _sums(builder, vectors, False, *factors)
            total = [_ZERO] * vectors
            for m, row in enumerate(rows):
                fresh = builder.icmp_signed("<=", old_rows, _word(m))
                for v, value in enumerate(row):
                    off = builder.fcmp_ordered("<=", _read(builder, active, 4 * LANES * v), _ZERO)
                    row[v] = builder.select(off, _ZERO, value)
                    total[v] = builder.fadd(total[v], builder.select(fresh, row[v], _ZERO))
                active = builder.add(active, active_step)
            _write(builder, rows, out, out_step)
            for v, fresh in enumerate(_fresh(builder, vectors, old_columns)):
                known = _read(builder, totals, 4 * LANES * v)
                new = builder.fadd(known, builder.select(fresh, total[v], _ZERO))
                builder.store(new, _place(builder, totals, 4 * LANES * v), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), code

    return tile


def _added(vectors: int) -> Callable[..., Any]:
    """Out = A^T B, or with ``more`` out += A^T B but in the first ``old_rows`` rows and ``old_columns`` columns."""

    def tile(
        typing: Any,
        a: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        length: Any,
        out: Any,
        out_step: Any,
        more: Any,
        old_rows: Any,
        old_columns: Any,
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *factors, out, out_step, more, old_rows, old_columns = arguments
            _ask(builder, vectors, out, out_step, 1)
            rows = _sums(builder, vectors, True, *factors)
            fresh_lanes = _fresh(builder, vectors, old_columns)
            whole = builder.icmp_signed("==", more, _word(0))
            at = out
            for m, row in enumerate(rows):
                fresh_row = builder.select(builder.icmp_signed("<=", old_rows, _word(m)), _ALL, _NONE)
                for v, value in enumerate(row):
                    # What was there before the first part may be anything, and a sum with it NaN.
                    known = builder.select(whole, _ZERO, _read(builder, at, 4 * LANES * v))
                    fresh = builder.or_(builder.and_(fresh_row, fresh_lanes[v]), builder.select(whole, _ALL, _NONE))
                    row[v] = builder.fadd(known, builder.select(fresh, value, _ZERO))
                at = builder.add(at, out_step)
            _write(builder, rows, out, out_step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), code

    return tile


def _transposed(typing: Any, source: Any, source_step: Any, out: Any, out_step: Any) -> Any:
    """Write the transpose of ``LANES`` rows of as many columns: halves of rows are exchanged, then quarters, and so on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_step, out, out_step = arguments
        rows = [_read(builder, builder.add(source, builder.mul(source_step, _word(i))), 0) for i in range(LANES)]
        distance = LANES // 2
        while distance:
            # Where a lane's number has the bit, the first of two rows takes the other one's lane without it, and reversed.
            low = [LANES + i - distance if i & distance else i for i in range(LANES)]
            high = [LANES + i if i & distance else i + distance for i in range(LANES)]
            for i in range(LANES):
                if not i & distance:
                    a, b = rows[i], rows[i + distance]
                    for j, lanes in ((i, low), (i + distance, high)):
                        rows[j] = builder.shuffle_vector(a, b, ir.Constant(_INTS, lanes))
            distance //= 2
        _write(builder, [[row] for row in rows], out, out_step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


biased_tile, biased_half_tile = intrinsic(_biased(2)), intrinsic(_biased(1))
masked_tile, masked_half_tile = intrinsic(_masked(2)), intrinsic(_masked(1))
added_tile, added_half_tile = intrinsic(_added(2)), intrinsic(_added(1))
transposed_tile = intrinsic(_transposed)
