# SPDX-License-Identifier: Apache-2.0
"""A graph bound to memory: runs forward, backward and prediction for batches of up to ``max_batch`` samples.

Invariant: results depend only on the feeds, the parameters, the batch and, with dropout, (seed, step), to the bit: not
on ``max_batch``, earlier steps or where memory lies. After the first steps nothing is allocated but array headers. One
thread at a time; the arrays that it gives out are views that the next call overwrites. How many threads BLAS uses is the
process's business. Under ``dense_dtype = "bfloat16"`` this holds as far as PyTorch's products keep it.
"""

import os
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.embedding.tile import suits_cpu
from oarlock.nn import kernels, pair_tiles, tiled
from oarlock.nn.bfloat16 import HalfLinears, blas_threads
from oarlock.nn.feeds import DenseFeed, LabelFeed, LookupFeed, check_names
from oarlock.nn.graph import DenseInput, Fields, Label, Linear, Lookup, Node, check_width, topological, trainable
from oarlock.nn.layout import Layout, Route, aligned, plan
from oarlock.nn.mask_kernels import mask_key
from oarlock.nn.operations import OPERATIONS, Feed, Step
from oarlock.proto.errors import InvalidArgument

if TYPE_CHECKING:
    from oarlock.nn.model import Model

Array = np.ndarray[Any, Any]


class Program:
    """Made by ``Model.bind``.

    ``flat_parameters: float32[P]`` holds all parameters in the order of ``model.parameters``, row-major; ``parameters``
    are shaped views of it. They start as zeros: fill them from the shards before the first step. ``flat_gradients`` and
    ``gradients`` likewise, written by ``train``. ``row_gradients`` maps each lookup to float32[u, dim].
    """

    def __init__(self, model: "Model", max_batch: int) -> None:
        self.model = model
        self.max_batch = check_width("max_batch", max_batch)
        size = sum(spec.size for spec in model.parameters)
        self.flat_parameters: Array = np.zeros(size, np.float32)
        self.flat_gradients: Array = np.zeros(size, np.float32)
        self.parameters = self._shaped(self.flat_parameters)
        self.gradients = self._shaped(self.flat_gradients)
        self.row_gradients: dict[str, Array] = {
            lookup.name: np.zeros((0, lookup.dim), np.float32) for lookup in model.lookups
        }
        self._layout = plan(model.loss, model.score, self.max_batch)
        self._batch = self.max_batch
        self._feeds: dict[str, Feed] = {}
        nodes = topological(model.loss, model.score)
        self._scratch: Array = aligned(1, max(OPERATIONS[node.operation].scratch(node) for node in nodes))[0]
        steps = {node: self._step(node) for node in nodes}
        self._lookups = [feed for feed in self._feeds.values() if isinstance(feed, LookupFeed)]
        self._train = [steps[node] for node in model.loss_nodes]
        self._sum_shared(self._train)
        self._halves = HalfLinears(nodes, steps, self.max_batch) if model.dense_dtype == "bfloat16" else None
        halves = self._halves.operations if self._halves else {}
        if by_tiles():
            self._choose_tiles(steps, halves)
        operations = {node: halves.get(node) or OPERATIONS[node.operation] for node in nodes}
        self._forward = [(operations[step.node].forward, step) for step in self._train]
        learning = trainable(model.loss_nodes)
        self._backward = [
            (operations[step.node].backward, step) for step in reversed(self._train) if step.node in learning
        ]
        self._predict = [(operations[node].forward, steps[node]) for node in model.score_nodes]
        # Whose weights were put in order for predictions.
        self._prepared: list[Step] = []
        self._dropouts = [step for step in self._train if step.node.operation == "dropout"]
        self._score = self._layout.values[model.score]
        self._known = set(self._feeds)
        self._needed = {node.name for node in model.score_nodes if isinstance(node.detail, Lookup | DenseInput)}

    def _shaped(self, flat: Array) -> dict[str, Array]:
        out, begin = {}, 0
        for spec in self.model.parameters:
            out[spec.name] = flat[begin : begin + spec.size].reshape(spec.shape)
            begin += spec.size
        return out

    def _feed(self, node: Node) -> Feed | None:
        match node.detail:
            case Lookup() as spec:
                return self._feeds.setdefault(spec.name, LookupFeed(spec))
            case DenseInput() as spec:
                return self._feeds.setdefault(spec.name, DenseFeed(spec))
            case Label(name):
                return self._feeds.setdefault(name, LabelFeed(name))
        return None

    def _step(self, node: Node) -> Step:
        layout: Layout = self._layout
        values = layout.values
        step = Step(
            node=node,
            inputs=[values[child] for child in node.inputs if child in values],
            output=values.get(node),
            gradient=layout.gradients.get(node),
            targets=layout.targets.get(node, []),
            routes=layout.routes.get(node, []),
            moves=layout.moves.get(node, []),
            feed=self._feed(node),
            scratch=self._scratch,
        )
        if node.operation == "lookup":
            step.pieces = [
                (piece, values[piece.node], layout.gradients.get(piece.node)) for piece in layout.pieces[node]
            ]
        elif isinstance(node.detail, Linear):
            names = [f"{node.detail.name}.{part}" for part in (("weight", "bias") if node.detail.bias else ("weight",))]
            step.parameters = tuple(self.parameters[name] for name in names)
            step.gradients = tuple(self.gradients[name] for name in names)
        return step

    def _sum_shared(self, steps: list[Step]) -> None:
        """Let every use of a shared Linear but the last write to scratch that is added after its backward."""
        self._shared: dict[int, list[tuple[Array, Array]]] = {}
        seen: set[str] = set()
        for step in reversed(steps):
            if not isinstance(step.node.detail, Linear):
                continue
            if step.node.detail.name in seen:
                scratch = tuple(np.empty_like(gradient) for gradient in step.gradients)
                pairs = zip(scratch, step.gradients, strict=True)
                self._shared[id(step)] = [(own.reshape(1, -1), total.reshape(1, -1)) for own, total in pairs]
                step.gradients = scratch
            seen.add(step.node.detail.name)

    def _choose_tiles(self, steps: dict[Node, Step], others: Container[Node]) -> None:
        """Take the products of wide Linears by tiles, with the relu's gradient wherever it is nobody else's business."""
        for node, step in steps.items():
            if isinstance(node.detail, Fields) and node.operation == "interactions":
                fields = node.detail.count
                step.tiled_forward = pair_tiles.fits(fields, step.inputs[-1].width // fields)
            if not isinstance(node.detail, Linear) or node in others:
                continue
            step.tiled_forward = tiled.fits_forward(node.detail.units)
            step.tiled = tiled.fits(*step.parameters[0].shape)
            if not step.tiled:
                continue
            before, target = steps[node.inputs[0]], step.targets[0] if step.targets else None
            layer, own = before.node.detail, before.gradient
            if isinstance(layer, Linear) and layer.bias and layer.activation == "relu" and target and own:
                alone = sum(child is before.node for one in self._train for child in one.node.inputs) == 1
                if alone and target.same(own) and before.node not in others:
                    step.before = before

    def _resize(self, batch: int) -> None:
        if batch == self._batch:
            return
        for strip in self._layout.strips():
            strip.resize(batch)
        if self._halves:
            self._halves.resize(batch)
        self._batch = batch

    def _take(self, feeds: Mapping[str, Any], batch: int, needed: set[str]) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or not 1 <= batch <= self.max_batch:
            raise InvalidArgument(f"batch = {batch!r}: give an integer from 1 to {self.max_batch}, the max_batch")
        check_names(feeds, needed, self._known)
        for name in needed:
            self._feeds[name].take(feeds[name], int(batch))
        self._resize(int(batch))

    def _draw(self, seed: object, step: object) -> None:
        """Choose what this step drops."""
        if step is None:
            raise InvalidArgument("this model has dropout: give step=, a number that no other batch of the run has")
        for name, value in (("seed", seed), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**64:
                raise InvalidArgument(f"{name} = {value!r}: give an integer from 0 to 2**64 - 1")
        for layer, dropout in enumerate(self._dropouts):
            key = mask_key(np.uint64(seed), np.uint64(step), np.uint64(layer))  # type: ignore[arg-type]
            dropout.mask_key = np.uint64(key)

    def train(self, feeds: Mapping[str, Any], batch: int, *, seed: int = 0, step: int | None = None) -> float:
        """Run forward and backward; return the mean loss over ``batch`` samples.

        Fills ``gradients`` with d(mean loss)/d(parameter) and ``row_gradients`` with d(mean loss)/d(row), summed per
        unique row in ascending order of position. ``feeds``: for a lookup (rows: float32[u, dim], inverse: int32[batch]
        or int32[batch, fields]), for a dense input float32[batch, width], for the label float32[batch] in [0, 1]. A
        wrong feed raises InvalidArgument or Malformed before anything is computed. A model with dropout needs ``step``,
        and drops the same for the same (seed, step).
        """
        if self._dropouts:
            self._draw(seed, step)
        self._take(feeds, batch, self._known)
        for one in self._prepared:
            one.prepared = None
        self._prepared.clear()
        for forward, one in self._forward:
            forward(one)
        for strip in self._layout.zeros:
            kernels.zero(strip.rows, strip.start, strip.width)
        for lookup in self._lookups:
            lookup.make_gradient()
        for backward, one in self._backward:
            if backward is not None:
                backward(one)
            for route in one.routes:
                _run(route)
            if self._shared:
                for own, total in self._shared.get(id(one), ()):
                    kernels.accumulate(own, 0, total, 0, own.shape[1])
        for lookup in self._lookups:
            self.row_gradients[lookup.spec.name] = lookup.gradient
        label = self._feeds[self.model.label]
        assert isinstance(label, LabelFeed)
        return float(label.total[0]) / self._batch

    def prepare(self) -> None:
        """Take the parameters as they are for all predictions to come: they are put in the order of the products once.

        After they have changed call it again, before any prediction; ``train`` ends it. Takes as much memory again.
        """
        for _, one in self._predict:
            if one.tiled_forward and isinstance(one.node.detail, Linear):
                weight = one.parameters[0]
                if one.prepared is None:
                    one.prepared = aligned(1, tiled.prepared_size(*weight.shape))[0]
                    self._prepared.append(one)
                tiled.prepare(weight, one.prepared)

    def predict(self, feeds: Mapping[str, Any], batch: int) -> Array:
        """Return the score float32[batch] of each sample, a view that is valid until the next call.

        ``feeds`` as for ``train``; the label may be absent and is not read.
        """
        self._take(feeds, batch, self._needed)
        for dropout in self._dropouts:
            dropout.mask_key = None
        for forward, one in self._predict:
            forward(one)
        return self._score.matrix[:, 0]


def by_tiles() -> bool:
    """Return whether products are better taken by tiles: BLAS has no other threads to take a part of them.

    Who chose BLAS's kernels wants the bits that they give on every CPU.
    """
    return suits_cpu() and blas_threads() == 1 and not os.environ.get("OPENBLAS_CORETYPE")


def _run(route: Route) -> None:
    source, target = route.source, route.target
    kernel = kernels.accumulate if route.accumulate else kernels.copy
    kernel(source.rows, source.start, target.rows, target.start, source.width)
