# SPDX-License-Identifier: Apache-2.0
"""Packed rows against numpy: what a form reads as, how far it is from what was packed, and what a frozen table of it answers."""

import numpy as np
import pytest

from oarlock.embedding.frozen import FrozenBlock, FrozenTable
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.packed import (
    FORMS,
    INT4,
    LINES,
    MIXED,
    NO_CODEBOOK,
    NO_STARTS,
    PQ,
    WHOLE,
    check_mixed,
    mixed_values,
    pack_int4,
    pack_int8,
    pack_mixed,
    pack_pq,
    part_starts,
    row_bytes,
    unpack,
)
from oarlock.embedding.precision import INT8, PRECISIONS
from oarlock.embedding.spec import TableSpec
from oarlock.export.codebook import train_codebook
from oarlock.export.lines import fit_lines
from oarlock.proto.errors import InvalidArgument, Malformed

DIMS = (1, 2, 3, 7, 8, 16, 17, 64)


def weights_of(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (n, dim)) * rng.lognormal(0, 3, (n, 1))).astype(np.float32)


def test_codes_never_change_their_meaning():
    assert FORMS == ("float32", "float16", "bfloat16", "int8", "int4", "pq", "mixed")
    assert FORMS[: len(PRECISIONS)] == PRECISIONS
    assert [row_bytes(code, 16, 4) for code in range(7)] == [64, 32, 32, 20, 12, 4, 16]


@pytest.mark.parametrize("dim", DIMS)
def test_int8_is_within_half_a_step(dim):
    weights = weights_of(300, dim)
    weights[5] = 0
    rows = pack_int8(weights)
    found = unpack(rows, INT8, dim, NO_CODEBOOK, NO_STARTS)
    step = np.abs(weights).max(axis=1, keepdims=True) / 127
    assert rows.shape == (300, row_bytes(INT8, dim))
    assert (np.abs(found - weights) <= step * 0.5001).all()
    assert not found[5].any()


@pytest.mark.parametrize("dim", DIMS)
def test_int4_reads_as_levels_of_a_scale(dim):
    weights = weights_of(300, dim)
    weights[5] = 0
    rows = pack_int4(weights)
    found = unpack(rows, INT4, dim, NO_CODEBOOK, NO_STARTS)
    scales = rows[:, -4:].copy().view(np.float32)
    low, high = rows & 15, rows >> 4
    levels = np.stack([low, high], axis=2).reshape(300, -1)[:, :dim].astype(np.int32) - 8
    assert found.tobytes() == (levels.astype(np.float32) * scales).tobytes()
    assert np.abs(levels).max() <= 7
    # No worse than the largest weight as 7 would be, and better on the whole.
    plain = np.maximum(np.abs(weights).max(axis=1, keepdims=True) / 7, 1e-30)
    error = np.square(np.rint(weights / plain) * plain - weights).sum(axis=1)
    mine = np.square(found - weights).sum(axis=1)
    assert (mine <= error * 1.0001 + 1e-30).all()
    some = error > 0
    assert dim < 16 or (mine[some] / error[some]).mean() < 0.95


@pytest.mark.parametrize(("dim", "parts"), [(1, 1), (16, 4), (17, 4), (8, 8), (7, 2)])
def test_product_quantised_rows_read_as_the_nearest_lines(dim, parts):
    weights = np.random.default_rng(1).normal(0, 1, (2000, dim)).astype(np.float32)
    codebook = train_codebook(weights, parts)
    starts = part_starts(dim, parts)
    rows = pack_pq(weights, codebook, parts)
    found = unpack(rows, PQ, dim, codebook, starts)
    for part in range(parts):
        run = slice(starts[part], starts[part + 1])
        distance = np.square(weights[:, None, run] - codebook[None, :, run]).sum(axis=2)
        assert np.allclose(distance[np.arange(2000), rows[:, part]], distance.min(axis=1), atol=1e-5)
        assert found[:, run].tobytes() == codebook[rows[:, part], run].tobytes()
    # Far better than one of 256 rows at random.
    assert np.square(found - weights).sum() < 0.8 * np.square(weights - weights[rows[:, 0].astype(int)]).sum()


def test_a_codebook_of_few_rows_has_them():
    weights = weights_of(3, 4)
    codebook = train_codebook(weights, 2)
    assert unpack(pack_pq(weights, codebook, 2), PQ, 4, codebook, part_starts(4, 2)).tobytes() == weights.tobytes()
    assert not train_codebook(weights[:0], 2).any()
    with pytest.raises(InvalidArgument, match="give 1 to 4"):
        train_codebook(weights, 5)


@pytest.mark.parametrize(("dim", "values"), [(2, 2), (3, 2), (16, 4), (17, 5), (64, 16), (16, 16)])
def test_mixed_rows_read_as_numpys_truncated_svd_and_the_whole_ones_to_the_bit(dim, values):
    rng = np.random.default_rng(6)
    weights = (rng.normal(0, 1, (500, dim)) @ rng.normal(0, 1, (dim, dim))).astype(np.float32)
    whole = rng.random(500) < 0.2
    # As they come: in parts, of which one has no row.
    lines = fit_lines([weights[:0], weights[:123][~whole[:123]], weights[123:][~whole[123:]]], dim, values)
    assert np.allclose(lines @ lines.T, np.eye(values), atol=1e-5)
    rows = pack_mixed(weights, whole, lines, 0)
    assert rows.shape == (500, row_bytes(MIXED, dim, values))
    codebook = np.concatenate([lines, weights[whole]])
    found = unpack(rows, MIXED, dim, codebook, mixed_values(values, dim))
    assert found[whole].tobytes() == weights[whole].tobytes()
    # What a row says, product by product.
    said = rows.view(np.float32)[~whole]
    want = said[:, :1] * lines[0]
    for each in range(1, values):
        want = want + said[:, each : each + 1] * lines[each]
    assert np.allclose(found[~whole], want, rtol=1e-5, atol=1e-5)
    rest = weights[~whole].astype(np.float64)
    u, s, vt = np.linalg.svd(rest, full_matrices=False)
    best = (u[:, :values] * s[:values]) @ vt[:values]
    error, least = (np.square(each - rest).sum() for each in (found[~whole], best))
    assert error <= least * 1.0001 + 1e-6 * np.square(rest).sum()


def test_a_mixed_row_that_means_no_line_is_refused():
    weights = weights_of(10, 4)
    whole = np.arange(10) < 3
    rows = pack_mixed(weights, whole, np.eye(4, dtype=np.float32)[:2], 5)
    assert rows.view(np.uint32)[:3, 1].tolist() == [5, 6, 7]
    assert (rows.view(np.uint32)[:3, 0] == WHOLE).all()
    check_mixed(rows, 8)
    check_mixed(np.empty((0, 3), np.uint8), 0)
    with pytest.raises(Malformed, match="beyond the 7"):
        check_mixed(rows, 7)
    for values in (1, 5, 0, -1, 1 << 40):
        with pytest.raises(InvalidArgument, match="give 2 to 4"):
            mixed_values(values, 4)


@pytest.mark.parametrize("form", ["int8", "int4", "pq", "mixed"])
def test_a_frozen_table_reads_packed_rows(form):
    spec = TableSpec("t", 6, blocks=4)
    code = FORMS.index(form)
    keys = np.sort(np.random.default_rng(2).integers(0, 1 << 63, 500).astype(np.uint64))
    weights = weights_of(500, 6)
    codebook = train_codebook(weights, 3)
    whole = np.arange(500) % 7 == 0
    lines = fit_lines([weights[~whole]], 6, 3)
    packs = {"int8": pack_int8, "int4": pack_int4, "pq": lambda w: pack_pq(w, codebook, 3)}
    rows = (packs | {"mixed": lambda w: pack_mixed(w, whole, lines, 0)})[form](weights)
    starts = {"pq": part_starts(6, 3), "mixed": mixed_values(3, 6)}.get(form, NO_STARTS)
    book = {"pq": codebook, "mixed": np.concatenate([lines, weights[whole]])}.get(form, NO_CODEBOOK)
    number = np.empty(500, np.int32)
    blocks_of(keys, table_salt("t"), 2, number)
    none = np.empty((0, 0), np.float32)

    def block(n):
        mine = number == n
        return FrozenBlock(spec, keys[mine], none, none, packed=np.ascontiguousarray(rows[mine]))

    table = FrozenTable(spec, [block(n) for n in range(4)], seed=3, code=code, codebook=book, starts=starts)
    plain = FrozenTable(spec, [FrozenBlock(spec, keys[:0], np.empty((0, 6), np.float32), none)] * 4, seed=3)
    assert (table.form, table.row_bytes) == (form, rows.shape[1])
    asked = np.concatenate([keys[::-1], np.arange(50, dtype=np.uint64)])
    out, first = np.empty((550, 6), np.float32), np.empty((50, 6), np.float32)
    assert table.lookup(asked, out) == 50
    plain.lookup(asked[500:], first)
    assert out[:500].tobytes() == unpack(rows, code, 6, book, starts)[::-1].tobytes()
    assert out[500:].tobytes() == first.tobytes()
    with pytest.raises(Malformed, match="rows of"):
        FrozenTable(spec, [block(n) for n in range(4)], seed=3)
    if form == "pq":
        with pytest.raises(Malformed, match=f"for \\[{LINES}, 6\\]"):
            FrozenTable(spec, [block(n) for n in range(4)], seed=3, code=code, starts=starts)
    if form == "mixed":
        assert table.values_bytes == 500 * 12 + book.nbytes
        assert table.nbytes == sum(block(n).nbytes for n in range(4)) + book.nbytes
        for wrong in (book[:2], book[:-1], np.ones((80, 5), np.float32), book.astype(np.float64)):
            with pytest.raises(Malformed, match=r"lines of|beyond the|expected an array"):
                FrozenTable(spec, [block(n) for n in range(4)], seed=3, code=code, codebook=wrong, starts=starts)
    with pytest.raises(Malformed, match="packed rows of"):
        FrozenBlock(spec, keys, none, none, packed=rows[:1])
