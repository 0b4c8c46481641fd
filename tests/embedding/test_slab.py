# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.block import Block, BlockRows
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import address_of
from oarlock.embedding.slab import CHUNK_BYTES, chunk_rows, layout, row_address


@jit
def all_addresses(chunks, shape, out):
    for slot in range(out.shape[0]):
        out[slot] = row_address(chunks, slot, shape)


@pytest.mark.parametrize("columns", [(1, 0), (3, 3), (16, 16), (16, 33), (40000, 0)])
def test_slots_fill_the_chunks_one_after_the_other(columns):
    shape = layout(*columns)
    bases, expected = [], []
    while len(expected) < 20 * reference.MANY:
        bases.append(10**15 * (len(bases) + 1))
        count = chunk_rows(shape, len(bases) - 1)
        expected += [bases[-1] + offset * shape.row_bytes for offset in range(count)]
        assert count * shape.row_bytes <= CHUNK_BYTES or count == 16
    table = np.array(bases, np.int64)
    out = np.empty(len(expected), np.int64)
    all_addresses(address_of(table), shape, out)
    assert out.tolist() == expected


def test_rows_are_as_wide_as_their_values_rounded_up_to_16_bytes():
    assert [layout(*c).row_bytes for c in ((1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (16, 16))] == [4, 8, 16, 16, 32, 128]


def test_rows_do_not_move_and_do_not_overlap_while_a_block_grows():
    block = Block(layout(3, 3), table_salt("t"))
    keys = np.arange(500, dtype=np.uint64)
    weights = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    assert block.fill(BlockRows(keys, weights, -weights)) == -1
    chunks = list(block._chunks)
    block.reserve(20_000)
    assert all(a is b for a, b in zip(chunks, block._chunks, strict=False))
    assert len(block._chunks) > len(chunks)
    out = block.export()
    assert out.keys.tolist() == keys.tolist()
    assert out.weights.tobytes() == weights.tobytes()
    assert out.state.tobytes() == (-weights).tobytes()


def test_an_empty_block_is_small_and_a_large_one_is_not_much_larger_than_its_rows():
    block = Block(layout(16, 16), table_salt("t"))
    assert block.nbytes < 512
    block.reserve(10)
    assert block.nbytes < 4096
    block.reserve(100_000)
    assert block.nbytes < 1.5 * 100_000 * (128 + 16)
