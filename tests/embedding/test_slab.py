# SPDX-License-Identifier: Apache-2.0
"""Where rows lie: no two share a byte, slots fill the chunks one after the other, and a new row is what the spec says."""

import itertools

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.initial import constants, origin
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import address_of
from oarlock.embedding.precision import FLOAT16, FLOAT32, INT8, decode_row
from oarlock.embedding.slab import (
    CHUNK_BYTES,
    FIRST_BITS,
    First,
    Keep,
    chunk_bytes,
    chunk_rows,
    layout,
    row_at,
    side_at,
    start_row,
    undo_at,
    weights_at,
)
from oarlock.embedding.spec import Initializer, TableSpec

SHAPES = [
    (1, 0, FLOAT32, Keep()),
    (1, 1, FLOAT32, Keep(occurrences=True)),
    (3, 3, FLOAT32, Keep(updated=True, score=True)),
    (4, 1, FLOAT32, Keep(undo=2)),
    (5, 11, FLOAT16, Keep(occurrences=True, undo=3)),
    (16, 1, FLOAT32, Keep()),
    (16, 33, INT8, Keep(True, True, True, 1)),
    (40000, 0, FLOAT32, Keep()),
]


@jit
def all_addresses(chunks, shape, out):
    for slot in range(out.shape[0]):
        out[slot, 0] = weights_at(chunks, slot, shape)
        out[slot, 1] = side_at(chunks, slot, shape)
        out[slot, 2] = undo_at(chunks, slot, shape)
        out[slot, 3], out[slot, 4] = row_at(chunks, slot, shape)


@pytest.mark.parametrize("given", SHAPES)
def test_slots_fill_the_chunks_one_after_the_other_and_share_no_byte(given):
    shape = layout(*given)
    side_bytes = 4 * (shape.state_columns + shape.counters)
    table, expected, base = [], [], 1 << 20
    while len(expected) < 5 * reference.MANY:
        count = chunk_rows(shape, len(table))
        size = chunk_bytes(shape, count)
        assert size <= CHUNK_BYTES or count == 1 << FIRST_BITS
        weights, side, undo = 0, count * shape.weight_bytes, count * (shape.weight_bytes + shape.side_bytes)
        table.append(base)
        expected += [
            (
                base + weights + i * shape.weight_bytes,
                base + side + i * shape.side_bytes,
                base + undo + i * shape.undo_pitch,
            )
            for i in range(count)
        ]
        end, base = base + size, base + size + 1000
        spans = [(a, a + shape.weight_bytes) for a, _, _ in expected[-count:]]
        spans += [(b, b + side_bytes) for _, b, _ in expected[-count:]]
        spans += [(c, c + shape.undo_pitch) for _, _, c in expected[-count:]]
        spans = sorted(span for span in spans if span[0] < span[1])
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert end - size <= spans[0][0]
        assert spans[-1][1] <= end
    out = np.empty((len(expected), 5), np.int64)
    chunks = np.array(table, np.int64)
    all_addresses(address_of(chunks), shape, out)
    assert out.tolist() == [[*place, *place[:2]] for place in expected]


def test_the_first_chunks_are_small_and_each_doubles_the_rows_until_they_have_their_full_size():
    shape = layout(16, 16)
    rows = [chunk_rows(shape, chunk) for chunk in range(12)]
    assert rows[:6] == [16, 16, 32, 64, 128, 256]
    assert rows[-1] == rows[-2] == CHUNK_BYTES // 128
    assert rows == sorted(rows)


def test_rows_are_no_wider_than_their_values():
    def sizes(*given):
        shape = layout(*given)
        return shape.weight_bytes, shape.side_bytes, shape.undo_pitch

    assert sizes(16, 16) == (64, 64, 0)
    assert sizes(16, 1) == (64, 4, 0)
    assert sizes(1, 0) == (4, 0, 0)
    assert sizes(1, 2) == (4, 8, 0)
    assert sizes(3, 3, FLOAT32, Keep(True, True, True, 2)) == (12, 32, 48)
    assert sizes(5, 0, INT8) == (12, 0, 0)


def test_counters_are_numbered_in_the_order_of_the_format():
    def numbers(**kept):
        shape = layout(2, 3, FLOAT32, Keep(**kept))
        return shape.counters, shape.occurrences, shape.updated, shape.shows, shape.recorded

    assert numbers() == (0, -1, -1, -1, -1)
    assert numbers(occurrences=True, updated=True, score=True, undo=5) == (5, 0, 1, 2, 4)
    assert numbers(updated=True, undo=1) == (2, -1, 0, -1, 1)
    assert numbers(score=True) == (2, -1, -1, 0, -1)
    assert layout(2, 3, FLOAT32, Keep(True, True, True, 5, version=True, bound=7))[-6:] == (0, 1, 2, 4, 5, 7)
    assert layout(2, 3, FLOAT32, Keep(version=True)).version == 0


@pytest.mark.parametrize("code", [FLOAT32, FLOAT16, INT8])
def test_a_new_row_has_the_first_values_of_its_parts_the_first_state_and_counters_of_zero(code):
    shape = layout(5, 3, code, Keep(True, True, True, 2))
    kinds = [Initializer("constant", 0.5), Initializer("uniform", 0.0, 0.25)]
    ends, given = np.array([2, 5], np.int64), np.stack([constants(kind) for kind in kinds])
    state = np.array([1, 2, 3], np.float32)
    first = First(origin(7, "t"), 2, address_of(ends), address_of(given), address_of(state))
    row, side, room = np.full(40, 0xA5, np.uint8), np.full(9, 77, np.uint32), np.zeros(5, np.float32)
    key = np.uint64(reference.WORD)
    start_row(address_of(row), address_of(side), key, shape, first, address_of(room))
    assert (row[shape.weight_bytes :] == 0xA5).all()
    assert side.tolist() == [*state.view(np.uint32).tolist(), 0, 0, 0, 0, 0, 77]
    specs = [TableSpec("t", 5, initializer=kind) for kind in kinds]
    exact = np.concatenate([reference.first_row(specs[0], 7, key)[:2], reference.first_row(specs[1], 7, key)[2:]])
    found = np.empty(5, np.float32)
    decode_row(address_of(row), code, 5, address_of(found))
    if code == FLOAT32:
        assert found.tobytes() == exact.tobytes()
    else:
        np.testing.assert_allclose(found, exact, atol=0.5 / 127 if code == INT8 else 0.5 / 1024, rtol=0)
