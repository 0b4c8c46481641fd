# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.hashing import GOLDEN, blocks_of, key_mix, mix64, table_salt


def test_mix_gives_the_published_outputs_of_splitmix64():
    state, found = 1234567, []
    for _ in range(3):
        state = (state + int(GOLDEN)) & reference.WORD
        found.append(int(mix64(np.uint64(state))))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_salt_and_blocks_never_change():
    assert int(table_salt("user")) == 0xA9B763A76D99F804
    out = np.empty(6, np.int32)
    keys = np.array([0, 1, 2, 3, 1 << 40, reference.WORD], np.uint64)
    blocks_of(keys, table_salt("user"), 6, out)
    assert out.tolist() == [45, 36, 5, 58, 20, 56]


@pytest.mark.parametrize("bits", [0, 1, 6, 20])
@pytest.mark.parametrize("case", reference.EDGES)
def test_blocks_equal_the_twin(case, bits):
    keys = reference.EDGES[case]
    out = np.full(len(keys), -1, np.int32)
    blocks_of(keys, table_salt("t"), bits, out)
    assert out.tolist() == [reference.block("t", bits, key) for key in keys]


def test_sequential_keys_spread_over_blocks_and_over_index_positions():
    keys = np.arange(20 * reference.MANY, dtype=np.uint64)
    blocks = np.empty(len(keys), np.int32)
    blocks_of(keys, table_salt("t"), 4, blocks)
    low = np.array([int(key_mix(table_salt("t"), key)) & 15 for key in keys])
    for groups in (blocks, low):
        expected = len(keys) / 16
        assert ((np.bincount(groups, minlength=16) - expected) ** 2 / expected).sum() < 45  # chi-square, p = 1e-4
