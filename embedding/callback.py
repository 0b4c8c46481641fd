# SPDX-License-Identifier: Apache-2.0
"""Kernels that other kernels call by address, so that one compiled push serves every optimizer.

Invariant: all callbacks have the one signature below, are compiled (or loaded from the cache) when their address is first
asked for, and keep that address for the life of the process. Any thread.

    update(weights, states, n, gradients, stride, width, rate, step, hyper)

    weights    address of int64[n]: addresses of rows' weights, float32[width] each; 0 = leave this row alone
    states     address of int64[n]: addresses of the same rows' optimizer state, float32 values
    gradients  address of the first row's gradient, float32[width]; row i's lies ``stride`` bytes * i further
    width      number of weights
    rate       float64, the learning rate of this push, schedule included
    step       int64, the job's step at which the push was made (1 is the first)
    hyper      address of float64 values: the optimizer's constants
"""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from oarlock.embedding.jit import compile_callback

UPDATE = types.void(*[types.int64] * 6, types.float64, types.int64, types.int64)

Body = Callable[[Any, Any, Any, Any, Any, Any, Any, Any, Any], None]

_plain: dict[int, Body] = {}


class Callback:
    """A function of the signature above. ``address`` is what kernels call; the object keeps the machine code alive."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.__name__ = body.__name__
        self.__doc__ = body.__doc__
        self.__module__ = body.__module__
        self._compiled: Any = None
        self._address = 0

    @property
    def address(self) -> int:
        if not self._address:
            if numba.config.DISABLE_JIT:
                self._address = len(_plain) + 1
                _plain[self._address] = self.body
            else:
                self._compiled = compile_callback(self.body, UPDATE)
                self._address = int(self._compiled.address)
        return self._address


def callback(body: Body) -> Callback:
    """Make a Callback of a function that a kernel could be made of (decorator)."""
    return Callback(body)


def _invoke_update(
    typing: Any,
    function: Any,
    weights: Any,
    states: Any,
    n: Any,
    gradients: Any,
    stride: Any,
    width: Any,
    rate: Any,
    step: Any,
    hyper: Any,
) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        long, double = ir.IntType(64), ir.DoubleType()
        kind = ir.FunctionType(ir.VoidType(), [*[long] * 6, double, long, long])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, *UPDATE.args), code


# invoke_update(address, ...) calls the callback at ``address`` with the arguments of its signature.
invoke_update: Callable[..., None]

if numba.config.DISABLE_JIT:
    invoke_update = lambda address, *arguments: _plain[int(address)](*arguments)  # noqa: E731
else:
    invoke_update = intrinsic(_invoke_update)
