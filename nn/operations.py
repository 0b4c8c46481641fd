# SPDX-License-Identifier: Apache-2.0
"""What each kind of node does: one table of forward and backward, bound to strips by ``nn.layout``.

``backward`` reads ``step.gradient`` (which it may overwrite) and writes each of ``step.targets`` that is not None;
where gradients of several readers meet, the program adds them afterwards. An operation that only moves columns has no
backward: its gradient is routed. Invariant: no operation allocates, and none keeps anything between steps. To add one:
a row here, a function in ``nn.layers``, and its twin in the tests. Called by the one thread that runs the program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarlock.embedding.tile import ROWS
from oarlock.nn import kernels, mask_kernels, pair_tiles, pairs, row_kernels, tiled
from oarlock.nn.feeds import DenseFeed, LabelFeed, LookupFeed
from oarlock.nn.graph import Dropout, Fields, Linear, Node
from oarlock.nn.layout import Piece, Route, Strip

Array = np.ndarray[Any, Any]
Feed = LookupFeed | DenseFeed | LabelFeed


@dataclass
class Step:
    """One node, bound: where it reads and writes. Of ``targets``, ``routes`` and ``moves`` see ``nn.layout.Layout``.

    ``mask_key``: where a dropout's draws of this step begin; None while predicting, when nothing is dropped. ``tiled_forward``:
    whether what goes forward is made by ``nn.tiled`` or ``nn.pair_tiles``. Of a Linear ``tiled``: whether its gradients are made
    by ``nn.tiled``; ``prepared``: what its weight was made into for predictions, if it was; ``before``: the one with relu and
    bias whose gradient it alone writes; ``masked``: whether the one after it has written this one's gradient as it is before the
    relu, and the bias's.
    """

    node: Node
    inputs: list[Strip]
    output: Strip | None
    gradient: Strip | None
    targets: list[Strip | None]
    routes: list[Route]
    moves: list[tuple[Strip, Strip]]
    feed: Feed | None = None
    parameters: tuple[Array, ...] = ()
    gradients: tuple[Array, ...] = ()
    pieces: list[tuple[Piece, Strip, Strip | None]] = field(default_factory=list)
    mask_key: np.uint64 | None = None
    scratch: Array = field(default_factory=lambda: np.empty(0, np.float32))
    tiled_forward: bool = False
    tiled: bool = False
    prepared: Array | None = None
    before: "Step | None" = None
    masked: bool = False


@dataclass(frozen=True)
class Operation:
    """A row of the table.

    ``multiplications``: multiply-adds (or calls of a function) per sample, forward. ``scratch``: how many floats of
    ``step.scratch`` it uses; what other operations left is in them.
    """

    name: str
    forward: Callable[[Step], None]
    backward: Callable[[Step], None] | None
    multiplications: Callable[[Node], int] = lambda node: 0
    scratch: Callable[[Node], int] = lambda node: 0


def _lookup_forward(step: Step) -> None:
    feed = step.feed
    assert isinstance(feed, LookupFeed)
    rows, inverse = feed.rows, feed.inverse
    for piece, output, _ in step.pieces:
        if piece.each:
            row_kernels.gather_fields(rows, inverse, piece.start, piece.stop, output.rows, output.start)
        else:
            row_kernels.gather(rows, inverse, piece.start, output.rows, output.start, output.width)


def _lookup_backward(step: Step) -> None:
    feed = step.feed
    assert isinstance(feed, LookupFeed)
    out = feed.gradient
    kernels.zero(out, 0, out.shape[1])
    for piece, _, g in step.pieces:
        if g is None:
            continue
        if piece.each:
            row_kernels.segment_sum_fields(g.rows, g.start, feed.inverse, piece.start, piece.stop, out)
        else:
            row_kernels.segment_sum(g.rows, g.start, g.width, feed.inverse, piece.start, out)


def _dense_input_forward(step: Step) -> None:
    assert isinstance(step.feed, DenseFeed)
    assert step.output is not None
    values = step.feed.values
    kernels.copy(values, 0, step.output.rows, step.output.start, step.output.width)


def _nothing(step: Step) -> None:
    pass


def _concat_forward(step: Step) -> None:
    for source, target in step.moves:
        kernels.copy(source.rows, source.start, target.rows, target.start, source.width)


def _linear_forward(step: Step) -> None:
    out = step.output
    layer = step.node.detail
    assert out is not None
    assert isinstance(layer, Linear)
    source, weight = step.inputs[0], step.parameters[0]
    if step.tiled_forward and len(out.rows) >= ROWS:
        bias = step.parameters[1] if layer.bias else NO_BIAS
        clipped = layer.activation == "relu"
        kernel = tiled.forward if step.prepared is None else tiled.forward_prepared
        scratch = step.scratch if step.prepared is None else step.prepared
        kernel(source.rows, source.start, weight, bias, clipped, scratch, out.rows, out.start)
        if layer.activation is not None and not clipped:
            ACTIVATE[layer.activation](out.rows, out.start, out.rows, out.start, out.width)
        return
    np.matmul(source.matrix, weight, out=out.matrix)
    if layer.activation == "relu":
        if layer.bias:
            kernels.add_bias_relu(out.rows, out.start, step.parameters[1])
        else:
            kernels.relu(out.rows, out.start, out.rows, out.start, out.width)
        return
    if layer.bias:
        kernels.add_bias(out.rows, out.start, step.parameters[1])
    if layer.activation is not None:
        ACTIVATE[layer.activation](out.rows, out.start, out.rows, out.start, out.width)


NO_BIAS: Array = np.empty(0, np.float32)
ACTIVATE = {"relu": kernels.relu, "sigmoid": kernels.sigmoid, "tanh": kernels.tanh}
IN_PLACE = {"relu": kernels.relu_gradient, "sigmoid": kernels.sigmoid_gradient, "tanh": kernels.tanh_gradient}


def _linear_backward(step: Step) -> None:
    out, g = step.output, step.gradient
    layer = step.node.detail
    assert out is not None
    assert g is not None
    assert isinstance(layer, Linear)
    if step.masked:
        pass
    elif layer.activation == "relu" and layer.bias:
        kernels.relu_bias_gradient(out.rows, out.start, g.rows, g.start, step.scratch, step.gradients[1])
    else:
        if layer.activation is not None:
            IN_PLACE[layer.activation](out.rows, out.start, g.rows, g.start, g.rows, g.start, g.width)
        if layer.bias:
            kernels.bias_gradient(g.rows, g.start, step.scratch, step.gradients[1])
    if step.tiled and len(g.rows) >= ROWS:
        _tiled_products(step, g)
        return
    np.matmul(step.inputs[0].matrix.T, g.matrix, out=step.gradients[0])
    target = step.targets[0]
    if step.before is not None:
        step.before.masked = False
    if target is None:
        return
    if layer.units == 1:
        # BLAS takes 10 times as long for a product over a single column.
        kernels.outer(g.rows, g.start, step.parameters[0], target.rows, target.start)
    else:
        np.matmul(g.matrix, step.parameters[0].T, out=target.matrix)


def _tiled_products(step: Step, g: Strip) -> None:
    source, weight, target, before = step.inputs[0], step.parameters[0], step.targets[0], step.before
    tiled.weight_gradient(source.rows, source.start, g.rows, g.start, step.gradients[0])
    if target is None:
        return
    if before is None:
        tiled.backward(g.rows, g.start, weight, step.scratch, target.rows, target.start)
        return
    bias_gradient = before.gradients[1]
    tiled.backward_relu(
        g.rows,
        g.start,
        weight,
        step.scratch,
        source.rows,
        source.start,
        target.rows,
        target.start,
        bias_gradient,
    )
    before.masked = True


def _multiply_forward(step: Step) -> None:
    out = step.output
    a, b = step.inputs
    assert out is not None
    kernels.multiply(a.rows, a.start, b.rows, b.start, out.rows, out.start, out.width)


def _multiply_backward(step: Step) -> None:
    g = step.gradient
    assert g is not None
    for target, other in zip(step.targets, reversed(step.inputs), strict=True):
        if target is not None:
            kernels.multiply(g.rows, g.start, other.rows, other.start, target.rows, target.start, g.width)


def _add_forward(step: Step) -> None:
    out = step.output
    a, b = step.inputs
    assert out is not None
    kernels.add(a.rows, a.start, b.rows, b.start, out.rows, out.start, out.width)


def _fields(node: Node) -> int:
    assert isinstance(node.detail, Fields)
    return node.detail.count


def _vectors(node: Node) -> int:
    return _fields(node) + len(node.inputs) - 1


def _pool_forward(step: Step) -> None:
    source, out = step.inputs[0], step.output
    assert out is not None
    row_kernels.pool(source.rows, source.start, _fields(step.node), out.rows, out.start, out.width)


def _pool_backward(step: Step) -> None:
    g, target = step.gradient, step.targets[0]
    assert g is not None
    if target is not None:
        row_kernels.pool_gradient(g.rows, g.start, _fields(step.node), target.rows, target.start, g.width)


def _interactions_forward(step: Step) -> None:
    *dense, rows = step.inputs
    assert step.output is not None
    forward = pair_tiles.forward if step.tiled_forward else pairs.forward
    forward(dense, rows, _fields(step.node), step.output, step.scratch)


def _interactions_backward(step: Step) -> None:
    *dense, rows = step.inputs
    assert step.gradient is not None
    pairs.backward(dense, rows, _fields(step.node), step.gradient, step.scratch, step.targets)


def _dropout(step: Step, source: Strip, target: Strip) -> None:
    assert isinstance(step.node.detail, Dropout)
    if step.mask_key is None:
        kernels.copy(source.rows, source.start, target.rows, target.start, source.width)
        return
    rate = step.node.detail.rate
    below, scale = np.uint64(round(rate * 2**32)), np.float32(1 / (1 - rate))
    mask_kernels.dropout(
        source.rows, source.start, target.rows, target.start, source.width, step.mask_key, below, scale
    )


def _dropout_forward(step: Step) -> None:
    assert step.output is not None
    _dropout(step, step.inputs[0], step.output)


def _dropout_backward(step: Step) -> None:
    g, target = step.gradient, step.targets[0]
    assert g is not None
    if target is not None:
        _dropout(step, g, target)


def _elementwise(name: str, forward: Callable[..., None], backward: Callable[..., None]) -> Operation:
    def run_forward(step: Step) -> None:
        source, out = step.inputs[0], step.output
        assert out is not None
        forward(source.rows, source.start, out.rows, out.start, out.width)

    def run_backward(step: Step) -> None:
        out, g, target = step.output, step.gradient, step.targets[0]
        assert out is not None
        assert g is not None
        if target is not None:
            backward(out.rows, out.start, g.rows, g.start, target.rows, target.start, g.width)

    return Operation(name, run_forward, run_backward, lambda node: node.width)


def _cross_entropy_forward(step: Step) -> None:
    assert isinstance(step.feed, LabelFeed)
    logit = step.inputs[0]
    kernels.binary_cross_entropy(logit.rows, logit.start, step.feed.values, step.feed.total)


def _cross_entropy_backward(step: Step) -> None:
    assert isinstance(step.feed, LabelFeed)
    logit, target = step.inputs[0], step.targets[0]
    assert target is not None
    kernels.binary_cross_entropy_gradient(logit.rows, logit.start, step.feed.values, target.rows, target.start)


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("lookup", _lookup_forward, _lookup_backward),
        Operation("dense_input", _dense_input_forward, None),
        Operation("columns", _nothing, None),
        Operation("concat", _concat_forward, None),
        Operation("field_columns", _nothing, None),
        Operation(
            "linear",
            _linear_forward,
            _linear_backward,
            lambda node: node.inputs[0].width * node.width,
            lambda node: max(node.width, tiled.scratch_size(node.inputs[0].width, node.width)),
        ),
        Operation("pool", _pool_forward, _pool_backward, lambda node: node.inputs[0].width),
        Operation(
            "interactions",
            _interactions_forward,
            _interactions_backward,
            lambda node: node.inputs[-1].width // _fields(node) * node.width,
            # Tiles need less.
            lambda node: pairs.scratch_size(sum(child.width for child in node.inputs), _vectors(node)),
        ),
        Operation("multiply", _multiply_forward, _multiply_backward, lambda node: node.width),
        Operation("add", _add_forward, None, lambda node: node.width),
        Operation("dropout", _dropout_forward, _dropout_backward, lambda node: node.width),
        _elementwise("relu", kernels.relu, kernels.relu_gradient),
        _elementwise("sigmoid", kernels.sigmoid, kernels.sigmoid_gradient),
        _elementwise("tanh", kernels.tanh, kernels.tanh_gradient),
        Operation("binary_cross_entropy", _cross_entropy_forward, _cross_entropy_backward, lambda node: 1),
    )
}
