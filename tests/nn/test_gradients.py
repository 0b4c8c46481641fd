# SPDX-License-Identifier: Apache-2.0
"""Layers and whole random graphs against PyTorch's autograd and against finite differences, both in float64."""

import numpy as np
import pytest

from oarlock.nn import (
    Linear,
    Model,
    add,
    binary_cross_entropy,
    columns,
    concat,
    dense_input,
    dropout,
    field_columns,
    interactions,
    lookup,
    multiply,
    pool,
    relu,
    sigmoid,
    tanh,
)


def layer_models():
    def close(node):
        logit = Linear(1, name="out")(node)
        return Model(score=logit, loss=binary_cross_entropy(logit, label="label"))

    a = lookup("a", table="t", dim=6)
    b = lookup("b", table="t", dim=6)
    many = lookup("many", table="t", dim=6, fields=4)
    x = dense_input("x", width=5)
    h = Linear(6, activation="tanh", name="h")(a)
    for name in ("relu", "sigmoid", "tanh", None):
        for bias in (True, False):
            yield f"linear-{name}-{bias}", close(Linear(5, activation=name, bias=bias, name="fc")(x))
    for function in (relu, sigmoid, tanh):
        yield function.__name__, close(function(a))
    yield "multiply", close(multiply(a, b))
    yield "square", close(multiply(a, a))
    yield "square-and-more", close(concat([multiply(h, h), relu(h), multiply(h, b)]))
    yield "both-factors-shared", close(concat([multiply(h, b), relu(h), sigmoid(b)]))
    yield "add", close(add(a, b))
    yield "double", close(add(h, h))
    yield "concat", close(concat([a, x, b]))
    yield "concat-twice", close(concat([a, a, concat([x, a])]))
    yield "concat-of-own-linear", close(concat([h, Linear(3, name="fc")(h)]))
    yield "concat-of-own-slice", close(concat([columns(h, 0, 2), Linear(3, name="fc")(columns(h, 2, 6))]))
    yield "fields", close(many)
    yield "fields-cut-across", close(concat([columns(many, 3, 14), columns(many, 14, 15)]))
    yield "columns-disjoint-with-a-gap", close(multiply(columns(h, 0, 2), columns(h, 3, 5)))
    yield "columns-overlapping", close(multiply(columns(h, 0, 4), columns(h, 2, 6)))
    yield "columns-and-whole", close(concat([columns(h, 1, 3), h]))
    yield "columns-of-columns", close(concat([columns(columns(h, 1, 6), 2, 4), columns(h, 0, 2)]))
    yield "pieces-overlapping", close(concat([columns(a, 0, 4), columns(a, 2, 6)]))
    yield "piece-unused", close(columns(a, 2, 3))
    yield "field-columns", close(field_columns(many, 1, 4))
    yield "field-columns-and-whole", close(concat([field_columns(many, 1, 4), relu(many)]))
    yield "field-columns-and-columns", close(concat([columns(many, 3, 14), field_columns(many, 0, 5)]))
    yield "field-columns-twice", close(concat([field_columns(many, 0, 3), relu(field_columns(many, 2, 6))]))
    yield "field-columns-of-one-field", close(concat([field_columns(a, 2, 5), columns(a, 0, 3), a]))
    yield "field-columns-whole-and-columns", close(concat([field_columns(a, 2, 5), columns(a, 0, 3), tanh(a)]))
    yield "wide-and-deep", close(concat([pool(field_columns(many, 0, 1), 4), tanh(field_columns(many, 1, 6))]))
    yield "pool", close(pool(many, 4))
    yield "pool-of-linear", close(concat([pool(h, 3), h, pool(h, 6)]))
    yield "pool-of-dense-and-one", close(concat([pool(x, 5), pool(a, 1)]))
    yield "interactions", close(interactions(Linear(6, name="bottom")(x), many))
    yield "interactions-of-a-piece", close(interactions(Linear(5, name="bottom")(x), field_columns(many, 1, 6)))
    yield "interactions-with-dense", close(interactions(x, Linear(15, activation="tanh", name="fc")(a)))
    yield "interactions-of-dense-rows", close(interactions(Linear(1, name="bottom")(a), x))
    yield "interactions-without-dense", close(interactions(None, many))
    yield "interactions-of-a-piece-without-dense", close(concat([interactions(None, field_columns(many, 2, 5)), many]))
    yield "dropout", close(dropout(a, 0.5))
    yield "dropout-twice", close(concat([dropout(relu(dropout(h, 0.3)), 0.6), dropout(h, 0.3), dropout(x, 0.2)]))
    yield "dropout-of-nothing", close(dropout(a, 0))
    yield "interactions-with-itself", close(concat([interactions(h, h), h]))
    bottom = Linear(6, activation="relu", name="bottom")(x)
    yield "dlrm", close(concat([bottom, interactions(bottom, many)]))
    shared = Linear(4, activation="relu", name="shared")
    yield "shared", close(multiply(shared(a), shared(b)))
    yield "shared-three-times", close(concat([shared(a), shared(b), shared(h)]))
    crossed = h
    for number in range(2):
        crossed = add(multiply(h, Linear(6, name=f"cross{number}")(crossed)), crossed)
    yield "cross", close(crossed)
    logit = columns(a, 0, 1)
    yield "rows-alone", Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"))


LAYERS = dict(layer_models())


def check_torch(reference, model, batch, seed):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    math = reference.TorchMath(torch)
    program = model.bind(batch + 3)
    reference.fill(program, seed)
    feeds = reference.make_feeds(model, batch, seed)
    for _ in range(2):  # the second step must not see what the first left behind
        loss = program.train(feeds, batch, seed=17, step=seed)
    parameters = {name: math.array(value).requires_grad_() for name, value in program.parameters.items()}
    rows = {spec.name: math.array(feeds[spec.name][0]).requires_grad_() for spec in model.lookups}
    expected, _ = reference.evaluate(model, math, parameters, rows, feeds, (17, seed))
    _, score = reference.evaluate(model, math, parameters, rows, feeds)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for name, parameter in parameters.items():
        wanted = parameter.grad.numpy()
        np.testing.assert_allclose(program.gradients[name], wanted, rtol=1e-3, atol=3e-6, err_msg=name)
    for name, values in rows.items():
        wanted = values.grad.numpy()
        assert program.row_gradients[name].shape == wanted.shape
        np.testing.assert_allclose(program.row_gradients[name], wanted, rtol=1e-3, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(program.predict(feeds, batch), score.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 37])
def test_layer_equals_pytorch(name, batch, reference):
    check_torch(reference, LAYERS[name], batch, seed=batch)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(60))
def test_random_graph_equals_pytorch(seed, reference):
    check_torch(reference, reference.random_model(seed), (1, 2, 29, 130)[seed % 4], seed)


@pytest.mark.torch
def test_neumf_equals_pytorch(reference):
    check_torch(reference, reference.neumf(), 777, seed=1)


def check_differences(reference, model, batch, seed):
    math = reference.NumpyMath()
    program = model.bind(batch)
    reference.fill(program, seed)
    feeds = reference.make_feeds(model, batch, seed, rows=4)
    program.train(feeds, batch, seed=2**64 - 1, step=seed)
    draw = (2**64 - 1, seed)
    parameters = {name: math.array(value).copy() for name, value in program.parameters.items()}
    rows = {spec.name: math.array(feeds[spec.name][0]).copy() for spec in model.lookups}
    rng = np.random.default_rng(seed)
    step = 1e-6
    for values, gradients in ((parameters, program.gradients), (rows, program.row_gradients)):
        for name, array in values.items():
            for where in rng.choice(array.size, min(array.size, 6), replace=False):
                spot = np.unravel_index(where, array.shape)
                kept = array[spot]
                losses = []
                for sign in (1, -1):
                    array[spot] = kept + sign * step
                    losses.append(reference.evaluate(model, math, parameters, rows, feeds, draw)[0])
                array[spot] = kept
                slope = (losses[0] - losses[1]) / (2 * step)
                assert gradients[name][spot] == pytest.approx(slope, rel=2e-3, abs=5e-6), (name, spot)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_finite_differences(name, reference):
    check_differences(reference, LAYERS[name], 5, seed=3)


@pytest.mark.parametrize("seed", range(100, 120))
def test_random_graph_equals_finite_differences(seed, reference):
    check_differences(reference, reference.random_model(seed), 5, seed)
