# SPDX-License-Identifier: Apache-2.0
import numpy as np
import optimizer_reference as reference
import pytest

from oarlock.embedding.optimizer_spec import OptimizerSpec
from oarlock.embedding.optimizers import OPTIMIZERS, optimizer_of
from oarlock.embedding.pointer import address_of
from oarlock.embedding.regularise import AFTER, BEFORE, after_update, before_update, passes, plain, update_rows

# one constant each, all of them, and the bounds on one side only
PASSES = {
    "clip value": {"clip_value": 0.5},
    "clip norm": {"clip_norm": 1.5},
    "l2": {"l2": 0.3},
    "decay": {"decay": 0.3},
    "l1": {"l1": 2.0},
    "lower": {"lower": -0.4},
    "upper": {"upper": 0.4},
    "all": {"clip_value": 0.9, "clip_norm": 1.5, "l2": 0.3, "decay": 0.2, "l1": 0.5, "lower": -0.8, "upper": 0.7},
}
each = pytest.mark.parametrize("constants", PASSES.values(), ids=PASSES)


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def step(spec, weights, state, gradients, rate, skip=-1):
    """One step of all rows, in place, the way a table makes it."""
    optimizer = optimizer_of(spec)
    hyper = optimizer.hyper(spec)
    n, dim = weights.shape
    rows = np.array([address_of(weights[i]) for i in range(n)], np.int64)
    states = np.array([address_of(state[i]) for i in range(n)], np.int64)
    rows[skip] = 0 if skip >= 0 else rows[skip]
    scratch = np.empty((n, dim), np.float32)
    update_rows(
        optimizer.update.address,
        passes(spec),
        address_of(rows),
        address_of(states),
        n,
        address_of(gradients),
        gradients.strides[0],
        dim,
        rate,
        1,
        address_of(hyper),
        address_of(scratch),
    )


@each
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dim", [1, 19])
def test_equals_the_twin_to_the_bit_around_every_optimizer(name, constants, dim):
    if name in ("adam", "ftrl", "group_ftrl"):
        constants = {k: v for k, v in constants.items() if k != "decay"}
    spec = OptimizerSpec(name, **constants)
    weights = some(1, 4, dim)
    state = np.array([optimizer_of(spec).initial_state(spec, dim)] * 4).reshape(4, -1)
    mine, others = (weights.copy(), state.copy()), (weights.copy(), state.copy())
    for i in range(3):
        gradients = some(i, 4, dim)
        before = gradients.copy()
        step(spec, *mine, gradients, 0.1, skip=2)
        assert gradients.tobytes() == before.tobytes()
        for row in (0, 1, 3):
            reference.twin(spec, others[0][row], others[1][row], gradients[row], 0.1, 1)
    assert mine[0].tobytes() == others[0].tobytes()
    assert mine[1].tobytes() == others[1].tobytes()


def test_each_pass_does_what_it_says():
    """In float64, from the definitions, with sgd between the passes."""
    for name, constants in PASSES.items():
        spec = OptimizerSpec("sgd", **constants)
        w, g = some(1, 3, 6), some(2, 3, 6)
        out = w.copy()
        step(spec, out, np.empty((3, 1), np.float32), g, 0.1)
        x, y = w.astype(np.float64), g.astype(np.float64)
        if spec.clip_value:
            y = np.clip(y, -spec.clip_value, spec.clip_value)
        if spec.clip_norm:
            norms = np.linalg.norm(y, axis=1, keepdims=True)
            assert (norms > spec.clip_norm).any(), "the test clips nothing"
            y = y * np.minimum(1, spec.clip_norm / norms)
        x = x * (1 - 0.1 * spec.decay) - 0.1 * (y + spec.l2 * x)
        x = np.sign(x) * np.maximum(np.abs(x) - 0.1 * spec.l1, 0)
        x = np.clip(x, spec.lower, spec.upper) if spec.lower is not None or spec.upper is not None else x
        np.testing.assert_allclose(out, x, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(out - (w - np.float32(0.1) * g)).max() > 1e-3, f"{name} does nothing"


def test_decay_comes_before_the_step_as_in_adamw():
    """adam's own formula and the pass agree: momentum 0 with the pass is sgd that decays first."""
    spec = OptimizerSpec("momentum", momentum=0.0, decay=0.5)
    w = np.full((1, 2), 2.0, np.float32)
    step(spec, w, np.zeros((1, 2), np.float32), np.full((1, 2), 1.0, np.float32), 0.1)
    np.testing.assert_allclose(w, 2.0 * 0.95 - 0.1, rtol=1e-6)


def test_which_specs_need_which_pass():
    assert all(plain(OptimizerSpec(name, **constants)) for name, constants in reference.CONSTANTS.items())
    for name in ("clip value", "clip norm", "l2", "decay"):
        assert passes(OptimizerSpec("sgd", **PASSES[name])) == BEFORE
    for name in ("l1", "lower", "upper"):
        assert passes(OptimizerSpec("sgd", **PASSES[name])) == AFTER
    assert passes(OptimizerSpec("sgd", **PASSES["all"])) == BEFORE | AFTER
    assert passes(OptimizerSpec("ftrl", l1=1, l2=1)) == 0
    assert passes(OptimizerSpec("sgd", lower=0.0)) == AFTER
    assert passes(OptimizerSpec("adamw", decay=0.1)) == passes(OptimizerSpec("lamb", decay=0.1)) == 0


def test_the_passes_alone():
    spec = OptimizerSpec("sgd", clip_norm=5.0, l1=1.0, upper=1.5)
    hyper = optimizer_of(spec).hyper(spec)
    g = np.array([[3, 4], [30, 40]], np.float32)
    w = np.array([[0.05, -2], [3, -0.1]], np.float32)
    rows = np.array([address_of(w[0]), address_of(w[1])], np.int64)
    out = np.empty((2, 2), np.float32)
    before_update(address_of(rows), 2, address_of(g), g.strides[0], 2, 0.1, address_of(hyper), address_of(out))
    assert out.tolist() == [[3, 4], [3, 4]]
    assert w.tolist() == np.array([[0.05, -2], [3, -0.1]], np.float32).tolist()
    after_update(address_of(rows), 2, 2, 0.1, address_of(hyper))
    np.testing.assert_allclose(w, [[0, -1.9], [1.5, 0]], rtol=1e-6)
