# SPDX-License-Identifier: Apache-2.0
"""Draws and orders: their pinned values, their twins in Python integers, and that they are even."""

import numpy as np
import pytest

from oarlock.data.draws import (
    MASK,
    NEGATIVES,
    absorb,
    below,
    draw,
    fill_draws,
    fill_units,
    stream_of,
    unit,
    word,
)
from oarlock.data.order import permutation, row_order, split_order
from oarlock.proto.errors import InvalidArgument


def mix_slowly(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def draw_slowly(*numbers: int) -> int:
    out = mix_slowly(numbers[0] & MASK)
    for number in numbers[1:]:
        out = mix_slowly((out + (number + 1) * 0x9E3779B97F4A7C15) & MASK)
    return out


GOLDEN = {
    (0, 0, 0, 0, 0, 0): 0x78AE5A9A6B5FD45E,
    (1, 2, 3, 4, 5, 6): 0xF7D1022AA938F7DA,
    (MASK, 0, MASK, 0, NEGATIVES, 7): 0xFA645E14A6E2BF81,
}


@pytest.mark.parametrize("numbers", GOLDEN)
def test_draws_never_change(numbers: tuple[int, ...]) -> None:
    assert int(draw(*map(word, numbers))) == GOLDEN[numbers] == draw_slowly(*numbers)


def test_fills_are_the_draws_one_by_one() -> None:
    stream = np.uint64(stream_of(*map(word, (9, 8, 7, 6, 5))))
    words, units = np.empty(50, np.uint64), np.empty(50)
    fill_draws(stream, word(3), words)
    fill_units(stream, word(3), units)
    assert words.tolist() == [draw_slowly(9, 8, 7, 6, 5, 3 + i) for i in range(50)]
    assert units.tolist() == [(int(w) >> 11) / 2**53 for w in words]
    assert int(absorb(stream, word(3))) == int(words[0])


@pytest.mark.parametrize("bound", [1, 2, 10, 3706, 2**32 - 1, 2**32 + 7, 2**63, MASK])
def test_below_is_the_high_word_of_the_product(bound: int) -> None:
    for bits in (0, 1, 2**31, 2**32, 2**32 - 1, 2**63, MASK, draw_slowly(bound), draw_slowly(bound, 1)):
        assert int(below(word(bits), word(bound))) == bits * bound >> 64


def test_unit_stays_below_one() -> None:
    assert float(unit(word(0))) == 0.0
    assert float(unit(word(MASK))) == 1.0 - 2.0**-53


def test_draws_are_even() -> None:
    units = np.empty(100_000)
    fill_units(np.uint64(stream_of(*map(word, (1, 0, 0, 0, 0)))), word(0), units)
    counts = np.bincount((units * 100).astype(int), minlength=100)
    # Chi-square with 99 degrees of freedom: over 160 happens once in ten thousand seeds.
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 160


def test_orders_never_change() -> None:
    assert permutation(10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert permutation(10, 1, 2).tolist() == [4, 1, 6, 0, 5, 7, 8, 3, 2, 9]
    assert split_order(7, 3, 12).tolist() == [6, 1, 3, 2, 9, 10, 5, 7, 8, 4, 0, 11]
    assert row_order(7, 3, 5, 12).tolist() == [7, 5, 3, 1, 11, 9, 10, 6, 4, 2, 8, 0]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_holds_every_position_once(n: int) -> None:
    order = permutation(n, 5)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_every_number_changes_the_order() -> None:
    orders = [
        row_order(1, 2, 3, 100),
        row_order(0, 2, 3, 100),
        row_order(1, 0, 3, 100),
        row_order(1, 2, 0, 100),
        split_order(1, 2, 100),
        permutation(100),
        permutation(100, 0),
        permutation(100, 0, 0),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


def test_negative_length_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="give a number >= 0"):
        permutation(-1)
