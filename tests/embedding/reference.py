# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious twins of the kernels of ``embedding/``, in plain Python and numpy, written from their contracts.

Floating-point twins use the same operations in the same order in numpy's float32 and float64, so results are compared
bit for bit. Loaded by conftest under the name ``embedding_reference``. No state.
"""

import functools
import hashlib
import os

import numpy as np

JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
MANY = 3000 if JIT else 60  # how many keys a test takes; interpreted kernels are a thousand times slower
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def unmix64(x):
    """Return the number that mix64 makes ``x`` of."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        y = x
        for _ in range(64 // shift):
            y = x ^ y >> shift
        x = y * pow(factor, -1, 1 << 64) & WORD
    return x


@functools.cache
def salt(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def block(name, bits, key):
    return mix64(int(key) ^ salt(name)) >> (64 - bits)


def first_value(seed, name, key, column, kind, mean, scale):
    """Return the float32 first value from the written definition."""
    origin = mix64((seed + mix64(salt(name))) & WORD)
    stream = mix64(origin ^ mix64((int(key) + GOLDEN) & WORD))
    draws = [mix64((stream + GOLDEN * (4 * column + j + 1)) & WORD) for j in range(4)]
    if kind == "zeros":
        return np.float32(0)
    if kind == "constant":
        return np.float32(mean)
    if kind == "uniform":
        return np.float32(mean + scale * ((draws[0] >> 11) * 2.0**-53 * 2.0 - 1.0))
    total = sum(draw >> shift & 0x1FFFFF for draw in draws for shift in (0, 21, 42))
    r = (total + 6 - 6 * 2**21) / 2**23
    a9, a7, a5, a3, a1 = 0.029899776, 0.008355968, 0.076542912, 0.252408784, 3.949846138
    q = r * r
    return np.float32(mean + scale * (((((a9 * q + a7) * q + a5) * q + a3) * q + a1) * r))


def first_row(spec, seed, key):
    i = spec.initializer
    return np.array(
        [first_value(seed, spec.name, key, c, i.kind, i.mean, i.scale) for c in range(spec.dim)], np.float32
    )


def first_state(optimizer, dim):
    if optimizer.name == "adagrad":
        return np.full(dim, optimizer.initial, np.float32)
    return np.zeros({"sgd": 0, "adam": 2 * dim + 1}[optimizer.name], np.float32)


def power(base, exponent):
    result = 1.0
    for bit in reversed(f"{exponent:b}"):
        if bit == "1":
            result *= base
        base *= base
    return result


def update(optimizer, weights, state, gradient, rate):
    """Change weights and state of one row in place, in float32 and the kernels' order of operations."""
    f = np.float32
    dim = len(weights)
    if optimizer.name == "sgd":
        weights -= f(rate) * gradient
    elif optimizer.name == "adagrad":
        state += gradient * gradient
        weights -= f(rate) * gradient / (np.sqrt(state) + f(optimizer.epsilon))
    else:
        m, v = state[:dim], state[dim : 2 * dim]
        state[-1] += f(1)
        t = int(state[-1])
        m += (gradient - m) * f(1.0 - optimizer.beta1)
        v[:] = v * f(optimizer.beta2) + f(1.0 - optimizer.beta2) * gradient * gradient
        step = f(rate / (1.0 - power(optimizer.beta1, t)))
        root = f(np.sqrt(1.0 - power(optimizer.beta2, t)))
        weights -= step * m / (np.sqrt(v) / root + f(optimizer.epsilon))


def update64(optimizer, weights, state, gradient, rate, t):
    """The same step from the textbook formulas in float64; ``state`` holds m and v only for adam."""
    if optimizer.name == "sgd":
        weights -= rate * gradient
    elif optimizer.name == "adagrad":
        state += gradient**2
        weights -= rate * gradient / (np.sqrt(state) + optimizer.epsilon)
    else:
        m, v = np.split(state, 2)
        m[:] = optimizer.beta1 * m + (1 - optimizer.beta1) * gradient
        v[:] = optimizer.beta2 * v + (1 - optimizer.beta2) * gradient**2
        unbiased = m / (1 - optimizer.beta1**t)
        weights -= rate * unbiased / (np.sqrt(v / (1 - optimizer.beta2**t)) + optimizer.epsilon)


def group(name, bits, keys, order=None):
    """Return (distinct keys, inverse, blocks, counts) grouped by block in ``order`` (default ascending)."""
    order = range(1 << bits) if order is None else order
    distinct = list(dict.fromkeys(int(key) for key in keys))
    members = {b: [key for key in distinct if block(name, bits, key) == b] for b in order}
    out = [key for b in order for key in members[b]]
    at = {key: i for i, key in enumerate(out)}
    used = [b for b in order if members[b]]
    return (
        np.array(out, np.uint64),
        np.array([at[int(key)] for key in keys], np.int32),
        np.array(used, np.int32),
        np.array([len(members[b]) for b in used], np.int32),
    )


EDGES = {
    "empty": np.zeros(0, np.uint64),
    "one key": np.array([7], np.uint64),
    "all the same": np.full(50, 12345, np.uint64),
    "key 0 and the last": np.array([0, WORD, 0, WORD, 1, 0], np.uint64),
    "small": np.arange(64, dtype=np.uint64),
    "many": np.random.default_rng(1).integers(0, MANY // 2, MANY, dtype=np.uint64),
    "wide": np.random.default_rng(2).integers(0, 1 << 64, MANY, dtype=np.uint64),
}
