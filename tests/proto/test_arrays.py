# SPDX-License-Identifier: Apache-2.0
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from oarlock.proto import common_pb2 as pb
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, encoded, pack, unpack
from oarlock.proto.errors import Malformed, OutOfMemory

DTYPES = [np.uint64, np.int32, np.float32, np.uint32]


@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(
            np.dtype(dtype).newbyteorder(">"), arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
        )
    )
)
def test_what_is_packed_is_unpacked_bit_for_bit(array):
    native = array.astype(array.dtype.newbyteorder("="))
    for given_array in (array, native, native[::-1][::-1]):
        found = unpack(pack(given_array), native.dtype.type, "a", dims=array.ndim)
        assert found.dtype == native.dtype
        assert found.shape == native.shape
        assert found.tobytes() == native.tobytes()
        assert not found.flags.writeable


def test_the_wire_is_little_endian():
    for array in (np.array([1, 0x0203], ">i4"), np.array([1, 0x0203], "<i4")):
        message = pack(array)
        assert message.data == b"\1\0\0\0\3\2\0\0"
        assert (message.dtype, list(message.shape)) == (pb.INT32, [2])


def test_numbers_of_dtypes_never_change():
    assert {name: pb.DType.Value(name) for name in pb.DType.keys()} == {  # noqa: SIM118
        "DTYPE_UNSPECIFIED": 0,
        "UINT64": 1,
        "INT32": 2,
        "FLOAT32": 3,
        "UINT32": 4,
        "UINT8": 5,
    }


def test_views_travel_in_row_major_order():
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (whole.T, whole[:, 1:3], whole[::2]):
        assert np.array_equal(unpack(pack(view), np.float32, "a", dims=2), view)


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, bool), np.array(["x"]), np.zeros(2, np.int64)])
def test_other_dtypes_do_not_travel(array):
    with pytest.raises(Malformed, match="cannot travel; use one of uint64, int32, float32, uint32"):
        pack(array)


def test_more_dimensions_than_are_read_do_not_travel():
    with pytest.raises(Malformed, match="5 dimensions cannot travel"):
        pack(np.zeros((1, 1, 1, 1, 1), np.float32))


def test_an_absent_array_is_empty():
    assert unpack(pb.Array(), np.int32, "a").shape == (0,)
    assert unpack(pb.Array(), np.float32, "a", dims=2, columns=7).shape == (0, 7)
    assert unpack(pb.Array(), np.float32, "a", dims=2).shape == (0, 0)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (pb.Array(data=b"\0" * 8, dtype=pb.INT32, shape=[2]), "rows: dtype int32, wanted float32"),
        (pb.Array(data=b"\0" * 8, dtype=99, shape=[2]), "rows: dtype 99, wanted float32"),
        (pb.Array(data=b"\0" * 8, shape=[2]), "rows: dtype 0, wanted float32"),
        (pb.Array(data=b"\0" * 8, dtype=pb.FLOAT32, shape=[2]), "rows: 1 dimensions, wanted 2"),
        (pb.Array(data=b"\0" * 4, dtype=pb.FLOAT32), "rows: 0 dimensions, wanted 2"),
        (pb.Array(data=b"\0" * 8, dtype=pb.FLOAT32, shape=[1, 1, 2]), "rows: 3 dimensions, wanted 2"),
        (pb.Array(data=b"\0" * 8, dtype=pb.FLOAT32, shape=[1, 3]), r"rows: 8 bytes for shape \(1, 3\) of float32"),
        (pb.Array(data=b"\0" * 9, dtype=pb.FLOAT32, shape=[1, 2]), r"rows: 9 bytes for shape \(1, 2\) of float32"),
        (pb.Array(data=b"", dtype=pb.FLOAT32, shape=[1, 2]), r"rows: 0 bytes for shape \(1, 2\) of float32"),
        (pb.Array(data=b"\0" * 8, dtype=pb.FLOAT32, shape=[2, 1]), "rows: 1 columns, wanted 2"),
        (pb.Array(dtype=pb.FLOAT32, shape=[0, 3]), "rows: 3 columns, wanted 2"),
    ],
)
def test_what_contradicts_itself_is_malformed(message, problem):
    with pytest.raises(Malformed, match=problem):
        unpack(message, np.float32, "rows", dims=2, columns=2)


@pytest.mark.parametrize("shape", [[1 << 31, 1 << 31], [(1 << 32) - 1, (1 << 32) - 1], [(1 << 25) + 1, 1]])
def test_a_claimed_size_over_the_limit_is_refused_before_it_is_believed(shape):
    with pytest.raises(OutOfMemory, match=f"over the limit of {MAX_MESSAGE_BYTES} bytes"):
        unpack(pb.Array(data=b"\0" * 8, dtype=pb.FLOAT32, shape=shape), np.float32, "rows", dims=2)


def test_no_rows_of_many_columns_are_no_rows():
    wide = pb.Array(dtype=pb.FLOAT32, shape=[0, (1 << 32) - 1])
    assert unpack(wide, np.float32, "rows", dims=2).shape == (0, (1 << 32) - 1)


@given(st.binary(max_size=40), st.integers(0, 6), st.lists(st.integers(0, 5), max_size=5), st.integers(0, 4))
def test_no_message_breaks_unpack(data, dtype, shape, dims):
    try:
        found = unpack(pb.Array(data=data, dtype=dtype, shape=shape), np.uint32, "a", dims=dims)
    except Malformed:
        pass
    else:
        assert found.tobytes() == data
        assert found.ndim == dims or not data


def test_a_message_over_the_limit_is_not_encoded(monkeypatch):
    monkeypatch.setattr("oarlock.proto.arrays.MAX_MESSAGE_BYTES", 102)
    fits = pb.Array(data=bytes(100))
    assert encoded(fits, "it") == fits.SerializeToString()
    with pytest.raises(OutOfMemory, match="it is 103 bytes, over the limit of 102 bytes in one message"):
        encoded(pb.Array(data=bytes(101)), "it")
