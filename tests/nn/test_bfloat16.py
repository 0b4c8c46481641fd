# SPDX-License-Identifier: Apache-2.0
"""Linears whose products are in bfloat16: refusals, error bounds, whole graphs against autograd that rounds alike, training.

The unit roundoff of bfloat16 is u = 2^-8: 8 significant bits, rounded to nearest.
"""

import importlib
import logging
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from oarlock.nn import (
    Linear,
    Model,
    Program,
    bfloat16,
    bfloat16_kernels,
    binary_cross_entropy,
    concat,
    dense_input,
    dropout,
    lookup,
    sigmoid,
)
from oarlock.proto.errors import InvalidArgument

U = 2.0**-8


def close(node):
    logit = Linear(1, name="out")(node)
    return Model(score=sigmoid(logit), loss=binary_cross_entropy(logit, label="label"))


def tower(activation, *, bias=True, depth=2, width=70):
    """Rows and numbers, ``depth`` layers of one activation, a float32 layer on top."""
    hidden = concat([lookup("a", table="t", dim=50), dense_input("x", width=21)])
    for number in range(depth):
        hidden = Linear(width, activation=activation, bias=bias, name=f"fc{number}")(hidden)
    return close(hidden)


@pytest.fixture(autouse=True)
def one_thread():
    """For BLAS, and so for torch: two that wait for each other on a busy machine take a hundred times as long."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture
def everything(monkeypatch):
    """Have even the smallest layers, but those of one unit, multiply in bfloat16."""
    monkeypatch.setattr(bfloat16, "LEAST_WEIGHTS", 0)


# Without PyTorch.


def test_refused_without_pytorch_with_the_way_to_get_it(monkeypatch):
    real = importlib.import_module

    def absent(name, package=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, package)

    monkeypatch.setattr(bfloat16.importlib, "import_module", absent)
    with pytest.raises(InvalidArgument, match=r"No module named 'torch'.*pip install oarlock\[torch\]"):
        replace(tower("relu"), dense_dtype="bfloat16")
    tower("relu").bind(2)


@pytest.mark.parametrize("value", ["float16", "bf16", "", None, 16])
def test_unknown_dtypes_are_refused(value):
    with pytest.raises(InvalidArgument, match=r"dense_dtype = .*: give one of float32, bfloat16"):
        replace(tower("relu"), dense_dtype=value)


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_fp16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
    ],
)
def test_what_cpus_say_of_themselves(text, fast, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert bfloat16.cpu_is_fast(tmp_path / "cpuinfo") is fast
    assert bfloat16.cpu_is_fast(tmp_path / "absent")


def test_small_layers_and_single_units_stay_float32():
    x = dense_input("x", width=64)
    assert bfloat16.in_bfloat16(Linear(64, name="a")(x))
    assert not bfloat16.in_bfloat16(Linear(63, name="b")(x))
    assert not bfloat16.in_bfloat16(Linear(1, name="c")(dense_input("y", width=10_000)))
    assert not bfloat16.in_bfloat16(x)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_of_numpys_products(threads):
    with threadpool_limits(threads, "blas"):
        assert bfloat16.blas_threads() == threads


# With PyTorch.


def bind_pair(reference, model, batch, seed):
    """Return the program under bfloat16 and under float32, with the same parameters."""
    programs = [replace(model, dense_dtype=dtype).bind(batch) for dtype in ("bfloat16", "float32")]
    for program in programs:
        reference.fill(program, seed)
    return programs


@pytest.mark.torch
def test_errors_of_a_layer_are_within_the_bound_of_its_roundings(reference):
    r"""A product's inputs are rounded by at most u each, its K terms added in float32 (v = 2^-24), its result rounded.

    \|found - a b\| <= ((1 + u)^2 (1 + K v) (1 + u) - 1) \|a\| \|b\|. The output adds v for the bias. The gradient that enters
    is float32's; the activation is none, so nothing else is between.
    """
    batch, inputs, units = 203, 71, 90
    x = dense_input("x", width=inputs)
    h = Linear(units, name="fc")(concat([x, lookup("a", table="t", dim=40)]))
    model = close(h)
    program, _ = bind_pair(reference, model, batch, seed=3)
    feeds = reference.make_feeds(model, batch, seed=3, rows=batch)
    rows, inverse = feeds["a"][0], np.arange(batch, dtype=np.int32)
    feeds["a"] = (rows, inverse)
    program.train(feeds, batch)
    value = np.concatenate([feeds["x"], rows], axis=1).astype(np.float64)
    weight, bias, out = (program.parameters[name].astype(np.float64) for name in ("fc.weight", "fc.bias", "out.weight"))
    (step,) = (step for _, step in program._forward if step.node is h)
    entering = step.gradient.matrix.astype(np.float64)

    def bound(k):
        return (1 + U) ** 3 * (1 + k * 2.0**-24) - 1

    def within(found, a, b, extra=0.0):
        allowed = bound(a.shape[1]) * (abs(a) @ abs(b)) + extra
        error = abs(found - (a @ b))
        assert (error <= allowed).all()
        # A bound that is never neared would hold for anything.
        assert (error > 0.02 * allowed).any()

    within(step.output.matrix - bias, value, weight, extra=2.0**-22 * (1 + abs(step.output.matrix)))
    within(program.gradients["fc.weight"], value.T, entering)
    within(program.row_gradients["a"], entering, weight[inputs:].T)
    np.testing.assert_allclose(program.gradients["fc.bias"], entering.sum(0), rtol=1e-5, atol=1e-7)
    # The layer above is float32 throughout.
    np.testing.assert_allclose(
        program.gradients["out.weight"][:, 0],
        step.output.matrix.T.astype(np.float64) @ (entering @ out / (out * out).sum())[:, 0],
        rtol=1e-4,
        atol=1e-6,
    )


def rounding_product(torch):
    """Return the product whose inputs and results, forward and backward, are rounded to bfloat16."""

    def rounded(tensor):
        return tensor.to(torch.bfloat16).to(torch.float64)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight):
            x, weight = rounded(x), rounded(weight)
            context.save_for_backward(x, weight)
            return rounded(x @ weight)

        @staticmethod
        def backward(context, gradient):
            x, weight = context.saved_tensors
            gradient = rounded(gradient)
            return rounded(gradient @ weight.T), rounded(x.T @ gradient)

    return Product.apply


class Rounding:
    """A weight that is multiplied in bfloat16: PyTorch hands ``tensor @ this`` over to it."""

    def __init__(self, product, leaf):
        self.product = product
        self.leaf = leaf

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        x, weight = arguments
        return weight.product(x, weight.leaf)


def check_rounding_alike(reference, model, batch, seed):
    """Compare with float64 autograd that rounds where we do; what differs is float32's order of sums.

    A difference of 2^-24 may tip a rounding by one step, u, which then is an input of others: few do, so nearly all values
    agree far better than bfloat16 could, and all of them as bfloat16 can.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    math = reference.TorchMath(torch)
    program = replace(model, dense_dtype="bfloat16").bind(batch + 3)
    reference.fill(program, seed)
    feeds = reference.make_feeds(model, batch, seed)
    for _ in range(2):  # the second step must not see what the first left behind
        loss = program.train(feeds, batch, seed=17, step=seed)
    leaves = {name: math.array(value).requires_grad_() for name, value in program.parameters.items()}
    halves = {node.detail.name for node in program._halves.operations}
    product = rounding_product(torch)
    shown = leaves | {f"{name}.weight": Rounding(product, leaves[f"{name}.weight"]) for name in halves}
    rows = {spec.name: math.array(feeds[spec.name][0]).requires_grad_() for spec in model.lookups}
    expected, _ = reference.evaluate(model, math, shown, rows, feeds, (17, seed))
    _, score = reference.evaluate(model, math, shown, rows, feeds)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    found = {**program.gradients, **program.row_gradients}
    wanted = {name: leaf.grad.numpy() for name, leaf in {**leaves, **rows}.items()}
    for name, gradient in wanted.items():
        scale = abs(gradient).max() + 1e-6
        error = abs(found[name] - gradient) / scale
        assert error.max() < 4 * U, name
        assert np.median(error) < U / 16, name
    np.testing.assert_allclose(program.predict(feeds, batch), score.detach().numpy(), rtol=2 * U, atol=2 * U)
    return len(halves)


@pytest.mark.torch
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_towers_round_as_autograd_that_rounds(activation, bias, depth, reference):
    assert check_rounding_alike(reference, tower(activation, bias=bias, depth=depth), 130, seed=5) == depth


@pytest.mark.torch
def test_dropout_between_layers(reference):
    hidden = Linear(80, activation="relu", name="fc0")(dense_input("x", width=60))
    model = close(Linear(64, activation="relu", name="fc1")(dropout(hidden, 0.4)))
    assert check_rounding_alike(reference, model, 90, seed=2) == 2


@pytest.mark.torch
@pytest.mark.usefixtures("everything")
def test_random_graphs_round_as_autograd_that_rounds(reference):
    assert sum(check_rounding_alike(reference, reference.random_model(seed), 29, seed) for seed in range(40)) > 60


@pytest.mark.torch
@pytest.mark.usefixtures("everything")
def test_a_layer_used_more_than_once_and_one_that_many_read(reference):
    shared = Linear(9, activation="relu", name="shared")
    first = shared(dense_input("x", width=9))
    model = close(concat([first, Linear(5, activation="relu", name="narrow")(shared(first)), shared(first)]))
    assert check_rounding_alike(reference, model, 50, seed=4) == 2


@pytest.mark.torch
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["number", "weight", "bias"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_is_not_a_number_shows_where_it_does_in_float32(bad, where, activation, reference):
    model = tower(activation, depth=3)
    batch = 33
    feeds = reference.make_feeds(model, batch, seed=6)
    if where == "number":
        feeds["x"][4, 2] = bad
    shown = []
    for program in bind_pair(reference, model, batch, seed=6):
        if where != "number":
            program.parameters[f"fc1.{where}"].flat[7] = bad
        with np.errstate(invalid="ignore"):
            loss = program.train(feeds, batch)
            flat = np.concatenate([program.flat_gradients, program.row_gradients["a"].ravel()])
            shown.append((np.isnan(loss), np.isnan(flat), np.isnan(program.predict(feeds, batch).copy())))
    for half, full in zip(*shown, strict=True):
        np.testing.assert_array_equal(half, full)
    if np.isnan(bad):
        assert shown[0][0]


@pytest.mark.torch
def test_the_same_step_gives_the_same_bits(reference):
    model = tower("relu", depth=3)
    feeds, other = reference.make_feeds(model, 40, seed=1), reference.make_feeds(model, 64, seed=2)
    (program, _), (again, _) = (bind_pair(reference, model, 64, seed=1) for _ in range(2))
    loss, flat = program.train(feeds, 40), program.flat_gradients.copy()
    again.train(other, 64)
    assert again.train(feeds, 40) == loss
    np.testing.assert_array_equal(again.flat_gradients, flat)


@pytest.mark.torch
def test_parameters_and_gradients_are_float32_and_small_updates_are_kept(reference):
    """Steps of about 2^-12 of a weight, that bfloat16 weights of their own would lose one by one, add up."""
    model = tower("relu", depth=2)
    batch = 64
    feeds = reference.make_feeds(model, batch, seed=8)
    program, full = bind_pair(reference, model, batch, seed=8)
    lossy, _ = bind_pair(reference, model, batch, seed=8)
    first = program.train(feeds, batch)
    assert program.flat_parameters.dtype == program.flat_gradients.dtype == np.float32
    weights = program.flat_parameters.copy()
    middle = np.median(abs(weights))
    rate = np.float32(2.0**-12 * middle / np.median(abs(program.flat_gradients[program.flat_gradients != 0])))

    def rounded(values):
        half = np.zeros((1, len(values)), np.uint16)
        bfloat16_kernels.pack(values.reshape(1, -1), 0, len(values), half)
        return (half[0].astype(np.uint32) << np.uint32(16)).view(np.float32)

    lossy.flat_parameters[:] = rounded(lossy.flat_parameters)
    start = lossy.flat_parameters.copy()
    for _ in range(60):
        for one in (program, full, lossy):
            one.train(feeds, batch)
            one.flat_parameters -= rate * one.flat_gradients
        lossy.flat_parameters[:] = rounded(lossy.flat_parameters)
    fell = first - program.train(feeds, batch)
    assert fell > 0
    assert fell == pytest.approx(first - full.train(feeds, batch), rel=0.05)
    moved = abs(program.flat_parameters - weights)
    assert np.median(moved[moved > 0]) > 20 * 2.0**-12 * middle
    # What the float32 parameters are for: most of the others never moved.
    assert (lossy.flat_parameters == start).mean() > 0.5


@pytest.mark.torch
def test_training_reaches_the_loss_of_float32(reference):
    """A margin of 0.02 for a loss that falls from about 0.7 to below 0.25; the labels are no linear function of x."""
    x = dense_input("x", width=64)
    hidden = Linear(96, activation="relu", name="fc1")(Linear(96, activation="relu", name="fc0")(x))
    model = close(hidden)
    rng = np.random.default_rng(5)
    ways = rng.standard_normal((64, 2))

    def draw(n):
        values = rng.standard_normal((n, 64), dtype=np.float32)
        return {"x": values, "label": (np.prod(values @ ways, axis=1) > 0).astype(np.float32)}

    batches, held = [draw(256) for _ in range(60)], draw(2048)
    losses = []
    for dtype in ("bfloat16", "float32"):
        program = replace(model, dense_dtype=dtype).bind(2048)
        reference.fill(program, 5, scale=0.1)
        mean, square = np.zeros_like(program.flat_gradients), np.zeros_like(program.flat_gradients)
        for step in range(1, 361):
            program.train(batches[step % 60], 256)
            mean += 0.1 * (program.flat_gradients - mean)
            square += 0.001 * (program.flat_gradients**2 - square)
            size = np.sqrt(square / (1 - 0.999**step)) + 1e-8
            program.flat_parameters -= 0.003 * mean / (1 - 0.9**step) / size
        losses.append(program.train(held, 2048))
    assert losses[1] < 0.25
    assert abs(losses[0] - losses[1]) < 0.02


@pytest.mark.torch
def test_as_many_threads_as_blas_and_a_warning_on_slow_cpus(monkeypatch, caplog):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    before = torch.get_num_threads()
    monkeypatch.setattr(bfloat16, "blas_threads", lambda: 3)
    monkeypatch.setattr(bfloat16, "cpu_is_fast", lambda: False)
    try:
        with caplog.at_level(logging.WARNING, "oarlock.nn"):
            replace(tower("relu"), dense_dtype="bfloat16").bind(2)
        assert torch.get_num_threads() == 3
        assert "event=bfloat16_slow" in caplog.text
        caplog.clear()
        replace(tower("relu", width=3), dense_dtype="bfloat16").bind(2)
        assert not caplog.text
    finally:
        torch.set_num_threads(before)


@pytest.mark.torch
def test_kernels_are_compiled_as_the_model_is_made(reference):
    model = replace(tower("relu", depth=3), dense_dtype="bfloat16")
    kernels = [getattr(bfloat16_kernels, name) for name in dir(bfloat16_kernels)]
    kernels = [kernel for kernel in kernels if hasattr(kernel, "signatures")]
    if not kernels:
        pytest.skip("kernels are interpreted here")
    before = {kernel.__name__: len(kernel.signatures) for kernel in kernels}
    program: Program = model.bind(20)
    feeds = reference.make_feeds(model, 20, seed=1)
    program.train(feeds, 20)
    program.predict(feeds, 20)
    assert {kernel.__name__: len(kernel.signatures) for kernel in kernels} == before
    called = ("pack", "unpack", "finish", "finish_wide", "bias_gradient", "relu_bias_gradient_wide")
    assert {name: before[name] for name in called} == dict.fromkeys(called, 1)
