# SPDX-License-Identifier: Apache-2.0
"""Every row of the table of optimizers by the same tests: a new optimizer is tested by being in it."""

import json

import embedding_reference
import numpy as np
import optimizer_reference as reference
import pytest

from oarlock.embedding.optimizer_spec import READS, OptimizerSpec
from oarlock.embedding.optimizers import OPTIMIZERS, optimizer_of
from oarlock.embedding.pointer import address_of
from oarlock.embedding.regularise import BEFORE, passes, update_rows
from oarlock.embedding.spec import TableSpec, table_from_json, to_json
from oarlock.embedding.update_row import powers, sum_squares
from oarlock.proto.errors import InvalidArgument

SPECS = [OptimizerSpec(name, **reference.CONSTANTS.get(name, {})) for name in OPTIMIZERS]
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
BY_STEP = [OptimizerSpec(s.name, bias="step", **reference.CONSTANTS[s.name]) for s in SPECS if "bias" in READS[s.name]]
RATES = {"adadelta": 10.0, "ftrl": 0.3, "group_ftrl": 0.3}
FEW = not embedding_reference.JIT


class Rows:
    """Rows side by side in one array, as the kernels see them; gradients lie in a wider matrix."""

    def __init__(self, spec, weights):
        self.spec, self.optimizer = spec, optimizer_of(spec)
        n, self.dim = weights.shape
        self.hyper = self.optimizer.hyper(spec)
        self.memory = np.empty((n, self.dim + self.optimizer.state_columns(self.dim)), np.float32)
        self.weights, self.state = self.memory[:, : self.dim], self.memory[:, self.dim :]
        self.weights[:] = weights
        self.state[:] = self.optimizer.initial_state(spec, self.dim)

    def push(self, gradients, rate, step=1, rows=None, skip=()):
        rows = np.arange(len(gradients)) if rows is None else np.asarray(rows)
        wide = np.full((len(gradients), self.dim + 3), np.float32(np.nan))
        wide[:, : self.dim] = gradients
        weights = (address_of(self.memory) + rows * self.memory.strides[0]).astype(np.int64)
        states = weights + 4 * self.dim
        weights[list(skip)] = 0
        scratch = np.empty((len(gradients), self.dim), np.float32)
        needed = passes(self.spec)
        update_rows(
            self.optimizer.update.address,
            needed,
            address_of(weights),
            address_of(states),
            len(gradients),
            address_of(wide),
            wide.strides[0],
            self.dim,
            float(rate),
            step,
            address_of(self.hyper),
            address_of(scratch) if needed & BEFORE else 0,
        )
        assert np.array_equal(wide[:, : self.dim], gradients)


def some(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def rate_of(spec):
    return RATES.get(spec.name, 0.05)


def test_every_optimizer_is_in_all_tables():
    assert set(OPTIMIZERS) == set(READS) == set(reference.CONSTANTS)
    assert all(optimizer.name == name for name, optimizer in OPTIMIZERS.items())


@pytest.mark.parametrize("spec", SPECS + BY_STEP, ids=lambda spec: f"{spec.name}-{spec.bias}")
@pytest.mark.parametrize("dim", [1, 3, 16, 70, 200])
def test_equals_the_float32_twin_to_the_bit(spec, dim):
    rng = np.random.default_rng(dim)
    rows = Rows(spec, rng.normal(size=(5, dim)) * [[0], [0.01], [1], [1], [100]])
    weights, state = rows.weights.copy(), rows.state.copy()
    for step in range(1, 4 if FEW else 31):
        gradients = rng.normal(size=(5, dim)).astype(np.float32) * np.float32(10.0 ** rng.integers(-6, 4))
        gradients[step % 5] = 0
        gradients[:, step % dim] = 0
        rows.push(gradients, rate_of(spec), step)
        for i in range(5):
            reference.twin(spec, weights[i], state[i], gradients[i], rate_of(spec), step)
    assert np.isfinite(rows.memory).all()
    assert rows.weights.tobytes() == weights.tobytes()
    assert rows.state.tobytes() == state.tobytes()


@each
def test_equals_the_papers_formula_over_200_steps(spec):
    rows = Rows(spec, some(5, 1, 8))
    formula, weights = reference.Formula(spec, 8), rows.weights[0].astype(np.float64)
    moved = weights.copy()
    for step in range(1, 201):
        gradient = some(step, 1, 8)
        rows.push(gradient, rate_of(spec) / 5, step)
        weights = formula.step(weights, gradient[0].astype(np.float64), rate_of(spec) / 5)
        np.testing.assert_allclose(rows.weights[0], weights, rtol=0, atol=1e-5)
    assert np.abs(weights - moved).max() > 0.02


TORCH = {
    "sgd": lambda torch, s: (torch.optim.SGD, {}),
    "momentum": lambda torch, s: (torch.optim.SGD, {"momentum": s.momentum}),
    "nesterov": lambda torch, s: (torch.optim.SGD, {"momentum": s.momentum, "nesterov": True}),
    "adagrad": lambda torch, s: (torch.optim.Adagrad, {"initial_accumulator_value": s.initial, "eps": s.epsilon}),
    "rmsprop": lambda torch, s: (torch.optim.RMSprop, {"alpha": s.rho, "eps": s.epsilon}),
    "decayed_adagrad": lambda torch, s: (torch.optim.RMSprop, {"alpha": s.rho, "eps": s.epsilon}),
    "adadelta": lambda torch, s: (torch.optim.Adadelta, {"rho": s.rho, "eps": s.epsilon}),
    "adam": lambda torch, s: (torch.optim.Adam, {"betas": (s.beta1, s.beta2), "eps": s.epsilon}),
    "adamw": lambda torch, s: (
        torch.optim.AdamW,
        {"betas": (s.beta1, s.beta2), "eps": s.epsilon, "weight_decay": s.decay},
    ),
    "amsgrad": lambda torch, s: (
        torch.optim.AdamW,
        {"betas": (s.beta1, s.beta2), "eps": s.epsilon, "weight_decay": s.decay, "amsgrad": True},
    ),
}


@pytest.mark.torch
# PyTorch has one weight_decay: decoupled decay in adamw and amsgrad, L2 elsewhere
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("name", TORCH)
def test_equals_pytorch_over_200_steps(name, l2):
    torch = pytest.importorskip("torch", reason="torch is not installed: make setup-torch")
    spec = OptimizerSpec(name, l2=l2, **reference.CONSTANTS[name])
    kind, constants = TORCH[name](torch, spec)
    if l2 and "weight_decay" in constants:
        l2, spec = 0.0, OptimizerSpec(name, **reference.CONSTANTS[name] | {"decay": 0.3})
        kind, constants = TORCH[name](torch, spec)
    constants = {"weight_decay": l2} | constants
    rows = Rows(spec, some(6, 1, 8))
    parameter = torch.nn.Parameter(torch.from_numpy(rows.weights[0].copy()))
    other = kind([parameter], lr=0.01, **constants)
    for step in range(1, 201):
        gradient = some(step, 1, 8)
        rows.push(gradient, 0.01, step)
        parameter.grad = torch.from_numpy(gradient[0].copy())
        other.step()
        np.testing.assert_allclose(rows.weights[0], parameter.detach().numpy(), rtol=0, atol=1e-5)


FULL = {"l1": 0.01, "clip_value": 1.5, "clip_norm": 3.0, "lower": -0.9, "upper": 1.1}


@each
@pytest.mark.parametrize("more", [{}, FULL], ids=["plain", "with all passes"])
def test_the_split_into_runs_changes_no_bit(spec, more):
    spec = OptimizerSpec(spec.name, **(reference.CONSTANTS[spec.name] | more))
    start = some(1, 7, 33)
    whole, split = Rows(spec, start), Rows(spec, start)
    for step in range(1, 6):
        gradients = some(step, 7, 33)
        whole.push(gradients, 0.1, step)
        order = np.random.default_rng(step).permutation(7)
        for part in (order[:1], order[1:1], order[1:4], order[4:]):
            split.push(gradients[part], 0.1, step, rows=part)
    assert whole.memory.tobytes() == split.memory.tobytes()


@each
def test_a_wide_row_is_many_narrow_ones_unless_it_has_norms(spec):
    wide, narrow = Rows(spec, some(1, 1, 24)), Rows(spec, some(1, 24, 1))
    for step in range(1, 6):
        gradient = some(step, 1, 24)
        wide.push(gradient, 0.1, step)
        narrow.push(gradient.reshape(24, 1), 0.1, step)
    same = np.ascontiguousarray(wide.weights).tobytes() == np.ascontiguousarray(narrow.weights).tobytes()
    assert same is not optimizer_of(spec).norms


@each
def test_goes_down_a_parabola(spec):
    spec = OptimizerSpec(spec.name)  # L1 and the like would end elsewhere
    rows = Rows(spec, some(0, 3, 4))
    start = np.abs(rows.weights).max()
    rate = 20.0 if spec.name == "adadelta" else 0.05
    for step in range(1, 61 if FEW else 401):
        rows.push(rows.weights.copy(), rate, step)
    assert np.abs(rows.weights).max() < (0.9 if FEW else 0.2) * start


@each
def test_a_zero_gradient_leaves_a_fresh_row_and_address_0_is_skipped(spec):
    constants = {k: v for k, v in reference.CONSTANTS[spec.name].items() if k != "decay"}
    rows = Rows(OptimizerSpec(spec.name, **constants), some(0, 4, 6))
    before = rows.memory.copy()
    rows.push(np.zeros((4, 6), np.float32), 0.1)
    assert rows.weights.tobytes() == np.ascontiguousarray(before[:, :6]).tobytes()
    before = rows.memory.copy()
    rows.push(some(1, 4, 6), 0.1, skip=(0, 1, 3))
    changed = (rows.memory != before).any(axis=1)
    assert changed.tolist() == [False, False, True, False]


@each
def test_a_restore_in_mid_run_changes_no_bit(spec):
    quiet, saved = Rows(spec, some(2, 3, 5)), Rows(spec, some(2, 3, 5))
    for step in range(1, 9):
        if step == 5:  # what a checkpoint holds: weights and state, as bytes
            image = saved.memory.tobytes()
            saved = Rows(spec, np.zeros((3, 5)))
            saved.memory[:] = np.frombuffer(image, np.float32).reshape(3, -1)
        for rows in (quiet, saved):
            rows.push(some(step, 3, 5), 0.1, step)
    assert quiet.memory.tobytes() == saved.memory.tobytes()


@pytest.mark.parametrize("name", ["ftrl", "group_ftrl"])
def test_ftrl_starts_from_the_first_weights_and_a_tiny_rate_changes_nothing(name):
    spec = OptimizerSpec(name, **reference.CONSTANTS[name])
    rows = Rows(spec, some(3, 1, 6))
    first = rows.weights.copy()
    for rate in (0.0, -1.0, 1e-16):
        rows.push(some(4, 1, 6), rate)
    assert rows.weights.tobytes() == first.tobytes()
    rows.push(some(4, 1, 6, scale=1e-4), 0.1)
    assert 0 < np.abs(rows.weights - first).max() < 1e-3


@pytest.mark.parametrize("name", ["ftrl", "group_ftrl"])
def test_ftrl_makes_weights_zero(name):
    rows = Rows(OptimizerSpec(name, l1=1.0, **({"l21": 1.0} if "group" in name else {})), np.zeros((2, 4)))
    signal = np.array([[3, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.05]], np.float32)
    for step in range(1, 11):
        rows.push(signal, 0.1, step)
    assert rows.weights[0, 0] < 0
    assert not rows.weights[0, 1:].any()
    assert not rows.weights[1].any()


def test_group_ftrl_removes_a_row_that_ftrl_keeps():
    gradient = np.full((1, 16), 0.3, np.float32)
    kept, gone = (
        Rows(OptimizerSpec("ftrl"), np.zeros((1, 16))),
        Rows(OptimizerSpec("group_ftrl", l21=2), np.zeros((1, 16))),
    )
    for rows in (kept, gone):
        rows.push(gradient, 0.1)
    assert kept.weights.all()
    assert not gone.weights.any()


@pytest.mark.parametrize("width", [1, 8, 15, 16, 17, 63, 64, 65, 130, 1000])
def test_the_order_of_a_sum_of_squares(width):
    x = some(width, width + 1)
    assert sum_squares(address_of(x), width) == reference.sum_squares(x[:width])
    assert sum_squares(address_of(x), width) == pytest.approx(np.sum(x[:width].astype(np.float64) ** 2), rel=1e-6)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 1000, 123456])
def test_powers_are_repeated_squaring(exponent):
    assert powers(0.999, 0.9, exponent) == (reference.power(0.999, exponent), reference.power(0.9, exponent))
    assert powers(0.999, 0.0, exponent) == (pytest.approx(0.999**exponent, rel=1e-9), 0.0**exponent)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(InvalidArgument, match=r"did you mean 'adagrad'.*choose one of adadelta, adagrad, adam"):
        optimizer_of(OptimizerSpec("Adagrid"))
    with pytest.raises(InvalidArgument, match="'zzz' is unknown; choose one of"):
        optimizer_of(OptimizerSpec("zzz"))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"name": "adam", "l21": 0.1}, "'adam' does not use l21 = 0.1: leave it out, or choose one of group_ftrl"),
        ({"name": "adam", "decay": 0.1}, "'adam' does not use decay = 0.1: leave it out, or choose 'adamw'"),
        ({"name": "sgd", "beta1": 0.5}, "'sgd' does not use beta1"),
        ({"name": "ftrl", "decay": 0.1}, "'ftrl' does not use decay"),
        ({"name": "adagrad", "bias": "step"}, "'adagrad' does not use bias"),
        ({"name": "adagrad", "epsilon": 0, "initial": 0}, "would divide 0 by 0"),
        ({"name": "adam", "epsilon": 1e-50}, "would divide 0 by 0"),
        ({"name": "adam", "beta1": 1}, r"beta1 = 1: give a number in \[0, 1\)"),
        ({"name": "momentum", "momentum": -0.1}, r"momentum = -0.1: give a number in \[0, 1\)"),
        ({"name": "sgd", "l1": -1}, "l1 = -1: give a number >= 0"),
        ({"name": "sgd", "l1": 1e300}, "l1 = 1e.300: give a number of at most"),
        ({"name": "sgd", "l2": float("nan")}, "l2 = nan: give a finite number"),
        ({"name": "sgd", "l2": True}, "l2 = True: give a finite number"),
        ({"name": "sgd", "l2": None}, "l2 = None: give a finite number"),
        ({"name": "sgd", "lower": "0"}, "lower = '0': give a finite number"),
        ({"name": "sgd", "lower": 1, "upper": 0}, "lower = 1 is above upper = 0"),
        ({"name": "ftrl", "beta": 0}, "beta = 0: give a float32 above 0"),
        ({"name": "adam", "bias": "column"}, "bias = 'column': choose one of row, step"),
        ({"name": "adam", "bias": ["row"]}, "choose one of row, step"),
        ({"name": 3}, "optimizer.name = 3: give a string"),
        ({"name": "sgd", "schedule": 3}, "optimizer.schedule: expected an object, got int"),
        ({"name": "sgd", "schedule": {"warmup": 3}}, "optimizer.schedule: unknown field 'warmup'; known: divide, "),
    ],
)
def test_a_constant_that_does_not_fit_is_refused_by_name(values, match):
    with pytest.raises(InvalidArgument, match=match):
        OptimizerSpec(**values)


@each
def test_a_spec_comes_back_from_json_and_an_older_one_is_understood(spec):
    table = TableSpec("t", 4, spec)
    assert table_from_json(json.loads(json.dumps(to_json(table)))) == table
    old = {"name": "t", "dim": 4, "optimizer": {"name": spec.name, **reference.CONSTANTS[spec.name]}}
    assert table_from_json(old) == table
    with pytest.raises(InvalidArgument, match="unknown field 'gamma'"):
        table_from_json(old | {"optimizer": {"name": spec.name, "gamma": 1}})
