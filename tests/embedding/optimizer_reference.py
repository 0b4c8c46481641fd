# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious twins of all optimizers and of the passes around them, written from the table of formulas.

``twin`` does one step of one row in numpy's float32, in the kernels' order of operations, and is compared bit for bit.
``Formula`` does it in float64 from the papers, with a state of its own. Loaded by conftest. No state.
"""

import numpy as np

f = np.float32

# An interesting spec of every optimizer: constants off their defaults. A new optimizer needs its row here.
CONSTANTS = {
    "sgd": {},
    "momentum": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8},
    "dcasgd": {"delay": 0.3},
    "adagrad": {"initial": 0.2, "epsilon": 1e-6},
    "rowwise_adagrad": {"initial": 0.2, "epsilon": 1e-6},
    "decayed_adagrad": {"rho": 0.8, "epsilon": 1e-6},
    "rmsprop": {"rho": 0.95, "epsilon": 1e-6},
    "adadelta": {"rho": 0.8, "epsilon": 1e-6},
    "adam": {"beta1": 0.8, "beta2": 0.99},
    "adamw": {"beta1": 0.8, "beta2": 0.99, "decay": 0.1},
    "amsgrad": {"beta1": 0.8, "beta2": 0.99, "decay": 0.1},
    "lamb": {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "decay": 0.1},
    "ftrl": {"beta": 0.5, "l1": 0.5, "l2": 0.1},
    "group_ftrl": {"beta": 0.5, "l1": 0.2, "l2": 0.1, "l21": 0.1},
}


def sum_squares(x):
    """The float64 sum in parts of 64 columns, each a tree of float32 sums."""
    total = 0.0
    for start in range(0, len(x), 64):
        part = np.zeros(64, f)
        piece = x[start : start + 64]
        part[: len(piece)] = piece * piece
        a, b, c, d = part.reshape(4, 16)
        sums = (a + b) + (c + d)
        while len(sums) > 1:
            half = len(sums) // 2
            sums = sums[:half] + sums[half:]
        total += float(sums[0])
    return total


def power(base, exponent):
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def soft(x, bound):
    return np.where(x > bound, x - bound, np.where(x < -bound, x + bound, f(0)))


def away(x, bound):
    return np.where(x > 0, x + bound, np.where(x < 0, x - bound, f(0)))


def twin(spec, w, state, g, rate, step):
    """Change weights and state of one row in place: one step, in the kernels' order of operations."""
    g = prepare(spec, w, g, rate)
    d, size, eps, name = len(w), f(rate), f(spec.epsilon), spec.name
    a = state[:d]
    if name == "sgd":
        w -= size * g
    elif name in ("momentum", "nesterov"):
        a[:] = f(spec.momentum) * a + g
        w -= size * (a if name == "momentum" else g + f(spec.momentum) * a)
    elif name == "dcasgd":
        after = w - size * (g + f(spec.delay) * g * g * a)
        a[:] = after - w
        w[:] = after
    elif name == "adagrad":
        a += g * g
        w -= size * g / (np.sqrt(a) + eps)
    elif name == "rowwise_adagrad":
        state[0] += f(sum_squares(g) * (1.0 / d))
        w -= size / (np.sqrt(state[0]) + eps) * g
    elif name in ("decayed_adagrad", "rmsprop"):
        a[:] = f(spec.rho) * a + f(1 - spec.rho) * g * g
        w -= size * g / (np.sqrt(a) + eps)
    elif name == "adadelta":
        b = state[d:]
        a[:] = f(spec.rho) * a + f(1 - spec.rho) * g * g
        h = np.sqrt(b + eps) / np.sqrt(a + eps) * g
        b[:] = f(spec.rho) * b + f(1 - spec.rho) * h * h
        w -= size * h
    elif name in ("adam", "adamw", "amsgrad", "lamb"):
        adam(spec, w, state, g, rate, step)
    elif name in ("ftrl", "group_ftrl"):
        ftrl(spec, w, state, g, rate)
    else:
        raise AssertionError(f"no twin of {name}")
    finish(spec, w, rate)


def adam(spec, w, state, g, rate, step):
    d = len(w)
    m, v = state[:d], state[d : 2 * d]
    if spec.bias == "row":
        state[-1] += f(1)
        step = int(state[-1])
    power1, power2 = power(spec.beta1, step), power(spec.beta2, step)
    m += (g - m) * f(1 - spec.beta1)
    v[:] = v * f(spec.beta2) + f(1 - spec.beta2) * g * g
    root, eps = f(np.sqrt(1 - power2)), f(spec.epsilon)
    if spec.name == "lamb":
        u = f(1.0 / (1 - power1)) * m / (np.sqrt(v) / root + eps) + f(spec.decay) * w
        mine, theirs = sum_squares(w), sum_squares(u)
        ratio = rate * np.sqrt(mine) / np.sqrt(theirs) if mine > 0 and theirs > 0 else rate
        w -= f(ratio) * u
        return
    if spec.name == "amsgrad":
        x = state[2 * d : 3 * d]
        x[:] = np.maximum(x, v)
        v = x
    decay = spec.decay if spec.name != "adam" else 0.0
    w[:] = w * f(1 - rate * decay) - f(rate / (1 - power1)) * m / (np.sqrt(v) / root + eps)


def ftrl(spec, w, state, g, rate):
    d = len(w)
    z, n = state[:d], state[d:]
    alpha, beta, l1, l2 = f(rate), f(spec.beta), f(spec.l1), f(spec.l2)
    start = beta / alpha + l2
    after = n + g * g
    both = np.sqrt(after) + np.sqrt(n)
    grown = g * g / np.where(both > 0, both, f(1))
    if spec.name == "ftrl":
        seen = after > 0
        new = np.where(n > 0, z, away(-w * start, l1)) + (g - grown / alpha * w)
        moved = -soft(new, l1) / ((beta + np.sqrt(after)) / alpha + l2)
        z[:] = np.where(seen, new, z)
        w[:] = np.where(seen, moved, w)
        n[:] = after
        return
    if not after.any():
        return
    group = spec.l21 * np.sqrt(float(d))
    if not n.any():
        total = sum_squares(w * start)
        scale = f(1 + group / np.sqrt(total)) if total > 0 else f(1)
        z[:] = away(-w * start * scale, l1)
    z += g - grown / alpha * w
    n[:] = after
    norm = np.sqrt(sum_squares(soft(z, l1)))
    scale = f(1 - group / norm) if norm > group else f(0)
    w[:] = -soft(z, l1) * scale / ((beta + np.sqrt(n)) / alpha + l2)


def prepare(spec, w, g, rate):
    """Return the gradient that the optimizer sees; decay the weights where that is not in the optimizer's formula."""
    g = g.astype(f)
    if spec.clip_value:
        g = np.minimum(np.maximum(g, f(-spec.clip_value)), f(spec.clip_value))
    if spec.clip_norm:
        norm = np.sqrt(sum_squares(g))
        if norm > spec.clip_norm:
            g = g * f(spec.clip_norm / norm)
    if spec.l2 and "ftrl" not in spec.name:
        g = g + f(spec.l2) * w
    if spec.decay and spec.name not in ("adamw", "amsgrad", "lamb"):
        w *= f(1 - rate * spec.decay)
    return g


def finish(spec, w, rate):
    if spec.l1 and "ftrl" not in spec.name:
        w[:] = soft(w, f(rate * spec.l1))
    if spec.lower is not None:
        w[:] = np.maximum(w, f(spec.lower))
    if spec.upper is not None:
        w[:] = np.minimum(w, f(spec.upper))


class Formula:
    """The papers' formulas in float64: ``step`` returns the weights after a gradient; t counts from 1."""

    def __init__(self, spec, dim):
        self.spec, self.t = spec, 0
        self.a = np.zeros(dim)
        self.b = np.zeros(dim)
        self.x = np.zeros(dim)
        if spec.name in ("adagrad", "rowwise_adagrad"):
            self.a += spec.initial

    def step(self, w, g, rate):
        self.t += 1
        return getattr(self, "_" + self.spec.name)(w, g, rate)

    def _sgd(self, w, g, rate):
        return w - rate * g

    def _momentum(self, w, g, rate):
        self.a = self.spec.momentum * self.a + g
        return w - rate * self.a

    def _nesterov(self, w, g, rate):
        self.a = self.spec.momentum * self.a + g
        return w - rate * (g + self.spec.momentum * self.a)

    def _dcasgd(self, w, g, rate):
        backup = self.x if self.t > 1 else w  # the weights before the previous update
        self.x = w
        return w - rate * (g + self.spec.delay * g * g * (w - backup))

    def _adagrad(self, w, g, rate):
        self.a = self.a + g**2
        return w - rate * g / (np.sqrt(self.a) + self.spec.epsilon)

    def _rowwise_adagrad(self, w, g, rate):
        self.a = self.a + np.mean(g**2)
        return w - rate * g / (np.sqrt(self.a) + self.spec.epsilon)

    def _decayed_adagrad(self, w, g, rate):
        self.a = self.spec.rho * self.a + (1 - self.spec.rho) * g**2
        return w - rate * g / (np.sqrt(self.a) + self.spec.epsilon)

    _rmsprop = _decayed_adagrad

    def _adadelta(self, w, g, rate):
        rho, eps = self.spec.rho, self.spec.epsilon
        self.a = rho * self.a + (1 - rho) * g**2
        change = np.sqrt(self.b + eps) / np.sqrt(self.a + eps) * g
        self.b = rho * self.b + (1 - rho) * change**2
        return w - rate * change

    def _direction(self, g):
        beta1, beta2 = self.spec.beta1, self.spec.beta2
        self.a = beta1 * self.a + (1 - beta1) * g
        self.b = beta2 * self.b + (1 - beta2) * g**2
        self.x = np.maximum(self.x, self.b)
        square = self.x if self.spec.name == "amsgrad" else self.b
        return self.a / (1 - beta1**self.t) / (np.sqrt(square / (1 - beta2**self.t)) + self.spec.epsilon)

    def _adam(self, w, g, rate):
        return w - rate * self._direction(g)

    def _adamw(self, w, g, rate):
        return w - rate * self.spec.decay * w - rate * self._direction(g)

    _amsgrad = _adamw

    def _lamb(self, w, g, rate):
        u = self._direction(g) + self.spec.decay * w
        return w - rate * np.linalg.norm(w) / np.linalg.norm(u) * u

    def _closed_form(self, rate, n, z):
        spec = self.spec
        s = np.sign(z) * np.maximum(np.abs(z) - spec.l1, 0)
        if spec.name == "group_ftrl":
            norm, group = np.linalg.norm(s), spec.l21 * np.sqrt(len(s))
            s = s * (1 - group / norm) if norm > group else 0 * s
        return -s / ((spec.beta + np.sqrt(n)) / rate + spec.l2)

    def _ftrl(self, w, g, rate):
        spec = self.spec
        if self.t == 1:  # the z from which the closed form gives the first weights
            s = -w * (spec.beta / rate + spec.l2)
            if spec.name == "group_ftrl" and s.any():
                s = s * (1 + spec.l21 * np.sqrt(len(s)) / np.linalg.norm(s))
            self.a = s + np.sign(s) * spec.l1
            np.testing.assert_allclose(self._closed_form(rate, self.b, self.a), w, rtol=0, atol=1e-12)
        after = self.b + g**2
        self.a = self.a + g - (np.sqrt(after) - np.sqrt(self.b)) / rate * w
        self.b = after
        return self._closed_form(rate, self.b, self.a)

    _group_ftrl = _ftrl
