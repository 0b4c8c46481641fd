# SPDX-License-Identifier: Apache-2.0
"""A model's graph as ONNX: of the dense part alone, fed with rows, or of the whole model with its rows in it, fed with keys.

    dense_graph   in   NAME: float32[batch, fields * dim]      each lookup: the rows of a sample's fields, side by side
                       NAME: float32[batch, width]             each dense input, as training feeds it
                  out  score: float32[batch]                   what ``Program.predict`` gives: a probability, or a logit
    whole_graph   in   NAME: int64[batch, fields]              each lookup: the keys, as the bits of uint64 (``keys.view(int64)``)
                       NAME: float32[batch, width]             each dense input
                  out  score: float32[batch]
                       missing: int64[batch]                   how many keys of a sample have no row

Invariant: an input is named as in the model, and the parameters are initializers, so a file is all that onnxruntime needs. All
numbers are float32, also where training multiplies in bfloat16; sums are taken in another order than by ``nn``, so a score may
differ in its last bits. Pure functions. The package ``onnx`` is needed: ``pip install "oarlock[onnx]"``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock import __version__
from oarlock.embedding.spec import TableSpec
from oarlock.nn import Model
from oarlock.nn.graph import DenseInput, FieldRange, Fields, Linear, Lookup, Node, Range
from oarlock.proto.errors import InvalidArgument, SpecMismatch, UnknownTable

# What runtimes of the last years read.
OPSET, ML_OPSET, IR_VERSION = 17, 3, 8
SCORE, MISSING = "score", "missing"
# Of keys and rows of a whole model; the format cannot hold 2 GiB in one file.
MAX_ROW_BYTES = 1 << 30
_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}

Array = NDArray[Any]
Parameters = Mapping[str, NDArray[np.float32]]
# Keys: uint64[n] and weights: float32[n, dim], by table.
Rows = Mapping[str, tuple[NDArray[np.uint64], NDArray[np.float32]]]


def dense_graph(model: Model, parameters: Parameters) -> Any:
    """Return the ``onnx.ModelProto`` of what is computed of looked-up rows and dense inputs.

    ``parameters``: float32 of each spec's shape, as ``export.tables.dense_values`` gives those of a checkpoint, and
    ``Program.parameters`` those of a program. To feed it::

        session = onnxruntime.InferenceSession(dense_graph(model, parameters).SerializeToString())
        rows = client.lookup({"fields": keys.reshape(-1)})["fields"]         # keys: uint64[batch, fields]
        feeds = {"fields": rows.reshape(batch, -1), "numbers": numbers}      # names of model.lookups and model.dense_inputs
        scores = session.run(["score"], feeds)[0]                            # float32[batch]

    Lookups of one table are inputs of their own. A program is fed (rows, inverse) instead: ``rows[inverse].reshape(batch, -1)``.
    """
    made = _Graph(model, parameters)
    for lookup in made.lookups:
        made.add_input(lookup.name, made.onnx.TensorProto.FLOAT, lookup.fields * lookup.dim)
    return made.finish()


def whole_graph(
    model: Model,
    parameters: Parameters,
    specs: Mapping[str, TableSpec],
    rows: Rows,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Any:
    """Return the ``onnx.ModelProto`` of the whole model, ``rows`` of its tables inside; InvalidArgument if they are too many.

    A key without a row is counted in ``missing``. It reads as zeros where the table says so. Where it reads as its first value,
    which is drawn from the key and which ONNX has no way to draw, it reads as the mean of its initializer: the same for tables
    that begin with zeros or a constant, and what a drawn value is on average.
    """
    made = _Graph(model, parameters)
    used = {lookup.table for lookup in made.lookups}
    for table in sorted(used):
        if table not in rows or table not in specs:
            raise UnknownTable(f"the model looks up table {table!r}, of which there are no rows", table=table)
    size = sum(rows[table][0].nbytes + rows[table][1].nbytes for table in used)
    if size > max_row_bytes:
        raise InvalidArgument(
            f"keys and rows of {', '.join(sorted(used))} take {size} bytes; a whole model may have {max_row_bytes}: export the "
            "dense graph alone, and look rows up with `oarlock serve`"
        )
    for table in sorted(used):
        made.add_rows(specs[table], *rows[table])
    for lookup in made.lookups:
        made.add_lookup(lookup, specs[lookup.table])
    made.add_missing()
    return made.finish()


class _Graph:
    """A graph that is being made; lives for one call."""

    def __init__(self, model: Model, parameters: Parameters) -> None:
        self.onnx = _onnx()
        self.model = model
        known = {spec.name: spec for spec in model.parameters}
        for spec in model.parameters:
            found = parameters.get(spec.name)
            if found is None or found.shape != spec.shape:
                has = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise SpecMismatch(
                    f"dense parameter {spec.name} {has}; the model needs {list(spec.shape)}: is it the model of this checkpoint?"
                )
        self.parameters = {name: np.ascontiguousarray(parameters[name], np.float32) for name in known}
        nodes = model.score_nodes
        self.lookups = [node.detail for node in nodes if isinstance(node.detail, Lookup)]
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._initializers: dict[str, Any] = {}
        # By table: keys, places of their rows, and the place of what a key without a row reads as.
        self._encoders: dict[str, tuple[list[int], list[int], int]] = {}
        self._missing: list[str] = []
        self._names: dict[Node, str] = {}
        self._count = 0

    def add_input(self, name: str, kind: int, width: int) -> None:
        self._inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, ["batch", width]))

    def _constant(self, name: str, values: Array) -> str:
        """Return the name of an initializer; equal ones of one name are one."""
        if name not in self._initializers:
            self._initializers[name] = self.onnx.numpy_helper.from_array(values, name)
        return name

    def _shape(self, *sizes: int) -> str:
        """Return a constant shape; 0 stands for the batch."""
        return self._constant("/shape/" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def _add(self, kind: str, inputs: list[str], *, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add an operation; return its output's name."""
        self._count += 1
        # With a slash no name of a feed or parameter is like it.
        output = output or f"/{self._count}/{kind}"
        made = self.onnx.helper.make_node(kind, inputs, [output], f"/{self._count}", domain=domain, **attributes)
        self._nodes.append(made)
        return output

    # Rows

    def add_rows(self, spec: TableSpec, keys: NDArray[np.uint64], weights: NDArray[np.float32]) -> None:
        """Put a table's rows into the graph, and behind them what a key without a row reads as."""
        absent = np.zeros((1, spec.dim), np.float32)
        if spec.absent != "zeros":
            begin = 0
            for part in spec.all_parts[:1] if spec.expand_score else spec.all_parts:
                mean = 0.0 if part.initializer.kind == "zeros" else part.initializer.mean
                absent[0, begin : begin + part.width] = mean
                begin += part.width
        self._constant(f"/rows/{spec.name}", np.concatenate([weights, absent]))
        # An encoder of nothing is none; in an empty table key 0 is led to where all are.
        given = keys.view(np.int64) if len(keys) else np.zeros(1, np.int64)
        places = np.arange(len(given), dtype=np.int64)
        self._encoders[spec.name] = (given.tolist(), places.tolist(), len(weights))

    def add_lookup(self, lookup: Lookup, spec: TableSpec) -> None:
        """Read keys, and give the name of the lookup's values to what comes of them."""
        self.add_input(lookup.name, self.onnx.TensorProto.INT64, lookup.fields)
        keys, places, rows = self._encoders[lookup.table]
        found = self._add(
            "LabelEncoder",
            [lookup.name],
            domain="ai.onnx.ml",
            keys_int64s=keys,
            values_int64s=places,
            default_int64=rows,
        )
        each = self._add("Gather", [f"/rows/{spec.name}", found], axis=0)
        node = next(node for node in self.model.score_nodes if node.detail is lookup)
        self._names[node] = self._add("Reshape", [each, self._shape(0, node.width)])
        absent = self._add("Equal", [found, self._constant(f"/absent/{spec.name}", np.array([rows], np.int64))])
        counted = self._add("Cast", [absent], to=self.onnx.TensorProto.INT64)
        axes = self._constant("/axis/1", np.array([1], np.int64))
        self._missing.append(self._add("ReduceSum", [counted, axes], keepdims=0))

    def add_missing(self) -> None:
        self._add("Identity", [self._total()], output=MISSING)
        self._outputs.append(self.onnx.helper.make_tensor_value_info(MISSING, self.onnx.TensorProto.INT64, ["batch"]))

    def _total(self) -> str:
        total = self._missing[0]
        for name in self._missing[1:]:
            total = self._add("Add", [total, name])
        return total

    # Operations

    def finish(self) -> Any:
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        for node in self.model.score_nodes:
            if node not in self._names:
                self._names[node] = self._value(node)
        self._add("Reshape", [self._names[self.model.score], self._shape(-1)], output=SCORE)
        self._outputs.insert(0, helper.make_tensor_value_info(SCORE, kinds.FLOAT, ["batch"]))
        taken = {made.name for made in self._inputs}
        if both := taken & {SCORE, MISSING, *self._initializers}:
            raise InvalidArgument(
                f"the model has an input named {min(both)}, as something else in the file is: rename it"
            )
        graph = helper.make_graph(
            self._nodes, "oarlock", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        made = helper.make_model(
            graph, opset_imports=opsets, producer_name="oarlock", producer_version=__version__, ir_version=IR_VERSION
        )
        self.onnx.checker.check_model(made)
        return made

    def _value(self, node: Node) -> str:
        """Add the operations of a node; return the name of its values: float32[batch, width]."""
        inputs = [self._names[child] for child in node.inputs]
        match node.operation, node.detail:
            case "lookup", Lookup(name):
                return name
            case "dense_input", DenseInput(name, width):
                self.add_input(name, self.onnx.TensorProto.FLOAT, width)
                return name
            case "columns", Range(start, stop):
                return self._slice(inputs[0], start, stop, axis=1)
            case "field_columns", FieldRange(start, stop):
                lookup = node.inputs[0].detail
                assert isinstance(lookup, Lookup)
                fields = self._add("Reshape", [inputs[0], self._shape(0, lookup.fields, lookup.dim)])
                part = self._slice(fields, start, stop, axis=2)
                return self._add("Reshape", [part, self._shape(0, node.width)])
            case "concat", _:
                return self._add("Concat", inputs, axis=1)
            case "linear", Linear() as layer:
                return self._linear(layer, inputs[0])
            case "pool", Fields(count):
                parts = self._add("Reshape", [inputs[0], self._shape(0, count, node.width)])
                axes = self._constant("/axis/1", np.array([1], np.int64))
                return self._add("ReduceSum", [parts, axes], keepdims=0)
            case "interactions", Fields(count):
                return self._interactions(node, inputs, count + len(inputs) - 1)
            case "multiply", _:
                return self._add("Mul", inputs)
            case "add", _:
                return self._add("Add", inputs)
            case "dropout", _:
                return inputs[0]
            case operation, _ if operation in _ACTIVATIONS:
                return self._add(_ACTIVATIONS[operation], inputs)
        raise InvalidArgument(f"there is no ONNX form of {node.operation} yet")

    def _slice(self, name: str, start: int, stop: int, *, axis: int) -> str:
        ends = [self._constant(f"/at/{n}", np.array([n], np.int64)) for n in (start, stop)]
        return self._add("Slice", [name, *ends, self._constant(f"/axis/{axis}", np.array([axis], np.int64))])

    def _linear(self, layer: Linear, source: str) -> str:
        names = [f"{layer.name}.weight", *([f"{layer.name}.bias"] if layer.bias else [])]
        made = self._add("Gemm", [source, *(self._constant(name, self.parameters[name]) for name in names)])
        return made if layer.activation is None else self._add(_ACTIVATIONS[layer.activation], [made])

    def _interactions(self, node: Node, inputs: list[str], vectors: int) -> str:
        """Multiply all vectors with all; take what is below the diagonal, row by row."""
        flat = inputs[0] if len(inputs) == 1 else self._add("Concat", inputs, axis=1)
        width = sum(child.width for child in node.inputs) // vectors
        rows = self._add("Reshape", [flat, self._shape(0, vectors, width)])
        square = self._add("MatMul", [rows, self._add("Transpose", [rows], perm=[0, 2, 1])])
        line = self._add("Reshape", [square, self._shape(0, vectors * vectors)])
        i, j = np.tril_indices(vectors, -1)
        below = self._constant(f"/below/{vectors}", (i * vectors + j).astype(np.int64))
        return self._add("Gather", [line, below], axis=1)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise InvalidArgument(
            'the package onnx is not installed, which makes files of this form: pip install "oarlock[onnx]"'
        ) from None
    return onnx
