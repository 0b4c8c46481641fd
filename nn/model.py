# SPDX-License-Identifier: Apache-2.0
"""A whole model: the node that predicts, the node that is minimised, and the parameters and tables between.

Invariant: a Model that exists is consistent: names are unique, tables have one dim, and everything that is fed or
learned reaches the loss. It holds no values; ``bind`` makes a Program that does. Immutable: any thread may use it.
"""

import math
from dataclasses import dataclass, field

from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec
from oarlock.nn.bfloat16 import check_dense_dtype
from oarlock.nn.graph import DenseInput, Label, Linear, Lookup, Node, check_nodes, topological, trainable
from oarlock.nn.loss import LOSSES
from oarlock.nn.program import Program
from oarlock.proto.errors import InvalidArgument


def linear_parameters(layer: Linear, inputs: int, optimizer: OptimizerSpec) -> tuple[DenseSpec, ...]:
    """Return the specs of a Linear's weight and bias, in the order in which they lie in the flat vector."""
    limit = math.sqrt(6 / (inputs + layer.units))
    initializer = layer.initializer or Initializer("uniform", 0.0, limit)
    weight = DenseSpec(f"{layer.name}.weight", (inputs, layer.units), optimizer, initializer)
    if not layer.bias:
        return (weight,)
    return weight, DenseSpec(f"{layer.name}.bias", (layer.units,), optimizer, Initializer("zeros"))


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A graph with a purpose: ``predict`` returns the values of ``score``, ``train`` minimises ``loss``.

    ``score`` may put nodes without parameters on top of what the loss sees, as in ``score=sigmoid(logit)``.
    ``dense_dtype``: in what large Linears multiply, "float32" or "bfloat16" (``nn.bfloat16``, which needs PyTorch);
    parameters, gradients and all other operations are float32 in either case.
    """

    score: Node
    loss: Node
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    dense_dtype: str = "float32"
    parameters: tuple[DenseSpec, ...] = field(init=False)
    lookups: tuple[Lookup, ...] = field(init=False)
    dense_inputs: tuple[DenseInput, ...] = field(init=False)
    tables: dict[str, int] = field(init=False)
    label: str = field(init=False)
    loss_nodes: tuple[Node, ...] = field(init=False, repr=False)
    score_nodes: tuple[Node, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_nodes("Model", [self.score, self.loss])
        check_dense_dtype(self.dense_dtype)
        if self.loss.operation not in LOSSES:
            raise InvalidArgument(f"Model: loss is a {self.loss.operation} node; give one of {', '.join(LOSSES)}")
        if self.score.width != 1:
            raise InvalidArgument(f"Model: score {self.score.name} has width {self.score.width}; give one of width 1")
        found = {
            "loss_nodes": topological(self.loss),
            "score_nodes": topological(self.score),
        }
        for name, nodes in found.items():
            object.__setattr__(self, name, nodes)
        self._check_reach()
        self._collect()

    def _check_reach(self) -> None:
        reached = set(self.loss_nodes)
        for node in self.score_nodes:
            if node not in reached and node.operation in ("lookup", "dense_input", "linear"):
                raise InvalidArgument(
                    f"Model: {node.operation} {node.name} feeds the score but does not reach the loss, so it would"
                    " never be trained; build the loss on it or leave it out"
                )
        inputs = {child for node in (*self.loss_nodes, *self.score_nodes) for child in node.inputs}
        if any(node.operation in LOSSES for node in (self.score, *inputs)):
            raise InvalidArgument("Model: a loss is the input of a node or the score; it must be the last node")
        if self.loss not in trainable(self.loss_nodes):
            raise InvalidArgument("Model: the loss depends on no lookup and no Linear, so there is nothing to train")

    def _collect(self) -> None:
        assert isinstance(self.loss.detail, Label)
        lookups: list[Lookup] = []
        inputs: list[DenseInput] = []
        tables: dict[str, int] = {}
        feeds = {self.loss.detail.name}
        layers: dict[str, tuple[Linear, int]] = {}
        parameters: list[DenseSpec] = []
        for node in self.loss_nodes:
            detail = node.detail
            if isinstance(detail, Lookup | DenseInput):
                if detail.name in feeds:
                    raise InvalidArgument(f"Model: two feeds are named {detail.name}; give each its own name")
                feeds.add(detail.name)
            if isinstance(detail, Lookup):
                if tables.setdefault(detail.table, detail.dim) != detail.dim:
                    raise InvalidArgument(
                        f"Model: lookup {detail.name} reads table {detail.table} with dim {detail.dim}, another one"
                        f" with {tables[detail.table]}; a table has one dim"
                    )
                lookups.append(detail)
            elif isinstance(detail, DenseInput):
                inputs.append(detail)
            elif isinstance(detail, Linear):
                width = node.inputs[0].width
                layer, seen = layers.setdefault(detail.name, (detail, 0))
                if layer is not detail:
                    raise InvalidArgument(f"Model: two Linears are named {detail.name}; rename one or share one object")
                if seen not in (0, width):
                    raise InvalidArgument(f"Model: Linear {detail.name} sees widths {seen} and {width}; use one")
                if not seen:
                    layers[detail.name] = (detail, width)
                    parameters += linear_parameters(detail, width, self.optimizer)
        object.__setattr__(self, "lookups", tuple(lookups))
        object.__setattr__(self, "dense_inputs", tuple(inputs))
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "parameters", tuple(parameters))
        object.__setattr__(self, "label", self.loss.detail.name)

    def bind(self, max_batch: int) -> Program:
        """Return a Program with all buffers for batches of up to ``max_batch`` samples; its parameters are zeros."""
        return Program(self, max_batch)
