# SPDX-License-Identifier: Apache-2.0
"""What a recipe calls: the functions that add nodes to a graph. ``Linear`` is a layer with parameters, in ``nn.graph``.

Invariant: a node that exists has checked widths; nothing is allocated here. Pure functions: any thread may call them.
"""

from collections.abc import Sequence

from oarlock.embedding.spec import MAX_DIM, check_name
from oarlock.nn.graph import DenseInput, Dropout, FieldRange, Fields, Lookup, Node, Range, check_nodes, check_width
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


def _check_range(operation: str, node: Node, start: object, stop: object, width: int, whose: str) -> None:
    integers = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, stop))
    if not integers or not 0 <= start < stop <= width:  # type: ignore[operator]
        raise InvalidArgument(
            f"{operation}({node.name}, {start!r}, {stop!r}): give 0 <= start < stop <= {width}, the {whose}"
        )


def columns(node: Node, start: int, stop: int) -> Node:
    """Return the columns ``start`` to ``stop`` (not included) of ``node``."""
    check_nodes("columns", [node])
    _check_range("columns", node, start, stop, node.width, "width of the node")
    return Node("columns", (node,), stop - start, Range(start, stop))


def field_columns(node: Node, start: int, stop: int) -> Node:
    """Return the columns ``start`` to ``stop`` (not included) of every field of a lookup, side by side by field.

    So rows of [wide 1 | deep d] feed both parts of a model. The columns are gathered straight from the rows.
    """
    check_nodes("field_columns", [node])
    if not isinstance(node.detail, Lookup):
        raise InvalidArgument(f"field_columns({node.name}, ...): {node.name} is no lookup; give the lookup itself")
    _check_range("field_columns", node, start, stop, node.detail.dim, f"dim of lookup {node.name}")
    return Node("field_columns", (node,), node.detail.fields * (stop - start), FieldRange(start, stop))


def pool(node: Node, fields: int) -> Node:
    """Return the sum over ``fields`` parts of ``node``: its width is ``fields * dim``, that of the result dim."""
    check_nodes("pool", [node])
    check_width(f"pool({node.name}, ...): fields", fields)
    if node.width % fields:
        raise InvalidArgument(
            f"pool({node.name}, {fields}): width {node.width} is not {fields} parts of one width; give the number of"
            " fields of the lookup"
        )
    return Node("pool", (node,), node.width // fields, Fields(fields))


def interactions(dense: Node | None, rows: Node) -> Node:
    """Return the dot products of all pairs of vectors: ``dense``, and the parts of ``rows`` that are as wide.

    With F parts, these are V = F + 1 vectors, dense the first, and V (V - 1) / 2 products (i, j), i > j, row by row of
    the lower triangle: (1, 0), (2, 0), (2, 1), ... (Naumov et al., 2019, "Deep Learning Recommendation Model"). Without
    ``dense``, for data without numbers, ``rows`` is a lookup or field_columns of one, and V = F.
    """
    if dense is None:
        check_nodes("interactions", [rows])
        source = rows.inputs[0].detail if isinstance(rows.detail, FieldRange) else rows.detail
        if not isinstance(source, Lookup) or source.fields == 1:
            raise InvalidArgument(
                f"interactions(None, {rows.name}): give a lookup, or field_columns of one, of at least two fields"
            )
        return Node("interactions", (rows,), source.fields * (source.fields - 1) // 2, Fields(source.fields))
    check_nodes("interactions", [dense, rows])
    if rows.width % dense.width:
        raise InvalidArgument(
            f"interactions({dense.name}, {rows.name}): width {rows.width} is no multiple of {dense.width}; make"
            f" {dense.name} as wide as one field of {rows.name}"
        )
    fields = rows.width // dense.width
    return Node("interactions", (dense, rows), fields * (fields + 1) // 2, Fields(fields))


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


def dropout(node: Node, rate: float) -> Node:
    """Return ``node`` with each value dropped with probability ``rate``, the others divided by 1 - rate; only in training.

    What is dropped is a pure function of the (seed, step) that ``Program.train`` is given, the position in the graph,
    the sample's position in the batch and the column. ``Program.predict`` passes all values through.
    """
    check_nodes("dropout", [node])
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise InvalidArgument(f"dropout({node.name}, {rate!r}): give a rate with 0 <= rate < 1")
    return Node("dropout", (node,), node.width, Dropout(float(rate)))


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
