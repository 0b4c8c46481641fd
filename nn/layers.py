# SPDX-License-Identifier: Apache-2.0
"""What a recipe calls: the functions that add nodes to a graph. ``Linear`` is a layer with parameters, in ``nn.graph``.

Invariant: a node that exists has checked widths; nothing is allocated here. Pure functions: any thread may call them.
"""

from collections.abc import Sequence

from oarlock.embedding.spec import MAX_DIM, check_name
from oarlock.nn.graph import DenseInput, Lookup, Node, Range, check_nodes, check_width
from oarlock.proto.errors import InvalidArgument


def lookup(name: str, *, table: str, dim: int, fields: int = 1) -> Node:
    """Add the feed ``name``: for each sample the rows of ``fields`` positions, side by side; width ``fields * dim``."""
    check_name("lookup", name)
    check_name("table", table)
    if check_width(f"lookup {name}: dim", dim) > MAX_DIM:
        raise InvalidArgument(f"lookup {name}: dim = {dim}: give an integer from 1 to {MAX_DIM}")
    check_width(f"lookup {name}: fields", fields)
    return Node("lookup", (), fields * dim, Lookup(name, table, dim, fields))


def dense_input(name: str, *, width: int) -> Node:
    """Add the feed ``name``: float32[batch, width], used as it is."""
    check_name("dense input", name)
    return Node("dense_input", (), check_width(f"dense input {name}: width", width), DenseInput(name, width))


def columns(node: Node, start: int, stop: int) -> Node:
    """Return the columns ``start`` to ``stop`` (not included) of ``node``."""
    check_nodes("columns", [node])
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (start, stop)) or not 0 <= start < stop <= node.width:
        raise InvalidArgument(
            f"columns({node.name}, {start!r}, {stop!r}): give 0 <= start < stop <= {node.width}, the width of the node"
        )
    return Node("columns", (node,), stop - start, Range(start, stop))


def concat(nodes: Sequence[Node]) -> Node:
    """Return the columns of all ``nodes``, side by side."""
    if isinstance(nodes, Node) or not nodes:
        raise InvalidArgument("concat: give a list of at least one node, as in concat([a, b])")
    check_nodes("concat", nodes)
    return Node("concat", tuple(nodes), sum(node.width for node in nodes))


def _pair(operation: str, a: Node, b: Node) -> Node:
    check_nodes(operation, [a, b])
    if a.width != b.width:
        raise InvalidArgument(f"{operation}({a.name}, {b.name}): widths {a.width}, {b.width} differ; make them equal")
    return Node(operation, (a, b), a.width)


def multiply(a: Node, b: Node) -> Node:
    """Return the products of two nodes of one width, column by column."""
    return _pair("multiply", a, b)


def add(a: Node, b: Node) -> Node:
    """Return the sums of two nodes of one width, column by column."""
    return _pair("add", a, b)


def _activation(operation: str, node: Node) -> Node:
    check_nodes(operation, [node])
    return Node(operation, (node,), node.width)


def relu(node: Node) -> Node:
    """Return max(node, 0); the gradient at 0 is 0, and NaN stays NaN."""
    return _activation("relu", node)


def sigmoid(node: Node) -> Node:
    """Return 1 / (1 + exp(-node)), computed without overflow."""
    return _activation("sigmoid", node)


def tanh(node: Node) -> Node:
    """Return the hyperbolic tangent of node."""
    return _activation("tanh", node)
