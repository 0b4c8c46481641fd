# SPDX-License-Identifier: Apache-2.0
"""The static dataflow graph: nodes, what they need, and the orders in which they are walked.

A node stands for float32[batch, width]; the batch is implicit. Invariant: nodes are immutable and name their inputs,
so a graph has no cycle and its order depends only on how it was built. Pure values: any thread may use them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from oarlock.embedding.spec import Initializer, check_name
from oarlock.proto.errors import InvalidArgument

ACTIVATIONS = ("relu", "sigmoid", "tanh")


def check_width(owner: str, value: object) -> int:
    """Return ``value`` if it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{owner} = {value!r}: give an integer >= 1")
    return value


def check_nodes(owner: str, nodes: Iterable[object]) -> None:
    """Raise InvalidArgument unless every one of ``nodes`` is a Node."""
    for value in nodes:
        if not isinstance(value, Node):
            raise InvalidArgument(f"{owner}: expected a node, got {type(value).__name__}; layers are called on nodes")


@dataclass(frozen=True)
class Lookup:
    """Rows of ``table`` for ``fields`` field positions, fed as unique rows and their positions."""

    name: str
    table: str
    dim: int
    fields: int = 1


@dataclass(frozen=True)
class DenseInput:
    """Values that are fed as they are."""

    name: str
    width: int


@dataclass(frozen=True)
class Range:
    """The columns ``start`` to ``stop`` (not included) of the input."""

    start: int
    stop: int


@dataclass(frozen=True)
class FieldRange:
    """The columns ``start`` to ``stop`` (not included) of every field of a lookup."""

    start: int
    stop: int


@dataclass(frozen=True)
class Fields:
    """How many equal parts of the input belong together."""

    count: int


@dataclass(frozen=True)
class Dropout:
    """The share of values that a training step drops."""

    rate: float


@dataclass(frozen=True)
class Label:
    """The feed that a loss compares with."""

    name: str


@dataclass(frozen=True, eq=False)
class Linear:
    """Multiply by a weight, add a bias, apply an activation: ``activation(x @ weight + bias)``.

    ``weight: float32[in, units]`` is the parameter ``NAME.weight``, ``bias: float32[units]`` is ``NAME.bias``. Without
    an ``initializer`` the weight starts uniform in +-sqrt(6 / (in + units)) (Glorot and Bengio, 2010, eq. 16), for
    every activation; the bias starts at zero. A Linear called on several nodes of one width shares its parameters.
    """

    units: int
    activation: str | None = None
    initializer: Initializer | None = None
    bias: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidArgument("Linear: give name=, its parameters are stored under it")
        check_name("layer", self.name)
        check_width(f"Linear {self.name}: units", self.units)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise InvalidArgument(
                f"Linear {self.name}: activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)} or None"
            )

    def __call__(self, node: "Node") -> "Node":
        """Return the node ``activation(node @ weight + bias)``, of width ``units``."""
        check_nodes(f"Linear {self.name}", [node])
        return Node("linear", (node,), self.units, self)


Detail: TypeAlias = Lookup | DenseInput | Range | FieldRange | Fields | Dropout | Label | Linear | None


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One value of the graph: ``operation`` names a row of ``nn.operations.OPERATIONS``; two nodes are never equal."""

    operation: str
    inputs: tuple["Node", ...]
    width: int
    detail: Detail = None

    @property
    def name(self) -> str:
        """Return the name that a user gave, or the operation."""
        if isinstance(self.detail, Lookup | DenseInput | Linear):
            return self.detail.name
        return self.operation

    def __repr__(self) -> str:
        # Not the default: it would print a node once for every path that leads to it.
        return f"<{self.operation} {self.name}, width {self.width}>"


def topological(*outputs: Node) -> tuple[Node, ...]:
    """Return all nodes that ``outputs`` depend on, inputs before their consumers, each once.

    Depth first, inputs from left to right; without recursion, so that the depth of a model is not limited.
    """
    order: dict[Node, None] = {}
    stack: list[tuple[Node, Iterator[Node]]] = []
    for output in outputs:
        if output not in order:
            stack.append((output, iter(output.inputs)))
        while stack:
            node, rest = stack[-1]
            following = next((child for child in rest if child not in order), None)
            if following is None:
                order[node] = None
                stack.pop()
            else:
                stack.append((following, iter(following.inputs)))
    return tuple(order)


def consumers(order: Iterable[Node]) -> dict[Node, list[tuple[Node, int]]]:
    """Return for each node of ``order`` who reads it, last consumer first, and as which of its inputs.

    This is the order in which the backward pass adds to the node's gradient.
    """
    nodes = tuple(order)
    out: dict[Node, list[tuple[Node, int]]] = {node: [] for node in nodes}
    for node in reversed(nodes):
        for position, child in enumerate(node.inputs):
            out[child].append((node, position))
    return out


def trainable(order: Iterable[Node]) -> set[Node]:
    """Return the nodes of ``order`` (inputs first) that depend on a parameter or a row: a gradient reaches them."""
    out: set[Node] = set()
    for node in order:
        if node.operation in ("lookup", "linear") or any(child in out for child in node.inputs):
            out.add(node)
    return out
