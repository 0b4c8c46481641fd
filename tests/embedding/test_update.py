# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.optimizer import OPTIMIZERS, hyper_of, optimizer_of
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spec import OptimizerSpec
from oarlock.embedding.update import power, refuse
from oarlock.proto.errors import InvalidArgument

SPECS = [
    OptimizerSpec("sgd"),
    OptimizerSpec("adagrad", initial=0.1, epsilon=1e-6),
    OptimizerSpec("adam", beta1=0.8, beta2=0.99),
]
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


class Rows:
    """Rows side by side in one array, as the kernels see them."""

    def __init__(self, spec, n, dim, rng):
        self.spec, self.dim = spec, dim
        self.optimizer = optimizer_of(spec)
        self.memory = np.empty((n, dim + self.optimizer.state_columns(dim)), np.float32)
        self.weights = self.memory[:, :dim]
        self.state = self.memory[:, dim:]
        self.weights[:] = rng.normal(size=(n, dim))
        self.state[:] = self.optimizer.initial_state(spec, dim)

    def push(self, gradients, rate, rows=None):
        rows = np.arange(len(gradients)) if rows is None else rows
        addresses = address_of(self.memory) + rows * self.memory.strides[0]
        self.optimizer.update(addresses.astype(np.int64), self.dim, gradients, rate, hyper_of(self.spec))


def test_the_list_of_specs_covers_every_optimizer():
    assert {spec.name for spec in SPECS} == set(OPTIMIZERS)


@each
@pytest.mark.parametrize("dim", [1, 3, 16, 100])
def test_equals_the_float32_twin_to_the_bit(spec, dim):
    rng = np.random.default_rng(dim)
    rows = Rows(spec, 7, dim, rng)
    weights, state = rows.weights.copy(), rows.state.copy()
    for step in range(30):
        gradients = rng.normal(size=(7, dim)).astype(np.float32) * np.float32(10.0 ** rng.integers(-6, 6))
        gradients[step % 7] = 0
        rows.push(gradients, 0.05)
        for i in range(7):
            reference.update(spec, weights[i], state[i], gradients[i], 0.05)
    assert rows.weights.tobytes() == weights.tobytes()
    assert rows.state.tobytes() == state.tobytes()


@each
def test_equals_the_textbook_formula_over_200_steps(spec):
    rng = np.random.default_rng(5)
    rows = Rows(spec, 1, 8, rng)
    weights = rows.weights[0].astype(np.float64)
    state = np.full(8, spec.initial) if spec.name == "adagrad" else np.zeros({"sgd": 0, "adam": 16}[spec.name])
    for step in range(1, 201):
        gradient = rng.normal(size=(1, 8)).astype(np.float32)
        rows.push(gradient, 0.01)
        reference.update64(spec, weights, state, gradient[0].astype(np.float64), 0.01, step)
    np.testing.assert_allclose(rows.weights[0], weights, rtol=0, atol=1e-5)


@pytest.mark.torch
@each
def test_equals_pytorch_over_200_steps(spec):
    torch = pytest.importorskip("torch", reason="torch is not installed: make setup-torch")
    rng = np.random.default_rng(6)
    rows = Rows(spec, 1, 8, rng)
    parameter = torch.nn.Parameter(torch.from_numpy(rows.weights[0].copy()))
    other = {
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.01),
        "adagrad": lambda: torch.optim.Adagrad(
            [parameter], lr=0.01, initial_accumulator_value=spec.initial, eps=spec.epsilon
        ),
        "adam": lambda: torch.optim.Adam([parameter], lr=0.01, betas=(spec.beta1, spec.beta2), eps=spec.epsilon),
    }[spec.name]()
    for _ in range(200):
        gradient = rng.normal(size=(1, 8)).astype(np.float32)
        rows.push(gradient, 0.01)
        parameter.grad = torch.from_numpy(gradient[0].copy())
        other.step()
    np.testing.assert_allclose(rows.weights[0], parameter.detach().numpy(), rtol=0, atol=1e-5)


@each
def test_goes_down_a_parabola(spec):
    rows = Rows(spec, 3, 4, np.random.default_rng(0))
    steps = 300 if reference.JIT else 60
    start = np.abs(rows.weights).max()
    for _ in range(steps):
        rows.push(np.ascontiguousarray(rows.weights), 0.1)
    assert np.abs(rows.weights).max() < 0.3 * start


@each
def test_a_zero_gradient_leaves_a_fresh_row_and_address_0_is_skipped(spec):
    rows = Rows(spec, 4, 4, np.random.default_rng(0))
    before = rows.memory.copy()
    rows.push(np.zeros((4, 4), np.float32), 0.1)
    assert rows.weights.tobytes() == np.ascontiguousarray(before[:, :4]).tobytes()
    before = rows.memory.copy()
    rows.optimizer.update(np.zeros(3, np.int64), 4, np.ones((3, 4), np.float32), 0.1, hyper_of(spec))
    assert rows.memory.tobytes() == before.tobytes()


@each
def test_a_wide_row_is_the_same_as_many_narrow_ones(spec):
    wide = Rows(spec, 1, 24, np.random.default_rng(0))
    narrow = Rows(spec, 24, 1, np.random.default_rng(0))
    for step in range(5):
        gradient = np.random.default_rng(step).normal(size=24).astype(np.float32)
        wide.push(gradient.reshape(1, 24), 0.1)
        narrow.push(gradient.reshape(24, 1), 0.1)
    assert np.ascontiguousarray(wide.weights).tobytes() == np.ascontiguousarray(narrow.weights).tobytes()


def test_refuse_marks_rows_that_are_not_finite():
    gradients = np.array([[1, 2], [np.nan, 0], [0, np.inf], [-np.inf, 1], [9e14, 1e-45], [0, -1e15]], np.float32)
    flags = np.full(6, 9, np.uint8)
    assert refuse(gradients.view(np.uint32), flags) == 4
    assert flags.tolist() == (~(np.abs(gradients) < np.float32(1e15)).all(axis=1)).tolist()
    assert refuse(np.empty((0, 2), np.uint32), np.empty(0, np.uint8)) == 0


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 1000, 123456])
def test_power_is_repeated_squaring(exponent):
    assert power(0.999, exponent) == reference.power(0.999, exponent)
    assert power(0.999, exponent) == pytest.approx(0.999**exponent, rel=1e-9)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(InvalidArgument, match=r"did you mean 'adagrad'.*choose one of adagrad, adam, sgd"):
        optimizer_of(OptimizerSpec("Adagrid"))
    with pytest.raises(InvalidArgument, match="'zzz' is unknown; choose one of"):
        optimizer_of(OptimizerSpec("zzz"))
