# SPDX-License-Identifier: Apache-2.0
"""Products of all pairs by tiles: every edge against float64 in wider buffers, what NaN reaches, and a program beside BLAS."""

import numpy as np
import pytest

from oarlock.embedding.tile import LANES, suits_cpu
from oarlock.nn import Linear, Model, binary_cross_entropy, dense_input, interactions, lookup, pair_tiles, program
from oarlock.nn.layout import Strip

pytestmark = pytest.mark.skipif(not suits_cpu(), reason="no AVX-512, or kernels are not compiled: BLAS takes all pairs")

GUARD = np.float32(123.5)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def strip(rng, batch, width, begin):
    buffer = np.full((batch, begin + width + 2), GUARD, np.float32)
    part = buffer[:, begin : begin + width]
    part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    return Strip(buffer, begin, width)


def inputs(rng, batch, fields, dim, with_dense):
    """Return strips of a vector, of ``fields`` vectors and of room for their products, and float64[batch, vectors, dim]."""
    dense = [strip(rng, batch, dim, 1)] if with_dense else []
    rows = strip(rng, batch, fields * dim, 3)
    vectors = np.concatenate([one.matrix for one in (*dense, rows)], axis=1).astype(np.float64)
    count = fields + with_dense
    return dense, rows, strip(rng, batch, count * (count - 1) // 2, 5), vectors.reshape(batch, count, dim)


def scratch_of(dim, vectors):
    return np.full(pair_tiles.scratch_size(dim, vectors), np.nan, np.float32)


@pytest.mark.parametrize("dim", [16, 32, 48])
@pytest.mark.parametrize("fields", [17, 18, 31, 32, 33, 49])
@pytest.mark.parametrize("with_dense", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_of_all_pairs(dim, fields, with_dense, batch, rng, reference):
    assert pair_tiles.fits(fields, dim)
    dense, rows, out, vectors = inputs(rng, batch, fields, dim, with_dense)
    expected, bound = reference.lower_pairs(vectors), reference.lower_pairs(np.abs(vectors))
    pair_tiles.forward(dense, rows, fields, out, scratch_of(dim, fields + with_dense))
    # What a float32 sum of dim terms may be off.
    assert (np.abs(out.matrix - expected) <= dim * 2.0**-24 / (1 - dim * 2.0**-24) * bound).all()
    assert (np.delete(out.buffer, np.s_[out.start : out.start + out.width], axis=1) == GUARD).all()


def test_a_sample_does_not_depend_on_the_others(rng):
    """Not even on how many there are, and a NaN stays in the products of its own vector."""
    dense, rows, out, _ = inputs(rng, 5, 20, 16, True)
    rows.matrix[2, 3 * 16 + 7] = np.nan
    pair_tiles.forward(dense, rows, 20, out, scratch_of(16, 21))
    alone = Strip(np.empty((1, out.width), np.float32), 0, out.width)
    for s in range(5):
        one, others = (Strip(each.matrix[s : s + 1].copy(), 0, each.width) for each in (dense[0], rows))
        pair_tiles.forward([one], others, 20, alone, scratch_of(16, 21))
        np.testing.assert_array_equal(alone.matrix[0], out.matrix[s])
    pairs = [(i, j) for i in range(21) for j in range(i)]
    lost = [4 in pair for pair in pairs]
    np.testing.assert_array_equal(np.isnan(out.matrix), np.outer(np.arange(5) == 2, lost))


def test_what_is_too_small_for_tiles_or_no_multiple_of_them_does_not_fit():
    assert [pair_tiles.fits(*each) for each in ((LANES, 16), (LANES + 1, 16), (26, 8), (26, 24), (26, 64))] == [
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("fields", [16, 17, 26])
def test_a_program_by_tiles_predicts_and_trains_as_by_blas(monkeypatch, fields, reference):
    rows, x = lookup("rows", table="t", dim=16, fields=fields), dense_input("x", width=5)
    pairs = interactions(Linear(16, name="bottom")(x), rows)
    logit = Linear(1, name="out")(pairs)
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="label"))
    feeds, found = reference.make_feeds(model, 100, 1), []
    for tiles in (True, False):
        monkeypatch.setattr(program, "by_tiles", lambda tiles=tiles: tiles)
        one = model.bind(128)
        reference.fill(one, 5)
        loss = one.train(feeds, 100)
        found.append((loss, one.predict(feeds, 100).copy(), one.flat_gradients, one.row_gradients["rows"]))
        steps = {step.node.operation: step.tiled_forward for _, step in one._forward}
        assert steps["interactions"] is (tiles and fields > 16)
    for tiles, blas in zip(*found, strict=True):
        np.testing.assert_allclose(tiles, blas, rtol=1e-4, atol=1e-5 * np.abs(blas).max())
