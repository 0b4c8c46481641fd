# SPDX-License-Identifier: Apache-2.0
"""Dense blocks as rows of a fixed width, each under the codec by itself; bytes with zstd and without."""

import numpy as np
import pytest

from oarlock.client.compression import read_way
from oarlock.client.packed import (
    CHUNK,
    decode_dense,
    encode_dense,
    encode_rows,
    form_of,
    opened_dense,
    opened_rows,
    packed,
    unpack_dense,
)
from oarlock.proto.errors import Malformed


def test_a_dense_block_is_packed_in_rows_of_its_own():
    form = form_of(read_way("topk:0.1", "push"), CHUNK, zstd=False, pushed=True)
    lengths = [1, 255, 256, 257, 700]
    values = np.random.default_rng(0).normal(size=sum(lengths)).astype(np.float32)
    out = np.full_like(values, np.nan)
    decode_dense(form, encode_dense(form, values, lengths), lengths, out)
    kept = out != 0
    assert np.array_equal(out[kept], values[kept])
    at = 0
    for length in lengths:
        for begin in range(0, length, CHUNK):
            width = min(CHUNK, length - begin)
            assert kept[at + begin : at + begin + width].sum() == -(-26 * width // CHUNK)
        at += length


@pytest.mark.parametrize("way", ["float16", "bfloat16", "int8+feedback"])
def test_blocks_of_any_length_come_back_rounded(way):
    form = form_of(read_way(way, "push"), CHUNK, zstd=False, pushed=False)
    lengths = [3, 256, 300, 512, 1]
    values = np.random.default_rng(1).normal(size=sum(lengths)).astype(np.float32)
    data = encode_dense(form, values, lengths)
    assert len(data) == sum(form.block_bytes(length) for length in lengths)
    out = np.empty_like(values)
    decode_dense(form, data, lengths, out)
    assert 0 < np.abs(out - values).max() < 0.02
    # Where a block lies says nothing about how it is packed.
    assert np.array_equal(
        encode_dense(form, values[559:], lengths[3:]), data[-form.block_bytes(512) - form.block_bytes(1) :]
    )


def test_zstd_holds_the_same_rows_and_not_one_more():
    plain, small = (form_of(read_way("float16", "pull"), 4, zstd=zstd) for zstd in (False, True))
    rows = np.tile(np.arange(4, dtype=np.float32), (500, 1))
    encoded = encode_rows(small, rows)
    message = packed(small, encoded, rows.size, None)
    assert len(message.payload.data) < encoded.nbytes // 10
    assert np.array_equal(opened_rows(small, message, 500, 4, "rows", ()), encoded)
    for n in (499, 501):
        message.values = 4 * n
        with pytest.raises(Malformed):
            opened_rows(small, message, n, 4, "rows", ())
    message.values = rows.size
    with pytest.raises(Malformed, match="packed bytes came"):
        opened_rows(plain, message, 500, 4, "rows", ())


def test_dense_values_of_another_number_are_malformed():
    form = form_of(read_way("int8", "pull"), CHUNK, zstd=True)
    lengths = [10, 300]
    values = np.ones(310, np.float32)
    message = packed(form, encode_dense(form, values, lengths), 310, None)
    assert np.allclose(unpack_dense(form, message, lengths, "values", ()), values)
    for wrong in ([10, 301], [310], []):
        with pytest.raises(Malformed):
            opened_dense(form, message, wrong, "values", ())
