# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious twins: every kernel in plain numpy, and whole graphs in float64 numpy or PyTorch.

Loaded by the ``reference`` fixture of conftest.py. Twins of kernels take the columns meant, not buffers.
"""

from typing import Any

import numpy as np

from oarlock.nn import (
    Linear,
    Model,
    Node,
    add,
    binary_cross_entropy,
    columns,
    concat,
    dense_input,
    field_columns,
    interactions,
    lookup,
    multiply,
    pool,
    relu,
    sigmoid,
    tanh,
)
from oarlock.nn.graph import Dropout, FieldRange, Fields, Lookup, Range, topological

Array = np.ndarray[Any, Any]


def gather(rows: Array, inverse: Array, start: int, width: int) -> Array:
    whole = np.stack([np.concatenate([rows[k] for k in line]) for line in inverse])
    return whole[:, start : start + width]


def segment_sum(gradient: Array, inverse: Array, start: int, out: Array) -> Array:
    out = out.copy()
    dim = out.shape[1]
    for i, line in enumerate(inverse):
        for c in range(gradient.shape[1]):
            field, column = divmod(start + c, dim)
            out[line[field], column] += gradient[i, c]
    return out


def tiled_sum(gradient: Array, tile: int) -> Array:
    out = np.zeros(gradient.shape[1], np.float32)
    for begin in range(0, len(gradient), tile):
        part = np.zeros(gradient.shape[1], np.float32)
        for line in gradient[begin : begin + tile]:
            part = part + line
        out = out + part
    return out


def lower_pairs(vectors: Array) -> Array:
    """Dot products of ``float32[batch, V, dim]`` in the order (1, 0), (2, 0), (2, 1), ..."""
    count = vectors.shape[1]
    places = [(i, j) for i in range(count) for j in range(i)]
    return np.stack([(vectors[:, i] * vectors[:, j]).sum(axis=1) for i, j in places], axis=1)


def mix64(x: int) -> int:
    word = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ x >> 27) * 0x94D049BB133111EB & word
    return x ^ x >> 31


def dropout_factors(shape: tuple[int, int], rate: float, seed: int, step: int, layer: int) -> Array:
    """Return what a dropout multiplies with, value by value: 0 or 1 / (1 - rate)."""
    word = 2**64 - 1
    key = mix64(mix64(mix64(seed ^ 0x3243F6A8885A308D) + step & word) + layer & word)
    draws = [mix64(key + n * 0x9E3779B97F4A7C15 & word) >> 32 for n in range(shape[0] * shape[1])]
    kept = np.array(draws, np.uint64).reshape(shape) >= round(rate * 2**32)
    return kept / (1 - rate)


def logistic(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z.astype(np.float64)))


def cross_entropy(z: Array, y: Array) -> Array:
    z = z.astype(np.float64)
    return np.logaddexp(0, z) - z * y


class NumpyMath:
    """The operations of a graph in float64 numpy."""

    def array(self, value: Array) -> Any:
        return np.asarray(value, np.float64)

    def lookup(self, rows: Any, inverse: Array) -> Any:
        return rows[inverse].reshape(len(inverse), -1)

    def concat(self, parts: list[Any]) -> Any:
        return np.concatenate(parts, axis=1)

    def relu(self, value: Any) -> Any:
        return np.maximum(value, 0)

    def sigmoid(self, value: Any) -> Any:
        return logistic(value)

    def tanh(self, value: Any) -> Any:
        return np.tanh(value)

    def cross_entropy(self, z: Any, y: Any) -> Any:
        return cross_entropy(z[:, 0], y).mean()


class TorchMath:
    """The operations of a graph in float64 PyTorch, for its autograd."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def array(self, value: Array) -> Any:
        return self.torch.tensor(np.asarray(value, np.float64))

    def lookup(self, rows: Any, inverse: Array) -> Any:
        return rows[self.torch.tensor(inverse.astype(np.int64))].reshape(len(inverse), -1)

    def concat(self, parts: list[Any]) -> Any:
        return self.torch.cat(parts, dim=1)

    def relu(self, value: Any) -> Any:
        return self.torch.relu(value)

    def sigmoid(self, value: Any) -> Any:
        return self.torch.sigmoid(value)

    def tanh(self, value: Any) -> Any:
        return self.torch.tanh(value)

    def cross_entropy(self, z: Any, y: Any) -> Any:
        return self.torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], y)


def evaluate(
    model: Model, math: Any, parameters: Any, rows: Any, feeds: dict[str, Any], draw: tuple[int, int] | None = None
) -> tuple[Any, Any]:
    """Return (loss, score) of the whole graph; ``parameters`` and ``rows`` are arrays of ``math``.

    ``draw``: the (seed, step) of what dropout drops; without it nothing is dropped.
    """
    values: dict[Node, Any] = {}
    dropouts = [node for node in topological(model.loss) if node.operation == "dropout"]
    for node in topological(model.loss, model.score):
        inputs = [values[child] for child in node.inputs]
        detail = node.detail
        if isinstance(detail, Lookup):
            values[node] = math.lookup(rows[detail.name], feeds[detail.name][1])
        elif node.operation == "dense_input":
            values[node] = math.array(feeds[node.name])
        elif isinstance(detail, Linear):
            out = inputs[0] @ parameters[f"{detail.name}.weight"]
            if detail.bias:
                out = out + parameters[f"{detail.name}.bias"]
            values[node] = getattr(math, detail.activation)(out) if detail.activation else out
        elif isinstance(detail, Range):
            values[node] = inputs[0][:, detail.start : detail.stop]
        elif isinstance(detail, Dropout):
            values[node] = inputs[0]
            if draw is not None:
                shape = (len(inputs[0]), node.width)
                values[node] = inputs[0] * math.array(dropout_factors(shape, detail.rate, *draw, dropouts.index(node)))
        elif isinstance(detail, FieldRange):
            source = node.inputs[0].detail
            assert isinstance(source, Lookup)
            starts = [field * source.dim for field in range(source.fields)]
            values[node] = math.concat([inputs[0][:, s + detail.start : s + detail.stop] for s in starts])
        elif node.operation == "pool":
            assert isinstance(detail, Fields)
            values[node] = inputs[0].reshape(len(inputs[0]), detail.count, -1).sum(1)
        elif node.operation == "interactions":
            assert isinstance(detail, Fields)
            dim = node.inputs[-1].width // detail.count
            whole = math.concat(inputs)
            vectors = [whole[:, s : s + dim] for s in range(0, whole.shape[1], dim)]
            places = [(i, j) for i in range(len(vectors)) for j in range(i)]
            values[node] = math.concat([(vectors[i] * vectors[j]).sum(1)[:, None] for i, j in places])
        elif node.operation == "concat":
            values[node] = math.concat(inputs)
        elif node.operation == "multiply":
            values[node] = inputs[0] * inputs[1]
        elif node.operation == "add":
            values[node] = inputs[0] + inputs[1]
        elif node.operation == "binary_cross_entropy":
            values[node] = math.cross_entropy(inputs[0], math.array(feeds[model.label]))
        else:
            values[node] = getattr(math, node.operation)(inputs[0])
    return values[model.loss], values[model.score][:, 0]


def neumf() -> Model:
    """Return NeuMF with 8 factors: a product of 8 columns beside a tower over the other 32 of user and item."""
    user = lookup("user", table="user", dim=40)
    item = lookup("item", table="item", dim=40)
    product = multiply(columns(user, 0, 8), columns(item, 0, 8))
    hidden = concat([columns(user, 8, 40), columns(item, 8, 40)])
    for number, units in enumerate((32, 16, 8), 1):
        hidden = Linear(units, activation="relu", name=f"fc{number}")(hidden)
    logit = Linear(1, name="out")(concat([product, hidden]))
    return Model(score=logit, loss=binary_cross_entropy(logit, label="label"))


def random_model(seed: int) -> Model:
    """Return a graph that mixes everything: fields, reuse, slices of slices, nested concats, shared layers."""
    rng = np.random.default_rng(seed)
    made = [
        lookup("a", table="t", dim=6),
        lookup("b", table="t", dim=6, fields=3),
        lookup("c", table="u", dim=5),
        dense_input("x", width=7),
    ]
    shared = Linear(4, activation="tanh", name="shared")
    shared_width = 0
    used: set[Node] = set()
    activations = (None, "relu", "sigmoid", "tanh")

    def pick() -> Node:
        node = made[int(rng.integers(len(made)))]
        used.add(node)
        return node

    def cut(node: Node, width: int) -> Node:
        start = int(rng.integers(node.width - width + 1))
        return columns(node, start, start + width)

    for number in range(int(rng.integers(6, 18))):
        kind = int(rng.integers(10))
        node = pick()
        if kind == 0:
            made.append(cut(node, int(rng.integers(1, node.width + 1))))
        elif kind == 1:
            made.append(concat([pick() for _ in range(int(rng.integers(1, 4)))]))
        elif kind in (2, 3):
            other = pick()
            width = min(node.width, other.width)
            a = node if node.width == width else cut(node, width)
            b = other if other.width == width else cut(other, width)
            made.append((multiply if kind == 2 else add)(a, b))
        elif kind == 4:
            made.append((relu, sigmoid, tanh)[int(rng.integers(3))](node))
        elif kind == 5:
            units = int(rng.integers(1, 9))
            activation = activations[int(rng.integers(4))]
            made.append(Linear(units, activation=activation, bias=bool(rng.integers(4)), name=f"fc{number}")(node))
        elif kind == 7:
            source = made[int(rng.integers(3))]
            used.add(source)
            assert isinstance(source.detail, Lookup)
            start = int(rng.integers(source.detail.dim))
            made.append(field_columns(source, start, int(rng.integers(start + 1, source.detail.dim + 1))))
        elif kind == 8:
            made.append(pool(node, max(n for n in (1, 2, 3, 7) if node.width % n == 0)))
        elif kind == 9:
            dim = max(n for n in (1, 2, 3, 5, 6) if node.width % n == 0)
            other = next((one for one in reversed(made) if one.width >= dim), None)
            if other is not None and node.width <= 8 * dim:
                used.add(other)
                made.append(interactions(other if other.width == dim else cut(other, dim), node))
        elif not shared_width or node.width >= shared_width:
            shared_width = shared_width or node.width
            made.append(shared(node if node.width == shared_width else cut(node, shared_width)))
    loose = [node for node in made if node not in used]
    logit = Linear(1, name="out")(concat(loose or [made[-1]]))
    rest = [node for node in made[:4] if node not in topological(logit)]
    if rest:
        logit = add(logit, Linear(1, bias=False, name="rest")(concat(rest)))
    score = sigmoid(logit) if rng.integers(2) else logit
    return Model(score=score, loss=binary_cross_entropy(logit, label="label"))


def make_feeds(model: Model, batch: int, seed: int, rows: int = 9) -> dict[str, Any]:
    """Return seeded feeds for ``batch`` samples; every lookup has ``rows`` rows, some of them perhaps unused."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {model.label: rng.random(batch, dtype=np.float32)}
    for spec in model.lookups:
        shape = (batch, spec.fields) if spec.fields > 1 else (batch,)
        values = rng.standard_normal((rows, spec.dim), dtype=np.float32)
        feeds[spec.name] = (values, rng.integers(0, rows, shape).astype(np.int32))
    for entry in model.dense_inputs:
        feeds[entry.name] = rng.standard_normal((batch, entry.width), dtype=np.float32)
    return feeds


def fill(program: Any, seed: int, scale: float = 0.4) -> None:
    """Give a program seeded parameters."""
    rng = np.random.default_rng(seed)
    program.flat_parameters[:] = scale * rng.standard_normal(program.flat_parameters.shape)
