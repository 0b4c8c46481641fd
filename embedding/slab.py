# SPDX-License-Identifier: Apache-2.0
"""Rows in memory: where slot n of a block lies, and what a row looks like. The row layout is known to this file only.

    row of dim 4 under adagrad:   w0 w1 w2 w3 | a0 a1 a2 a3        float32; weights, then optimizer state; then padding
    chunks of a block:            16 rows, 16, 32, 64, ... up to about 512 KiB, then chunks of one size

Invariant: a slot's row never moves while its block exists, so an address stays good while the table's lock is held.
Kernels only; they hold the table's lock (``embedding/table.py``).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.initial import first_value, stream
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import LINE, Int, bit_length, load_f32, load_i64, prefetch, store_f32

FIRST_BITS = 4  # the first chunk holds 2^4 rows
CHUNK_BYTES = 512 << 10
AHEAD = 12  # rows asked for before they are used


class Layout(NamedTuple):
    """The shape of a table's rows and chunks, as kernels take it."""

    dim: int
    state_columns: int
    row_bytes: int
    steady: int  # log2 of the rows of a full-size chunk


def layout(dim: int, state_columns: int) -> Layout:
    """Return the layout of rows of ``dim`` weights and ``state_columns`` state values."""
    floats = dim + state_columns
    if floats > 2:  # whole 16-byte words, so that vector loads of short rows do not straddle a cache line
        floats = -(-floats // 4) * 4
    steady = max(FIRST_BITS, (CHUNK_BYTES // (4 * floats)).bit_length() - 1)
    return Layout(dim, state_columns, 4 * floats, steady)


def chunk_rows(shape: Layout, chunk: int) -> int:
    """Return how many rows chunk number ``chunk`` of a block holds."""
    if chunk == 0:
        return 1 << FIRST_BITS
    return 1 << min(FIRST_BITS + chunk - 1, shape.steady)


@jit
def row_address(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's row; ``chunks`` = address of the block's int64 table of chunk addresses."""
    if slot < np.int64(1) << shape.steady:
        chunk: Int = bit_length(slot >> FIRST_BITS)
        offset = slot
        if chunk > 0:
            offset = slot - (np.int64(1) << (FIRST_BITS - 1 + chunk))
    else:
        chunk = shape.steady - FIRST_BITS + (slot >> shape.steady)
        offset = slot & ((np.int64(1) << shape.steady) - 1)
    base: Int = load_i64(chunks, chunk)
    return base + offset * shape.row_bytes


@jit
def state_address(row: Int, dim: int) -> Int:
    """Return where the optimizer state of the row at address ``row`` begins."""
    return row + 4 * dim


@jit
def prefetch_row(row: Int, floats: int) -> None:
    """Ask for the cache lines of ``floats`` values at ``row``."""
    for offset in range(0, min(4 * floats, 8 * LINE), LINE):
        prefetch(row + offset)


@jit
def start_row(
    row: Int, shape: Layout, start: np.uint64, key: np.uint64, first: NDArray[np.float64], state: NDArray[np.float32]
) -> None:
    """Give a new row its first weights and its first state: float32[state_columns]."""
    begin = stream(start, key)
    for column in range(shape.dim):
        store_f32(row, column, first_value(begin, column, first))
    behind = state_address(row, shape.dim)
    for column in range(shape.state_columns):
        store_f32(behind, column, state[column])


@jit
def gather_rows(
    addresses: NDArray[np.int64],
    shape: Layout,
    keys: NDArray[np.uint64],
    start: np.uint64,
    first: NDArray[np.float64],
    out: NDArray[np.float32],
) -> None:
    """Copy the weights at addresses: int64[n] to out: float32[n, dim]; address 0 = absent: its first value."""
    n = addresses.shape[0]
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(addresses[i + AHEAD], shape.dim)
        row = addresses[i]
        if row == 0:
            begin = stream(start, keys[i])
            for column in range(shape.dim):
                out[i, column] = first_value(begin, column, first)
        else:
            for column in range(shape.dim):
                out[i, column] = load_f32(row, column)


@jit
def read_row(row: Int, shape: Layout, at: Int, weights: NDArray[np.float32], state: NDArray[np.float32]) -> None:
    """Copy a row to line ``at`` of weights: float32[r, dim] and state: float32[r, state_columns]."""
    for column in range(shape.dim):
        weights[at, column] = load_f32(row, column)
    behind = state_address(row, shape.dim)
    for column in range(shape.state_columns):
        state[at, column] = load_f32(behind, column)


@jit
def write_row(row: Int, shape: Layout, at: Int, weights: NDArray[np.float32], state: NDArray[np.float32]) -> None:
    """Copy line ``at`` of weights and state to a row."""
    for column in range(shape.dim):
        store_f32(row, column, weights[at, column])
    behind = state_address(row, shape.dim)
    for column in range(shape.state_columns):
        store_f32(behind, column, state[at, column])
