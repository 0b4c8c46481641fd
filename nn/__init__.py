# SPDX-License-Identifier: Apache-2.0
"""Models as static dataflow graphs: layers called on nodes, then ``Model(...).bind(max_batch)`` to train and predict.

Reading order: graph, layers, loss, model; then layout, operations, program; kernels, row_kernels, mask_kernels, pairs,
tiled, pair_tiles; feeds; bfloat16, bfloat16_kernels; picture.
"""

from oarlock.nn.bfloat16 import DENSE_DTYPES, check_dense_dtype
from oarlock.nn.graph import DenseInput, Linear, Lookup, Node
from oarlock.nn.layers import (
    add,
    columns,
    concat,
    dense_input,
    dropout,
    field_columns,
    interactions,
    lookup,
    multiply,
    pool,
    relu,
    sigmoid,
    tanh,
)
from oarlock.nn.loss import binary_cross_entropy
from oarlock.nn.model import Model
from oarlock.nn.picture import LayerCost, cost, dot, picture
from oarlock.nn.program import Program

__all__ = [
    "DENSE_DTYPES",
    "DenseInput",
    "LayerCost",
    "Linear",
    "Lookup",
    "Model",
    "Node",
    "Program",
    "add",
    "binary_cross_entropy",
    "check_dense_dtype",
    "columns",
    "concat",
    "cost",
    "dense_input",
    "dot",
    "dropout",
    "field_columns",
    "interactions",
    "lookup",
    "multiply",
    "picture",
    "pool",
    "relu",
    "sigmoid",
    "tanh",
]
