# SPDX-License-Identifier: Apache-2.0
"""Rows in memory: where slot n of a block lies, and what a row looks like. The row layout is known to this file only.

    chunk of R rows:   weights of row 0 .. R-1 | side of row 0 .. R-1 | undo of row 0 .. R-1
    weights            dim numbers of the table's dtype (``embedding/precision.py``), padded to whole words
    side               optimizer state (float32), then counters (uint32): occurrences, tick of the last update, shows, clicks
                       (float32), and for the undo ring values kept << 16 | next place; as many of them as the table keeps
    undo               ring of the last n values: weights and state as they were before an update
    chunks of a block: 16 rows, 16, 32, 64, ... up to about 64 KiB, then chunks of one size

Weights lie apart from the rest, so that a pull touches the cache lines of weights alone; rows so short that weights and
side fit one line together lie side by side (docs/performance.md has the measurement). Invariant: a slot's row never moves
while its key has it. A block's chunk table holds three addresses for each chunk: of weights, side and undo.
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
CHUNK_BYTES = 64 << 10
PARTS = 3  # addresses of a chunk in the chunk table: weights, side, undo
TOGETHER_BYTES = 16  # rows with at most so many bytes of weights have their side beside them


class Keep(NamedTuple):
    """Which counters a table keeps for each row, and how many old values."""

    occurrences: bool = False
    updated: bool = False
    score: bool = False
    undo: int = 0


NOTHING = Keep()


class Layout(NamedTuple):
    """The shape of a table's rows and chunks, as kernels take it; a counter's number is -1 where it is not kept."""

    dim: int
    code: int
    state_columns: int
    counters: int
    together: bool
    weight_bytes: int
    weight_pitch: int
    side_pitch: int
    undo: int
    undo_pitch: int
    steady: int  # log2 of the rows of a full-size chunk
    occurrences: int
    updated: int
    shows: int
    recorded: int


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
    for wanted, width in ((keep.occurrences, 1), (keep.updated, 1), (keep.score, 2), (keep.undo > 0, 1)):
        numbers.append(counters if wanted else -1)
        counters += width if wanted else 0
    weights = weight_bytes(code, dim)
    side = 4 * (state_columns + counters)
    undo = keep.undo * (weights + 4 * state_columns)
    together = weights <= TOGETHER_BYTES and weights + side <= LINE
    row = weights + side
    if together:
        # A row that straddles two lines costs as much as two rows: pad it where that takes a quarter more at most.
        rounded = 1 << (row - 1).bit_length()
        row = rounded if rounded * 4 <= row * 5 else row
    steady = max(FIRST_BITS, (CHUNK_BYTES // (row + undo)).bit_length() - 1)
    weight_pitch, side_pitch = (row, row) if together else (weights, side)
    return Layout(
        dim,
        code,
        state_columns,
        counters,
        together,
        weights,
        weight_pitch,
        side_pitch,
        keep.undo,
        undo,
        steady,
        *numbers,
    )


def chunk_rows(shape: Layout, chunk: int) -> int:
    """Return how many rows chunk number ``chunk`` of a block holds."""
    if chunk == 0:
        return 1 << FIRST_BITS
    return 1 << min(FIRST_BITS + chunk - 1, shape.steady)


def chunk_bytes(shape: Layout, rows: int) -> tuple[int, int, int, int]:
    """Return the bytes of a chunk of ``rows`` rows, and where in it weights, side and undo begin."""
    behind = rows * shape.weight_pitch
    if shape.together:
        return behind + rows * shape.undo_pitch, 0, shape.weight_bytes, behind
    undo = behind + rows * shape.side_pitch
    return undo + rows * shape.undo_pitch, 0, behind, undo


@jit
def chunk_of(slot: Int, steady: Int) -> Int:
    """Return the number of the chunk that holds a slot."""
    if slot >> steady > 0:
        return steady - FIRST_BITS + (slot >> steady)
    return bit_length(slot >> FIRST_BITS)


@jit
def place_in(slot: Int, steady: Int) -> Int:
    """Return a slot's place within its chunk."""
    if slot >> steady > 0:
        return slot & ((np.int64(1) << steady) - 1)
    chunk = bit_length(slot >> FIRST_BITS)
    if chunk == 0:
        return slot
    return slot - (np.int64(1) << (FIRST_BITS - 1 + chunk))


@jit
def weights_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's weights; ``chunks`` = address of the block's chunk table."""
    base: Int = load_i64(chunks, PARTS * chunk_of(slot, shape.steady))
    return base + place_in(slot, shape.steady) * shape.weight_pitch


@jit
def side_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's state, behind which its counters lie."""
    base: Int = load_i64(chunks, PARTS * chunk_of(slot, shape.steady) + 1)
    return base + place_in(slot, shape.steady) * shape.side_pitch


@jit
def row_at(chunks: Int, slot: Int, shape: Layout) -> tuple[Int, Int]:
    """Return the addresses of a slot's weights and side."""
    chunk = chunks + 8 * PARTS * chunk_of(slot, shape.steady)
    place = place_in(slot, shape.steady)
    weights: Int = load_i64(chunk, 0)
    side: Int = load_i64(chunk, 1)
    return weights + place * shape.weight_pitch, side + place * shape.side_pitch


@jit
def undo_at(chunks: Int, slot: Int, shape: Layout) -> Int:
    """Return the address of a slot's ring of old values."""
    base: Int = load_i64(chunks, PARTS * chunk_of(slot, shape.steady) + 2)
    return base + place_in(slot, shape.steady) * shape.undo_pitch


@jit
def prefetch_bytes(address: Int, size: Int) -> None:
    """Ask for the cache lines of ``size`` bytes, as many as are worth asking for at once."""
    for offset in range(0, min(size, 8 * LINE), LINE):
        prefetch(address + offset)


@jit
def draw_weights(key: np.uint64, shape: Layout, first: First, out: Int) -> None:
    """Write a key's first weights, float32[dim], to address ``out``."""
    begin = stream(first.origin, key)
    column = np.int64(first.begin)
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
