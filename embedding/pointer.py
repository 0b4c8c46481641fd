# SPDX-License-Identifier: Apache-2.0
"""Memory at an integer address, for kernels: typed loads and stores, prefetch, copies, and the arrays that kernels accept.

Invariant: nothing here checks bounds; an address comes from an array that its owner (``embedding/block.py``,
``embedding/dense.py``) keeps alive. Callable from kernels and, with NUMBA_DISABLE_JIT=1, from plain Python, where
ctypes does the same slowly. No state, any thread.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument, Malformed

# An int64 of a kernel: an address, a slot, a count. numba infers and checks the types of kernels; to mypy they would be
# numpy scalars in one place and plain integers in the next, so it is told nothing of them.
Int = Any

LINE = 64  # bytes of a cache line, the unit of prefetch


def _pointer(builder: Any, address: Any, index: Any, bytes_each: int) -> Any:
    # As base and index, not as a sum: so LLVM sees what a loop over the index reads, and makes vector code of it.
    kind = ir.IntType(8 * bytes_each)
    return builder.gep(builder.inttoptr(address, ir.PointerType()), [index], source_etype=kind)


def _load(kind: Any, llvm: Any, bytes_each: int) -> Callable[..., Any]:
    def load(typing: Any, address: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _pointer(builder, arguments[0], arguments[1], bytes_each)
            return builder.load(pointer, align=bytes_each, typ=llvm)

        return kind(types.int64, types.int64), code

    return load


def _store(kind: Any, bytes_each: int) -> Callable[..., Any]:
    def store(typing: Any, address: Any, index: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.store(arguments[2], _pointer(builder, arguments[0], arguments[1], bytes_each), align=bytes_each)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), code

    return store


def _prefetch(typing: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        # for reading, to be kept in all levels, data cache
        flags = [ir.Constant(word, n) for n in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], ir.PointerType()), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), code


def _copy(typing: Any, to: Any, source: Any, size: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, long = ir.PointerType(), ir.IntType(64)
        name = "llvm.memcpy.p0.p0.i64"
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, long, ir.IntType(1)])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        ends = [builder.inttoptr(a, pointer) for a in arguments[:2]]
        builder.call(function, [*ends, arguments[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _match_line(typing: Any, line: Any, word: Any) -> Any:
    """One vector comparison of a cache line: what LLVM makes of it is AVX-512's where the CPU has that."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(64), 8)
        found = builder.load(builder.inttoptr(arguments[0], ir.PointerType()), align=LINE, typ=vector)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[1], ir.Constant(ir.IntType(32), 0))
        all_lanes = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
        wanted = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), all_lanes)
        equal = builder.icmp_unsigned("==", found, wanted)
        return builder.zext(builder.bitcast(equal, ir.IntType(8)), ir.IntType(64))

    return types.int64(types.int64, types.uint64), code


def _trailing_zeros(typing: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), code


def _count_ones(typing: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), code


def _address_in(typing: Any, array: Any, offset: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.add(builder.ptrtoint(data, ir.IntType(64)), arguments[1])

    return types.int64(array, types.int64), code


def _bit_length(typing: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))
        return builder.sub(ir.Constant(ir.IntType(64), 64), zeros)

    return types.int64(types.int64), code


def _plain_load(kind: Any, scalar: Any, bytes_each: int) -> Callable[..., Any]:
    return lambda address, index: scalar(kind.from_address(int(address) + bytes_each * int(index)).value)


def _plain_store(kind: Any, bytes_each: int) -> Callable[..., Any]:
    def store(address: Any, index: Any, value: Any) -> None:
        kind.from_address(int(address) + bytes_each * int(index)).value = (
            value.item() if hasattr(value, "item") else value
        )

    return store


def _plain_copy(to: Any, source: Any, size: Any) -> None:
    ctypes.memmove(int(to), int(source), int(size))


def _plain_match(line: Any, word: Any) -> int:
    words = (ctypes.c_uint64 * 8).from_address(int(line))
    return sum(1 << i for i in range(8) if words[i] == int(word))


# load_X(address, index) reads item ``index`` of an array of X at ``address``; store_X(address, index, value) writes it;
# prefetch(address) asks for that cache line; copy(to, from, bytes) copies memory that does not overlap;
# match_line(address, word) has bit i set where item i of the 8 uint64 of a cache line is ``word``;
# address_in(array, offset) is the address ``offset`` bytes behind an array's first item;
# trailing_zeros(n) is the number of the lowest bit set of n, 64 for 0; count_ones(n) how many are set;
# bit_length(n) counts the bits of n >= 0.
load_f32: Callable[[Any, Any], Any]
load_f64: Callable[[Any, Any], Any]
load_u8: Callable[[Any, Any], Any]
load_u16: Callable[[Any, Any], Any]
load_u32: Callable[[Any, Any], Any]
load_u64: Callable[[Any, Any], Any]
load_i64: Callable[[Any, Any], Any]
store_f32: Callable[[Any, Any, Any], None]
store_u8: Callable[[Any, Any, Any], None]
store_u16: Callable[[Any, Any, Any], None]
store_u32: Callable[[Any, Any, Any], None]
store_u64: Callable[[Any, Any, Any], None]
store_i64: Callable[[Any, Any, Any], None]
prefetch: Callable[[Any], None]
copy: Callable[[Any, Any, Any], None]
match_line: Callable[[Any, Any], Any]
trailing_zeros: Callable[[Any], Any]
count_ones: Callable[[Any], Any]
bit_length: Callable[[Any], Any]
address_in: Callable[[Any, Any], Any]

if numba.config.DISABLE_JIT:
    load_f32 = _plain_load(ctypes.c_float, np.float32, 4)
    load_f64 = _plain_load(ctypes.c_double, np.float64, 8)
    load_u8 = _plain_load(ctypes.c_uint8, np.uint8, 1)
    load_u16 = _plain_load(ctypes.c_uint16, np.uint16, 2)
    load_u32 = _plain_load(ctypes.c_uint32, np.uint32, 4)
    load_u64 = _plain_load(ctypes.c_uint64, np.uint64, 8)
    load_i64 = _plain_load(ctypes.c_int64, np.int64, 8)
    store_f32 = _plain_store(ctypes.c_float, 4)
    store_u8 = _plain_store(ctypes.c_uint8, 1)
    store_u16 = _plain_store(ctypes.c_uint16, 2)
    store_u32 = _plain_store(ctypes.c_uint32, 4)
    store_u64 = _plain_store(ctypes.c_uint64, 8)
    store_i64 = _plain_store(ctypes.c_int64, 8)
    prefetch = lambda address: None  # noqa: E731
    copy = _plain_copy
    match_line = _plain_match
    trailing_zeros = lambda value: (int(value) & -int(value)).bit_length() - 1 if value else 64  # noqa: E731
    count_ones = lambda value: int(value).bit_count()  # noqa: E731
    address_in = lambda array, offset: address_of(array) + int(offset)  # noqa: E731
    bit_length = lambda value: int(value).bit_length()  # noqa: E731
else:
    load_f32 = intrinsic(_load(types.float32, ir.FloatType(), 4))
    load_f64 = intrinsic(_load(types.float64, ir.DoubleType(), 8))
    load_u8 = intrinsic(_load(types.uint8, ir.IntType(8), 1))
    load_u16 = intrinsic(_load(types.uint16, ir.IntType(16), 2))
    load_u32 = intrinsic(_load(types.uint32, ir.IntType(32), 4))
    load_u64 = intrinsic(_load(types.uint64, ir.IntType(64), 8))
    load_i64 = intrinsic(_load(types.int64, ir.IntType(64), 8))
    store_f32 = intrinsic(_store(types.float32, 4))
    store_u8 = intrinsic(_store(types.uint8, 1))
    store_u16 = intrinsic(_store(types.uint16, 2))
    store_u32 = intrinsic(_store(types.uint32, 4))
    store_u64 = intrinsic(_store(types.uint64, 8))
    store_i64 = intrinsic(_store(types.int64, 8))
    prefetch = intrinsic(_prefetch)
    copy = intrinsic(_copy)
    match_line = intrinsic(_match_line)
    trailing_zeros = intrinsic(_trailing_zeros)
    count_ones = intrinsic(_count_ones)
    address_in = intrinsic(_address_in)
    bit_length = intrinsic(_bit_length)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first item."""
    address: int = array.__array_interface__["data"][0]
    return address


def check_output(name: str, array: NDArray[Any]) -> None:
    """Raise InvalidArgument unless a kernel can write to ``array`` as it is."""
    if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
        raise InvalidArgument(f"{name} must be a writable array in C order")


class _Exposed:
    """Lends an array's memory to a second array that numba types as writable."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.owner = array
        self.__array_interface__ = array.__array_interface__ | {"data": (address_of(array), False)}


def plain_array(name: str, array: NDArray[Any], dtype: type, ndim: int = 1) -> NDArray[Any]:
    """Return ``array`` as kernels read it that are given its address: right dtype, C order, aligned; Malformed when dtype or
    dimensions differ.
    """
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        have = f"{array.dtype}, {array.ndim} dimensions" if isinstance(array, np.ndarray) else type(array).__name__
        raise Malformed(f"{name}: expected an array of {np.dtype(dtype).name} with {ndim} dimensions, got {have}")
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned):
        return np.array(array, dtype=dtype, order="C")
    return array


def kernel_array(name: str, array: NDArray[Any], dtype: type, ndim: int = 1) -> NDArray[Any]:
    """Return what ``plain_array`` does in the one form that kernels are compiled for that are given arrays: typed as writable.

    numba compiles a second copy of a kernel for a read-only array, and arrays from the wire are read-only. They are
    lent to kernels that only read them.
    """
    array = plain_array(name, array, dtype, ndim)
    if array.flags.writeable:
        return array
    lent = array.view()
    try:
        lent.flags.writeable = True
    except ValueError:
        # Over memory that Python itself takes for constant, which the way around costs ten times as much for.
        return np.asarray(_Exposed(array))
    return lent
