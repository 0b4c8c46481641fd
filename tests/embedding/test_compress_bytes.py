# SPDX-License-Identifier: Apache-2.0
"""Payloads as they come from a stranger: cut, lengthened, of any bits, at any address, packed by zstd into anything."""

import contextlib

import compress_reference as twin
import embedding_reference as reference
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings

from oarlock.embedding.compress import CODECS, Compression, RowCodec
from oarlock.embedding.pointer import address_of
from oarlock.proto.errors import Malformed

EXAMPLES = settings(max_examples=80 if reference.JIT else 10)
N = 500 if reference.JIT else 100
ALL = [Compression(c, k=2 if c == "topk" else 0, zstd=z) for c in CODECS for z in (0, 1)]
each = pytest.mark.parametrize("compression", ALL, ids=lambda c: f"{c.codec}-{c.zstd}")


def payload(codec, values):
    out = np.empty(codec.size(len(values)), np.uint8)
    return out[: codec.encode(values, out)].tobytes()


def read(codec, data, n):
    """Return float32[n, dim], having seen that nothing around it was written."""
    room = np.full((n + 2, codec.dim), np.float32(7))
    try:
        codec.decode(data, room[1 : n + 1])
    finally:
        assert (room[0] == 7).all()
        assert (room[n + 1] == 7).all()
    return room[1 : n + 1]


def same(a, b):
    return ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


def normal(n, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def frame(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@EXAMPLES
@given(codec=st.sampled_from(CODECS), dim=st.integers(2, 9), n=st.integers(0, 3), data=st.data())
def test_any_bytes_of_the_right_length_are_rows_or_malformed(codec, dim, n, data):
    compression = Compression(codec, k=2 if codec == "topk" else 0)
    made = RowCodec(compression, dim)
    given_bytes = data.draw(st.binary(min_size=made.size(n), max_size=made.size(n)))
    try:
        expected = twin.decode(compression, given_bytes, n, dim) if n else np.empty((0, dim), np.float32)
    except ValueError as error:
        with pytest.raises(Malformed, match=f"compressed {error}:"):
            read(made, given_bytes, n)
    else:
        assert same(read(made, given_bytes, n), expected)


@pytest.mark.skipif(not reference.JIT, reason="takes long")
def test_every_float16_and_bfloat16_is_read_as_numpy_reads_it():
    words = np.arange(1 << 16, dtype=np.uint16)
    for name in ("float16", "bfloat16"):
        compression = Compression(name)
        found = read(RowCodec(compression, 1 << 16), words.tobytes(), 1)
        assert same(found, twin.decode(compression, words.tobytes(), 1, 1 << 16))


@each
def test_another_length_is_malformed(compression):
    codec = RowCodec(compression, 5)
    values = normal(6, 5)
    rows = codec.rows(payload(codec, values), 6).tobytes()
    for data in (b"", rows[:-1], rows[:-4], rows + b"\0", rows + rows, rows[: codec.row_bytes]):
        with pytest.raises(Malformed, match=r"were to come|no zstd frame"):
            read(codec, data, 6)
        with pytest.raises(Malformed):
            codec.rows(data, 6)
    assert len(read(codec, b"", 0)) == 0
    with pytest.raises(Malformed):
        read(codec, b"\0", 0)


@pytest.mark.parametrize("dim", [6, 300])
def test_columns_of_topk_are_checked(dim):
    codec = RowCodec(Compression("topk", 3), dim)
    dtype = np.uint8 if dim <= 256 else np.uint16
    top = np.iinfo(dtype).max

    def with_columns(*columns):
        data = np.ones(3, np.float32).tobytes() + np.array(columns, dtype).tobytes()
        good = payload(codec, np.ones((1, dim), np.float32))
        return good + data.ljust(codec.row_bytes, b"\0")

    assert read(codec, with_columns(0, 2, dim - 1), 2)[1].sum() == 3
    for columns in ((0, 2, dim), (0, 2, top), (0, 0, 1), (1, 0, 2), (0, 3, 3), (top, 0, 1)):
        with pytest.raises(Malformed, match=r"row 1: its columns are not 3 of \d+, ascending"):
            read(codec, with_columns(*columns), 2)


@each
def test_payloads_may_lie_at_any_address_and_be_read_only(compression):
    codec = RowCodec(compression, 5)
    values = normal(4, 5)
    data = payload(codec, values)
    expected = read(codec, data, 4).tobytes()
    for offset in range(8):
        around = b"\xa5" * offset + data + b"\xa5"
        for form in (bytes, bytearray, lambda b: np.frombuffer(b, np.uint8)):
            part = memoryview(form(around))[offset : offset + len(data)]
            assert read(codec, part, 4).tobytes() == expected
        out = np.full(offset + codec.size(4) + 1, 0xA5, np.uint8)
        size = codec.encode(values, out[offset:-1])
        assert out[offset : offset + size].tobytes() == data
        assert (out[:offset] == 0xA5).all()
        assert (out[offset + codec.size(4) :] == 0xA5).all()


@each
def test_kernels_see_aligned_memory_only(compression):
    """Some processors read and write floats nowhere else."""
    codec = RowCodec(compression, 5)
    data = payload(codec, normal(4, 5))
    for offset in range(4):
        seen = []
        codec.write(4, np.empty(offset + codec.size(4), np.uint8)[offset:], seen.append)
        seen.append(address_of(codec.rows(memoryview(b"\0" * offset + data)[offset:], 4)))
        assert [address % 4 for address in seen] == [0, 0]


@each
def test_rows_can_be_taken_out_of_a_payload(compression):
    """As for a block that has moved to another shard."""
    codec = RowCodec(compression, 5)
    values = normal(6, 5)
    data = payload(codec, values)
    chosen = np.array([4, 1, 1])
    rows = codec.rows(data, 6)[chosen]
    out = np.empty(codec.size(3), np.uint8)
    part = out[: codec.seal(rows, out)]
    assert part.tobytes() == payload(codec, values[chosen])
    assert same(read(codec, part, 3), read(codec, data, 6)[chosen])
    assert codec.seal(rows[:0], out) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_zstd_makes_a_payload_shorter_or_leaves_it(codec):
    k = 2 if codec == "topk" else 0
    plain, packed = RowCodec(Compression(codec, k), 8), RowCodec(Compression(codec, k, zstd=3), 8)
    noise = np.random.default_rng(0).integers(0, 1 << 31, (N, 8)).astype(np.uint32).view(np.float32)
    for values in (np.zeros((N, 8), np.float32), normal(N, 8), noise, normal(1, 8), normal(0, 8)):
        raw, data = payload(plain, values), payload(packed, values)
        assert packed.size(len(values)) == plain.size(len(values)) == len(raw) >= len(data)
        assert packed.rows(data, len(values)).tobytes() == raw
        assert same(read(packed, data, len(values)), read(plain, raw, len(values)))
    assert len(payload(packed, np.zeros((N, 8), np.float32))) < 100
    assert payload(packed, normal(1, 8)) == payload(plain, normal(1, 8))


def test_a_frame_of_other_than_its_rows_is_malformed():
    codec = RowCodec(Compression("float16", zstd=1), 4)
    size = codec.size(1000)
    rows = bytes(size)
    good = frame(rows)
    assert read(codec, good, 1000).tobytes() == bytes(2 * size)
    bad = [
        frame(rows + b"\0"),
        frame(rows[:-1]),
        frame(b""),
        frame(bytes(1 << 26)),
        good[:-1],
        good + b"\0",
        good + good,
    ]
    bad += [b"\0" * 50, good[:4], good[4:], b"\x28\xb5\x2f\xfd" + b"\xff" * 40]
    for data in bad:
        assert len(data) < size
        with pytest.raises(Malformed, match="no zstd frame of 8000 bytes"):
            read(codec, data, 1000)
    with pytest.raises(Malformed, match="were to come"):
        read(RowCodec(Compression("float16"), 4), good, 1000)


@EXAMPLES
@given(data=st.data())
def test_a_damaged_frame_is_rows_or_malformed(data):
    codec = RowCodec(Compression("int8", zstd=1), 4)
    good = bytearray(payload(codec, np.tile(normal(2, 4), (20, 1))))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Malformed):
        assert read(codec, bytes(good), 40).shape == (40, 4)
