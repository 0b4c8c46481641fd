# SPDX-License-Identifier: Apache-2.0
"""A bound program: any batch, the same bits every time, no memory per step, one compilation per kernel, bad feeds."""

import tracemalloc

import numpy as np
import pytest

from oarlock.nn import (
    Linear,
    Model,
    binary_cross_entropy,
    columns,
    concat,
    dense_input,
    field_columns,
    interactions,
    kernels,
    lookup,
    mask_kernels,
    multiply,
    pairs,
    pool,
    relu,
    row_kernels,
    sigmoid,
)
from oarlock.proto.errors import InvalidArgument, Malformed


@pytest.fixture
def model():
    a = lookup("a", table="t", dim=4)
    b = lookup("b", table="t", dim=4, fields=2)
    x = dense_input("x", width=3)
    hidden = Linear(8, activation="relu", name="fc")(concat([a, b, x, multiply(a, columns(b, 2, 6))]))
    logit = Linear(1, name="out")(hidden)
    return Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"))


def all_kernels():
    modules = (kernels, row_kernels, pairs, mask_kernels)
    return {
        name: kernel for module in modules for name, kernel in vars(module).items() if hasattr(kernel, "signatures")
    }


def outcome(program, feeds, batch):
    loss = program.train(feeds, batch)
    parts = [program.flat_gradients.tobytes()]
    parts += [program.row_gradients[name].tobytes() for name in sorted(program.row_gradients)]
    return loss, b"".join(parts), program.predict(feeds, batch).tobytes()


@pytest.mark.parametrize("kind", ["neumf", "fields", 0, 1, 2, 3])
def test_bits_depend_on_nothing_but_the_feeds(kind, reference):
    models = {"neumf": reference.neumf, "fields": wide_deep_and_crossed}
    model = models[kind]() if kind in models else reference.random_model(kind)
    programs = [model.bind(bound) for bound in (513, 513, 1024, 700)]
    for program in programs:
        reference.fill(program, 5)
    for number, batch in enumerate((1, 2, 63, 65, 512, 513)):
        feeds = reference.make_feeds(model, batch, batch, rows=batch)
        expected = outcome(programs[0], feeds, batch)
        for program in programs[1:]:
            # What was run before must not show either.
            program.train(reference.make_feeds(model, 100 + number, 9, rows=50), 100 + number)
            assert outcome(program, feeds, batch) == expected


def test_nan_does_not_outlive_its_step(reference):
    """Also in columns of a buffer that no gradient reaches."""
    hidden = Linear(6, activation="tanh", name="fc")(lookup("a", table="t", dim=3))
    logit = Linear(1, name="out")(multiply(columns(hidden, 0, 2), columns(hidden, 3, 5)))
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="label"))
    program = model.bind(5)
    reference.fill(program, 1)
    feeds = reference.make_feeds(model, 5, 1)
    expected = outcome(program, feeds, 5)
    spoiled = {**feeds, "a": (np.full_like(feeds["a"][0], np.nan), feeds["a"][1])}
    assert np.isnan(program.train(spoiled, 5))
    assert np.isnan(program.flat_gradients).any()
    assert outcome(program, feeds, 5) == expected


def test_rows_are_summed_in_order_of_position(reference):
    """With sums that round differently in any other order."""
    a = lookup("a", table="t", dim=1)
    model = Model(score=a, loss=binary_cross_entropy(a, label="label"))
    batch = 1000
    program = model.bind(batch)
    feeds = reference.make_feeds(model, batch, 3, rows=3)
    program.train(feeds, batch)
    rows, inverse = feeds["a"]
    each = np.empty((batch, 1), np.float32)
    kernels.binary_cross_entropy_gradient(rows[inverse], 0, feeds["label"], each, 0)
    forward = reference.segment_sum(each, inverse[:, None], 0, np.zeros((3, 1), np.float32))
    backward = reference.segment_sum(each[::-1], inverse[::-1, None], 0, np.zeros((3, 1), np.float32))
    np.testing.assert_array_equal(program.row_gradients["a"], forward)
    assert (forward != backward).any()


def wide_deep_and_crossed():
    """Return a model that reads one lookup of [wide 1 | deep 5] in three ways."""
    rows, x = lookup("rows", table="t", dim=6, fields=4), dense_input("x", width=3)
    deep = field_columns(rows, 1, 6)
    bottom = Linear(5, activation="relu", name="bottom")(x)
    hidden = Linear(8, activation="relu", name="fc")(concat([deep, interactions(bottom, deep), bottom]))
    logit = Linear(1, name="out")(concat([pool(field_columns(rows, 0, 1), 4), hidden]))
    return Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"))


@pytest.mark.parametrize("kind", ["neumf", "fields"])
def test_a_step_allocates_nothing(kind, reference):
    model = reference.neumf() if kind == "neumf" else wide_deep_and_crossed()
    batch = 2048
    program = model.bind(batch)
    reference.fill(program, 1)
    feeds = [reference.make_feeds(model, size, size, rows=500) for size in (batch, batch - 1)]
    sizes = [(feed, len(feed["label"])) for feed in feeds]
    for feed, size in sizes * 2:
        program.train(feed, size)
        program.predict(feed, size)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for feed, size in sizes * 5:
            program.train(feed, size)
            program.predict(feed, size)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Headers of arrays take less than this; one column of one sample more would be 8 KB.
    assert peak - before < 60_000
    assert now - before < 60_000


def test_buffers_are_kept(model, reference):
    program = model.bind(64)
    kept = {name: array.ctypes.data for name, array in program.gradients.items()}
    big, small = reference.make_feeds(model, 64, 1, rows=40), reference.make_feeds(model, 64, 2, rows=10)
    program.train(big, 64)
    address = program.row_gradients["a"].ctypes.data
    score = program.predict(big, 64).ctypes.data
    for feeds in (small, big):
        program.train(feeds, 64)
        assert program.row_gradients["a"].ctypes.data == address
        assert program.row_gradients["a"].shape == feeds["a"][0].shape
        assert program.predict(feeds, 64).ctypes.data == score
    assert {name: array.ctypes.data for name, array in program.gradients.items()} == kept


def test_parameters_are_views_of_one_vector(model):
    program = model.bind(4)
    assert [spec.name for spec in model.parameters] == ["fc.weight", "fc.bias", "out.weight", "out.bias"]
    program.flat_parameters[:] = np.arange(program.flat_parameters.size)
    begin = 0
    for spec in model.parameters:
        assert program.parameters[spec.name].shape == spec.shape == program.gradients[spec.name].shape
        np.testing.assert_array_equal(program.parameters[spec.name].ravel(), np.arange(begin, begin + spec.size))
        assert np.shares_memory(program.gradients[spec.name], program.flat_gradients)
        begin += spec.size
    assert begin == program.flat_parameters.size == program.flat_gradients.size
    assert program.flat_parameters.dtype == program.flat_gradients.dtype == np.float32


def test_every_layout_of_a_feed_gives_the_same_and_compiles_nothing(model, reference):
    batch = 33
    program = model.bind(batch)
    reference.fill(program, 1)
    feeds = reference.make_feeds(model, batch, 1)
    expected = outcome(program, feeds, batch)
    compiled = list(all_kernels().values())
    before = [len(kernel.signatures) for kernel in compiled]

    def read_only(array):
        return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

    def strided(array):
        return np.repeat(array, 2, axis=0)[::2]

    def unaligned(array):
        return np.frombuffer(bytearray(b"x" + array.tobytes()), array.dtype, offset=1).reshape(array.shape)

    for change in (read_only, strided, unaligned):
        changed = {
            name: tuple(change(part) for part in value) if isinstance(value, tuple) else change(value)
            for name, value in feeds.items()
        }
        assert outcome(program, changed, batch) == expected
    column = {**feeds, "a": (feeds["a"][0], feeds["a"][1][:, None])}
    assert outcome(program, column, batch) == expected
    assert [len(kernel.signatures) for kernel in compiled] == before


def outcome_of_fields(reference):
    program = wide_deep_and_crossed().bind(65)
    for batch in (1, 65):
        outcome(program, reference.make_feeds(program.model, batch, batch), batch)


def test_one_signature_per_kernel(reference):
    """Whatever graphs and batches this process has run."""
    for seed in (0, 1, 2, 3, 4):
        model = reference.random_model(seed)
        program = model.bind(9)
        for batch in (1, 9):
            program.train(reference.make_feeds(model, batch, seed), batch)
            program.predict(reference.make_feeds(model, batch, seed), batch)
    outcome_of_fields(reference)
    compiled = all_kernels()
    if not compiled:
        pytest.skip("kernels run as plain Python here")
    assert len(compiled) > 20
    assert {name: len(kernel.signatures) for name, kernel in compiled.items() if len(kernel.signatures) > 1} == {}


def test_dead_relu_and_saturated_logits(reference):
    a = lookup("a", table="t", dim=3)
    logit = Linear(1, name="out")(Linear(4, activation="relu", name="fc")(relu(a)))
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="label"))
    program = model.bind(8)
    feeds = reference.make_feeds(model, 8, 1)
    program.parameters["fc.bias"][:] = -1e6
    program.parameters["out.bias"][:] = 3e4
    feeds["label"][:] = 0
    with np.errstate(all="raise"):
        assert program.train(feeds, 8) == pytest.approx(3e4)
    assert program.gradients["out.bias"][0] == 1
    assert not program.gradients["fc.weight"].any()
    assert not program.row_gradients["a"].any()
    feeds["label"][:] = 1
    assert program.train(feeds, 8) == 0
    assert not program.flat_gradients.any()


def test_unused_columns_and_rows_have_zero_gradient(reference):
    a = lookup("a", table="t", dim=6)
    logit = columns(a, 2, 3)
    model = Model(score=logit, loss=binary_cross_entropy(logit, label="label"))
    program = model.bind(4)
    feeds = reference.make_feeds(model, 4, 1)
    feeds["a"][1][:] = [0, 2, 2, 0]
    program.train(feeds, 4)
    moved = program.row_gradients["a"] != 0
    assert moved[[0, 2], 2].all()
    assert moved.sum() == 2


def test_predict_needs_no_label(model, reference):
    program = model.bind(5)
    reference.fill(program, 1)
    feeds = reference.make_feeds(model, 5, 1)
    with_label = program.predict(feeds, 5).copy()
    del feeds["label"]
    np.testing.assert_array_equal(program.predict(feeds, 5), with_label)
    assert with_label.shape == (5,)
    assert with_label.dtype == np.float32


def change(feeds, name, value):
    return {**feeds, name: value}


def rows(feeds, spoil):
    return change(feeds, "a", (spoil(feeds["a"][0]), feeds["a"][1]))


def inverse(feeds, spoil, name="a"):
    return change(feeds, name, (feeds[name][0], spoil(feeds[name][1])))


BAD = {
    "missing lookup": (lambda f: {k: v for k, v in f.items() if k != "a"}, InvalidArgument, r"feed a is missing"),
    "missing label": (lambda f: {k: v for k, v in f.items() if k != "label"}, InvalidArgument, "feed label is missing"),
    "unknown": (lambda f: change(f, "c", 1), InvalidArgument, "feed c is not part of this model"),
    "not a dict": (lambda f: list(f), InvalidArgument, "give a dict"),
    "not a tuple": (lambda f: change(f, "a", f["a"][0]), Malformed, r"feed a: give a tuple"),
    "list of rows": (lambda f: rows(f, lambda r: r.tolist()), Malformed, "feed a: rows is a list"),
    "rows float64": (lambda f: rows(f, lambda r: r.astype("f8")), Malformed, "feed a: rows has dtype"),
    "rows big-endian": (lambda f: rows(f, lambda r: r.astype(">f4")), Malformed, "feed a: rows has dtype"),
    "rows flat": (lambda f: rows(f, lambda r: r.ravel()), Malformed, r"feed a: rows have shape"),
    "rows wide": (lambda f: rows(f, lambda r: np.ones((9, 5), "f4")), Malformed, r"feed a: rows have .*\(n, 4\)"),
    "no rows": (lambda f: rows(f, lambda r: r[:0]), Malformed, "feed a: 7 values of inverse"),
    "inverse int64": (lambda f: inverse(f, lambda i: i.astype("i8")), Malformed, "feed a: inverse has dtype"),
    "inverse short": (lambda f: inverse(f, lambda i: i[:-1]), Malformed, r"feed a: inverse .*\(7,\)"),
    "one field": (lambda f: inverse(f, lambda i: i[:, 0].copy(), "b"), Malformed, r"feed b: inverse .*\(7, 2\)"),
    "inverse too high": (
        lambda f: inverse(f, lambda i: np.where(np.arange(14).reshape(7, 2) == 5, 9, i).astype("i4"), "b"),
        Malformed,
        r"feed b: 1 values of inverse .*position 5: 9",
    ),
    "inverse negative": (lambda f: inverse(f, lambda i: i - 100), Malformed, "feed a: 7 values .*position 0"),
    "dense flat": (lambda f: change(f, "x", f["x"].ravel()), Malformed, r"feed x: shape .*\(7, 3\)"),
    "dense integers": (lambda f: change(f, "x", f["x"].astype("i4")), Malformed, "feed x: the value has dtype int32"),
    "label short": (lambda f: change(f, "label", f["label"][:-1]), Malformed, r"feed label: shape .*\(7,\)"),
    "label integers": (lambda f: change(f, "label", f["label"].astype("i4")), Malformed, "feed label: .*dtype int32"),
    "label NaN": (
        lambda f: change(f, "label", np.array([0, 1, 0, np.nan, 1, 2, 0], "f4")),
        Malformed,
        "feed label: 2 labels are not in .*position 3: nan",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_feeds_are_refused_by_name_and_change_nothing(name, model, reference):
    spoil, error, message = BAD[name]
    program = model.bind(10)
    reference.fill(program, 1)
    feeds = reference.make_feeds(model, 7, 1)
    expected = outcome(program, feeds, 7)
    before = program.flat_gradients.copy()
    with pytest.raises(error, match=message):
        program.train(spoil(feeds), 7)
    np.testing.assert_array_equal(program.flat_gradients, before)
    if "label" not in name:
        with pytest.raises(error, match=message):
            program.predict(spoil(feeds), 7)
    assert outcome(program, feeds, 7) == expected


@pytest.mark.parametrize("batch", [0, -1, 11, 2.0, True, "7"])
def test_bad_batch(batch, model, reference):
    program = model.bind(10)
    with pytest.raises(InvalidArgument, match="batch"):
        program.train(reference.make_feeds(model, 7, 1), batch)


@pytest.mark.parametrize("bound", [0, -4, 1.5, True])
def test_bad_bound(bound, model):
    with pytest.raises(InvalidArgument, match="max_batch"):
        model.bind(bound)
