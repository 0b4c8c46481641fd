# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.initial import constants, first_dense, first_rows, origin
from oarlock.embedding.spec import INITIALIZERS, Initializer
from oarlock.proto.errors import InvalidArgument

KEYS = np.array([0, 1, 42, 1 << 63, reference.WORD], np.uint64)


def rows(kind, keys=KEYS, dim=5, seed=7, name="t", mean=0.0, scale=1.0):
    out = np.full((len(keys), dim), np.nan, np.float32)
    first_rows(origin(seed, name), keys, constants(Initializer(kind, mean, scale)), out)
    return out


@pytest.mark.parametrize("kind", INITIALIZERS)
@pytest.mark.parametrize("seed", [0, 7, reference.WORD])
def test_equals_the_twin_to_the_bit(kind, seed):
    found = rows(kind, seed=seed, mean=0.25, scale=0.5)
    expected = [[reference.first_value(seed, "t", key, c, kind, 0.25, 0.5) for c in range(5)] for key in KEYS]
    assert found.tobytes() == np.array(expected, np.float32).tobytes()


def test_golden_values_of_the_format():
    assert [float(x).hex() for x in rows("normal", KEYS[:1], 3)[0]] == [
        "0x1.050c9e0000000p+0",
        "-0x1.8d11040000000p-1",
        "-0x1.673ea20000000p-1",
    ]
    assert [float(x).hex() for x in rows("uniform", KEYS[4:], 3)[0]] == [
        "-0x1.9c66c40000000p-1",
        "0x1.5b5b6a0000000p-1",
        "-0x1.9f32060000000p-4",
    ]


def test_dense_values_are_column_0_of_the_flat_position():
    first = constants(Initializer("normal", 0.0, 0.1))
    out = np.empty(20, np.float32)
    first_dense(origin(3, "dense/w"), 100, first, out)
    expected = np.empty((20, 1), np.float32)
    first_rows(origin(3, "dense/w"), np.arange(100, 120, dtype=np.uint64), first, expected)
    assert out.tobytes() == expected.tobytes()


def test_moments_and_tails_are_those_of_the_distribution():
    n = 20 * reference.MANY
    normal = rows("normal", np.arange(n // 10, dtype=np.uint64), 10).astype(np.float64).ravel()
    error = 5 / np.sqrt(n)
    assert abs(normal.mean()) < error
    assert abs(normal.var() - 1) < 1.5 * error
    assert abs((normal**3).mean()) < 4 * error
    assert abs((normal**4).mean() - 3) < 10 * error
    for bound, share in ((1, 0.317311), (2, 0.045500)):
        assert abs((abs(normal) > bound).mean() - share) < error * np.sqrt(share)
    uniform = rows("uniform", np.arange(n // 10, dtype=np.uint64), 10).astype(np.float64)
    assert uniform.min() >= -1
    assert uniform.max() <= 1
    assert abs(uniform.mean()) < error
    assert abs(uniform.var() - 1 / 3) < error


def test_seed_table_key_and_column_all_matter():
    base = rows("uniform")
    for other in (rows("uniform", seed=8), rows("uniform", name="u"), rows("uniform", KEYS + np.uint64(1))):
        assert (base != other).all()
    assert len(np.unique(base)) == base.size
    assert int(origin(7, "t")) != int(table_salt("t"))


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5, True])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(InvalidArgument, match="seed"):
        origin(seed, "t")
