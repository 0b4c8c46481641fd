# SPDX-License-Identifier: Apache-2.0
"""Rows in memory: where slot n of a block lies, and what a row looks like. The row layout is known to this file only.

    chunk of R rows:   weights of row 0 .. R-1 | side of row 0 .. R-1 | undo of row 0 .. R-1
    weights            dim numbers of the table's dtype (``embedding/precision.py``), padded to whole words
    side               optimizer state (float32), then counters (uint32): occurrences, tick of the last update, shows, clicks
                       (float32), version (``embedding/versions.py``), and for the undo ring values kept << 16 | next
                       place; as many of them as the table keeps
    undo               ring of the last n values: weights and state as they were before an update
    chunks of a block: 16 rows, 16, 32, 64, ... up to about 256 KiB, then chunks of one size

Weights lie apart from the rest, so that a pull touches the cache lines of weights alone (docs/performance.md has the
measurement for dims 1 to 256). Invariant: a slot's row never moves while its key has it. A block's chunk table holds the
address of each chunk: int64[chunks].
"""

from typing import NamedTuple

import numpy as np

from oarlock.embedding.initial import draw_value, stream
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import (
    LINE,
    Int,
    bit_length,
    load_f32,
    load_f64,
    load_i64,
    prefetch,
    store_f32,
    store_u32,
)
from oarlock.embedding.precision import FLOAT32, encode_row, seed_of, weight_bytes

FIRST_BITS = 4  # the first chunk holds 2^4 rows
CHUNK_BYTES = 256 << 10


class Keep(NamedTuple):
    """Which counters a table keeps for each row, and how many old values. ``bound``: of the table's cache."""

    occurrences: bool = False
    updated: bool = False
    score: bool = False
    undo: int = 0
    version: bool = False
    bound: int = 0


NOTHING = Keep()


class Layout(NamedTuple):
    """The shape of a table's rows and chunks, as kernels take it; a counter's number is -1 where it is not kept."""

    dim: int
    code: int
    state_columns: int
    counters: int
    weight_bytes: int
    side_bytes: int
    undo: int
    undo_pitch: int
    steady: int  # log2 of the rows of a full-size chunk
    occurrences: int
    updated: int
    shows: int
    version: int
    recorded: int
    bound: int  # what a worker's row may lack, where versions are kept


class First(NamedTuple):
    """What new rows begin with, as kernels take it. A row has one part or more, each with its own initializer.

    ``ends``: address of int64[parts], the column behind each part; ``constants``: of float64[parts, 3]; ``state``: of
    float32[state columns]. Addresses, because a kernel that hands arrays on counts references to them for every row.
    ``begin``: the column that these rows begin with, where others hold those before it (``embedding/expanding.py``).
    """

    origin: np.uint64
    parts: int
    ends: int
    constants: int
    state: int
    begin: int = 0


def layout(dim: int, state_columns: int, code: int = FLOAT32, keep: Keep = NOTHING) -> Layout:
    """Return the layout of rows of ``dim`` weights of dtype ``code`` with ``state_columns`` state values."""
    counters = 0
    numbers = []
    kept = (keep.occurrences, 1), (keep.updated, 1), (keep.score, 2), (keep.version, 1), (keep.undo > 0, 1)
    for wanted, width in kept:
        numbers.append(counters if wanted else -1)
        counters += width if wanted else 0
    weights = weight_bytes(code, dim)
    side = 4 * (state_columns + counters)
    undo = keep.undo * (weights + 4 * state_columns)
    steady = max(FIRST_BITS, (CHUNK_BYTES // (weights + side + undo)).bit_length() - 1)
    occurrences, updated, shows, version, recorded = numbers
    return Layout(
        dim,
        code,
        state_columns,
        counters,
        weights,
        side,
        keep.undo,
        undo,
        steady,
        occurrences,
        updated,
        shows,
        version,
        recorded,
        keep.bound,
    )


def chunk_rows(shape: Layout, chunk: int) -> int:
    """Return how many rows chunk number ``chunk`` of a block holds."""
    if chunk == 0:
        return 1 << FIRST_BITS
    return 1 << min(FIRST_BITS + chunk - 1, shape.steady)


def chunk_bytes(shape: Layout, rows: int) -> int:
    """Return the bytes of a chunk of ``rows`` rows."""
    return rows * (shape.weight_bytes + shape.side_bytes + shape.undo_pitch)


@jit
def find_chunk(chunks: Int, slot: Int, steady: Int) -> tuple[Int, Int, Int]:
    """Return the address of the chunk that holds a slot, the slot's place in it, and log2 of the rows of the chunk."""
    large = slot >> steady
    if large > 0:
        base: Int = load_i64(chunks, steady - FIRST_BITS + large)
        return base, slot & ((np.int64(1) << steady) - 1), steady
    chunk = bit_length(slot >> FIRST_BITS)
    base = load_i64(chunks, chunk)
    if chunk == 0:
        return base, slot, np.int64(FIRST_BITS)
    bits = FIRST_BITS - 1 + chunk
    return base, slot - (np.int64(1) << bits), bits


@jit
def weights_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's weights; ``chunks`` = address of the block's chunk table."""
    base, place, _ = find_chunk(chunks, slot, shape.steady)
    return base + place * shape.weight_bytes


@jit
def row_at(chunks: Int, slot: Int, shape: Layout) -> tuple[Int, Int]:
    """Return the addresses of a slot's weights and of its side: its state, and its counters behind that."""
    base, place, bits = find_chunk(chunks, slot, shape.steady)
    side = base + (shape.weight_bytes << bits) + place * shape.side_bytes
    return base + place * shape.weight_bytes, side


@jit
def side_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's side."""
    _, side = row_at(chunks, slot, shape)
    return side


@jit
def undo_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's ring of old values."""
    base, place, bits = find_chunk(chunks, slot, shape.steady)
    return base + ((shape.weight_bytes + shape.side_bytes) << bits) + place * shape.undo_pitch


@jit
def prefetch_bytes(address: Int, size: Int) -> None:
    """Ask for the cache lines of ``size`` > 0 bytes, as many as are worth asking for at once."""
    prefetch(address)
    last = address + size - 1
    if (address ^ last) >= LINE:
        for offset in range(LINE, min(size, 8 * LINE), LINE):
            prefetch(address + offset)
        prefetch(last)


@jit
def draw_weights(key: np.uint64, shape: Layout, first: First, out: Int) -> None:
    """Write a key's first weights, float32[dim], to address ``out``."""
    begin = stream(first.origin, key)
    column: Int = np.int64(first.begin)
    for part in range(first.parts):
        end = load_i64(first.ends, part)
        kind = load_f64(first.constants, 3 * part)
        mean = load_f64(first.constants, 3 * part + 1)
        scale = load_f64(first.constants, 3 * part + 2)
        while column < end:
            store_f32(out, column - first.begin, draw_value(begin, column, kind, mean, scale))
            column += 1


@jit
def start_row(weights: Int, side: Int, key: np.uint64, shape: Layout, first: First, scratch: Int) -> None:
    """Give a new row its first weights and state, and counters of zero; ``scratch``: room for float32[dim]."""
    if shape.code == FLOAT32:
        draw_weights(key, shape, first, weights)
    else:
        draw_weights(key, shape, first, scratch)
        encode_row(weights, shape.code, shape.dim, scratch, seed_of(stream(first.origin, key), 0))
    for column in range(shape.state_columns):
        store_f32(side, column, load_f32(first.state, column))
    for offset in range(shape.state_columns, shape.state_columns + shape.counters):
        store_u32(side, offset, np.uint32(0))
