# SPDX-License-Identifier: Apache-2.0
"""The lock of a block: two words in its descriptor, taken and given back by kernels without the interpreter.

    MUTEX    1 while someone may change the block: pushes, growth, eviction, export exclude each other by it
    READERS  pulls inside the block, plus WRITER while the holder of the mutex needs the block to itself

Invariant: READERS gets WRITER only from the holder of the mutex; a pull that meets it goes away and comes back. Nobody waits
for one block while holding another, so there is no deadlock: a push holds one block at a time, and a pull that cannot enter
the next block first finishes and leaves those it is in. Waiting is spinning, then yielding the processor; waits are as long as a
run of keys in one block. Who waits for the mutex sleeps after that: its holder may be one that lets others come first, and who
only yields would keep the processor from it. Take and give back in the same thread or another: the words know no owner.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int

MUTEX = 0  # bytes from the lock's address
READERS = 8
LOCK_BYTES = 16

WRITER = 1 << 62
SPINS = 200  # tries before the processor is given to someone else
YIELDS = 20  # tries after those before a nap
NAP_MICROSECONDS = 50


def _add(typing: Any, address: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.PointerType())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), code


def _swap_if(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.PointerType())
        pair = builder.cmpxchg(pointer, arguments[1], arguments[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), code


def _yield(typing: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "sched_yield"
        kind = ir.FunctionType(ir.IntType(32), [])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), code


def _sleep(typing: Any, microseconds: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "usleep"
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.trunc(arguments[0], ir.IntType(32))])
        return context.get_dummy_value()

    return types.void(types.int64), code


# atomic_add(address, value) and swap_if(address, expected, value) return what was there before.
atomic_add: Callable[[Any, Any], Any]
swap_if: Callable[[Any, Any, Any], Any]
yield_processor: Callable[[], None]
sleep: Callable[[int], None]

if numba.config.DISABLE_JIT:
    _guard = threading.Lock()

    def _plain_add(address: Any, value: Any) -> int:
        with _guard:
            word = ctypes.c_int64.from_address(int(address))
            before = word.value
            word.value = before + int(value)
            return before

    def _plain_swap_if(address: Any, expected: Any, value: Any) -> int:
        with _guard:
            word = ctypes.c_int64.from_address(int(address))
            before = word.value
            if before == int(expected):
                word.value = int(value)
            return before

    atomic_add = _plain_add
    swap_if = _plain_swap_if
    yield_processor = os.sched_yield

    def _plain_sleep(microseconds: int) -> None:
        threading.Event().wait(microseconds / 1e6)

    sleep = _plain_sleep
else:
    atomic_add = intrinsic(_add)
    swap_if = intrinsic(_swap_if)
    yield_processor = intrinsic(_yield)
    sleep = intrinsic(_sleep)


@jit
def enter_mutex(lock: Int) -> None:
    """Keep all others from changing the block; pulls go on."""
    tries = 0
    while swap_if(lock + MUTEX, 0, 1) != 0:
        tries += 1
        if tries >= SPINS + YIELDS:
            sleep(NAP_MICROSECONDS)
        elif tries >= SPINS:
            yield_processor()


@jit
def leave_mutex(lock: Int) -> None:
    atomic_add(lock + MUTEX, -1)


@jit
def shut(lock: Int) -> None:
    """Wait until no pull is inside, and let none in. The caller holds the mutex."""
    atomic_add(lock + READERS, WRITER)
    tries = 0
    while atomic_add(lock + READERS, 0) != WRITER:
        tries += 1
        if tries >= SPINS:
            yield_processor()


@jit
def reopen(lock: Int) -> None:
    atomic_add(lock + READERS, -WRITER)


@jit
def try_enter(lock: Int) -> bool:
    """Enter as a pull; False = someone has the block to himself."""
    # Looked at first: those who wait to be alone must not see others come and go for ever.
    if atomic_add(lock + READERS, 0) >= WRITER:
        return False
    if atomic_add(lock + READERS, 1) >= WRITER:
        atomic_add(lock + READERS, -1)
        return False
    return True


@jit
def enter(lock: Int) -> None:
    """Enter as a pull; the caller is inside no other block."""
    tries = 0
    while not try_enter(lock):
        tries += 1
        if tries >= SPINS:
            yield_processor()


@jit
def leave(lock: Int) -> None:
    atomic_add(lock + READERS, -1)
