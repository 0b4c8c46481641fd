# SPDX-License-Identifier: Apache-2.0
"""What a model looks like and what a sample costs, from the graph alone.

Invariant: costs are counts, not times: parameters, multiply-adds forward per sample (a function call counts as one)
and floats moved between samples and rows. Pure functions: any thread may call them.
"""

from dataclasses import dataclass

from oarlock.nn.graph import Dropout, FieldRange, Fields, Label, Linear, Lookup, Node, Range, topological
from oarlock.nn.model import Model, linear_parameters
from oarlock.nn.operations import OPERATIONS


@dataclass(frozen=True)
class LayerCost:
    """The cost of one node per sample; ``parameters`` is 0 where a shared layer's were counted before."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    width: int
    parameters: int
    multiplications: int
    row_floats: int


def _names(order: tuple[Node, ...]) -> dict[Node, str]:
    taken: set[str] = set()
    out: dict[Node, str] = {}
    for node in order:
        base = node.name
        if isinstance(node.detail, Range):
            base = f"{out[node.inputs[0]]}[{node.detail.start}:{node.detail.stop}]"
        elif isinstance(node.detail, FieldRange):
            base = f"{out[node.inputs[0]]}[each {node.detail.start}:{node.detail.stop}]"
        name, number = base, 2
        while name in taken:
            name, number = f"{base}.{number}", number + 1
        taken.add(name)
        out[node] = name
    return out


def cost(model: Model) -> tuple[LayerCost, ...]:
    """Return the cost of every node of ``model``, inputs before their readers."""
    order = topological(model.loss, model.score)
    names = _names(order)
    counted: set[Linear] = set()
    out = []
    for node in order:
        layer = node.detail
        parameters = 0
        if isinstance(layer, Linear) and layer not in counted:
            counted.add(layer)
            parameters = sum(spec.size for spec in linear_parameters(layer, node.inputs[0].width, model.optimizer))
        out.append(
            LayerCost(
                name=names[node],
                operation=node.operation,
                inputs=tuple(names[child] for child in node.inputs),
                width=node.width,
                parameters=parameters,
                multiplications=OPERATIONS[node.operation].multiplications(node),
                row_floats=node.width if isinstance(layer, Lookup) else 0,
            )
        )
    return tuple(out)


def _kind(node: Node) -> str:
    match node.detail:
        case Linear() as layer if layer.activation:
            return f"linear, {layer.activation}"
        case Lookup() as lookup:
            return f"lookup of {lookup.table}" + (f", {lookup.fields} fields" if lookup.fields > 1 else "")
        case Fields(count):
            return f"{node.operation}, {count} fields"
        case Dropout(rate):
            return f"dropout, {rate:g}"
        case Label(name):
            return f"{node.operation} with {name}"
    return node.operation


def picture(model: Model) -> str:
    """Return the model as a table in plain text: one node a line, with what it reads and what it costs per sample."""
    order = topological(model.loss, model.score)
    rows = [("node", "operation", "width", "parameters", "multiply-adds", "reads")]
    costs = cost(model)
    for node, line in zip(order, costs, strict=True):
        numbers = (str(line.width), str(line.parameters), str(line.multiplications))
        rows.append((line.name, _kind(node), *numbers, ", ".join(line.inputs)))
    total = (str(sum(line.parameters for line in costs)), str(sum(line.multiplications for line in costs)))
    rows.append(("total", "", "", *total, f"{sum(line.row_floats for line in costs)} floats of rows"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [row[i].rjust(widths[i]) if 2 <= i <= 4 else row[i].ljust(widths[i]) for i in range(6)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def dot(model: Model) -> str:
    """Return the model as a Graphviz digraph, data flowing upwards; the score is drawn with a double border."""
    order = topological(model.loss, model.score)
    costs = cost(model)
    lines = ["digraph model {", "  rankdir=BT;", "  node [shape=box];"]
    for node, line in zip(order, costs, strict=True):
        label = f"{line.name}\n{_kind(node)}\nwidth {line.width}"
        if line.parameters:
            label += f", {line.parameters} parameters"
        style = ", peripheries=2" if node is model.score else ""
        text = _quoted(label).replace("\n", "\\n")
        lines.append(f"  {_quoted(line.name)} [label={text}{style}];")
    for line in costs:
        lines += [f"  {_quoted(source)} -> {_quoted(line.name)};" for source in line.inputs]
    return "\n".join([*lines, "}"])
