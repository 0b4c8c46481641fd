# SPDX-License-Identifier: Apache-2.0
"""Building a graph: what a Model reports, what it refuses, how it is drawn; and where values are laid."""

import dataclasses
import math

import numpy as np
import pytest

from oarlock.embedding.spec import Initializer, OptimizerSpec
from oarlock.nn import (
    Linear,
    Model,
    add,
    binary_cross_entropy,
    columns,
    concat,
    cost,
    dense_input,
    dot,
    dropout,
    field_columns,
    interactions,
    lookup,
    multiply,
    picture,
    pool,
    relu,
    sigmoid,
)
from oarlock.nn.graph import consumers, topological
from oarlock.nn.layout import plan
from oarlock.nn.operations import OPERATIONS
from oarlock.proto.errors import InvalidArgument


def close(node, **options):
    logit = Linear(1, name="out")(node)
    return Model(score=logit, loss=binary_cross_entropy(logit, label="label"), **options)


def test_what_a_model_reports():
    a, b = lookup("a", table="t", dim=4), lookup("b", table="t", dim=4, fields=3)
    hidden = Linear(5, activation="relu", name="fc", initializer=Initializer("normal", 0, 0.1))(concat([a, b]))
    model = close(concat([hidden, dense_input("x", width=2)]), optimizer=OptimizerSpec("sgd"))
    assert [(spec.name, spec.shape) for spec in model.parameters] == [
        ("fc.weight", (16, 5)),
        ("fc.bias", (5,)),
        ("out.weight", (7, 1)),
        ("out.bias", (1,)),
    ]
    assert {spec.optimizer.name for spec in model.parameters} == {"sgd"}
    assert [spec.initializer for spec in model.parameters] == [
        Initializer("normal", 0, 0.1),
        Initializer("zeros"),
        Initializer("uniform", 0.0, math.sqrt(6 / 8)),
        Initializer("zeros"),
    ]
    assert model.tables == {"t": 4}
    assert [(one.name, one.table, one.dim, one.fields) for one in model.lookups] == [("a", "t", 4, 1), ("b", "t", 4, 3)]
    assert [one.name for one in model.dense_inputs] == ["x"]
    assert model.label == "label"
    assert close(a).parameters[0].optimizer == OptimizerSpec("adam")


def test_nodes_are_immutable_and_printed_briefly():
    node = lookup("a", table="t", dim=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.width = 5
    for _ in range(60):
        node = add(node, node)
    assert repr(node) == "<add add, width 4>"


def test_order_and_consumers():
    a = lookup("a", table="t", dim=4)
    left, right = relu(a), sigmoid(a)
    top = multiply(left, right)
    order = topological(top)
    assert order == (a, left, right, top)
    assert consumers(order)[a] == [(right, 0), (left, 0)]
    deep = a
    for _ in range(5000):
        deep = relu(deep)
    assert len(topological(deep)) == 5001


def a(dim=4, name="a", table="t"):
    return lookup(name, table=table, dim=dim)


def many():
    return lookup("many", table="t", dim=4, fields=3)


def both(node):
    return Model(score=node, loss=binary_cross_entropy(node, label="label"))


def never_trained():
    logit = Linear(1, name="out")(a())
    return Model(score=add(logit, Linear(1, name="lost")(a(name="b"))), loss=binary_cross_entropy(logit, label="y"))


REFUSED = {
    "dim": (lambda: lookup("a", table="t", dim=0), "lookup a: dim = 0"),
    "dim over limit": (lambda: lookup("a", table="t", dim=65537), "lookup a: dim = 65537"),
    "fields": (lambda: lookup("a", table="t", dim=2, fields=True), "lookup a: fields = True"),
    "lookup name": (lambda: lookup("", table="t", dim=2), "lookup name"),
    "table name": (lambda: lookup("a", table="1", dim=2), "table name"),
    "input width": (lambda: dense_input("x", width=1.5), "dense input x: width"),
    "no layer name": (lambda: Linear(3), "give name="),
    "units": (lambda: Linear(0, name="fc"), "Linear fc: units"),
    "activation": (lambda: Linear(1, activation="swish", name="fc"), "Linear fc: activation 'swish'"),
    "not a node": (lambda: Linear(1, name="fc")(np.ones(3)), "Linear fc: expected a node, got ndarray"),
    "columns beyond": (lambda: columns(a(), 2, 5), "give 0 <= start < stop <= 4"),
    "columns empty": (lambda: columns(a(), 2, 2), "give 0 <= start"),
    "columns reversed": (lambda: columns(a(), -1, 2), "give 0 <= start"),
    "field columns beyond": (lambda: field_columns(a(), 2, 5), "give 0 <= start < stop <= 4, the dim of lookup a"),
    "field columns empty": (lambda: field_columns(many(), 3, 3), "give 0 <= start < stop <= 4"),
    "field columns of text": (lambda: field_columns(many(), "0", 3), "give 0 <= start < stop <= 4"),
    "field columns of a layer": (lambda: field_columns(relu(a()), 0, 1), "relu is no lookup"),
    "field columns of no node": (lambda: field_columns(3, 0, 1), "expected a node, got int"),
    "pool of uneven parts": (lambda: pool(many(), 5), r"pool\(many, 5\): width 12 is not 5 parts"),
    "pool of no fields": (lambda: pool(many(), 0), "fields = 0"),
    "pool of no node": (lambda: pool(None, 1), "expected a node"),
    "interactions of another dim": (lambda: interactions(a(5, "b", "u"), many()), "12 is no multiple of 5; make b as"),
    "interactions with wide dense": (lambda: interactions(many(), a()), "width 4 is no multiple of 12"),
    "dropout of everything": (lambda: dropout(a(), 1), "give a rate with 0 <= rate < 1"),
    "dropout of NaN": (lambda: dropout(a(), math.nan), "give a rate"),
    "dropout of text": (lambda: dropout(a(), "0.5"), "give a rate"),
    "dropout of no node": (lambda: dropout(0.5, 0.5), "expected a node, got float"),
    "interactions of one field": (
        lambda: interactions(None, a()),
        r"interactions\(None, a\): give a lookup.*two fields",
    ),
    "interactions of a layer": (lambda: interactions(None, relu(many())), "give a lookup"),
    "interactions of nothing": (lambda: interactions(None, None), "expected a node, got NoneType"),
    "interactions of no node": (lambda: interactions(a(), np.ones(4)), "expected a node, got ndarray"),
    "concat of nothing": (lambda: concat([]), "at least one node"),
    "concat of a node": (lambda: concat(a()), "give a list"),
    "widths": (lambda: multiply(a(), a(5)), "widths 4, 5 differ"),
    "wide logit": (lambda: binary_cross_entropy(a(), label="y"), "give a logit of width 1"),
    "sigmoid logit": (lambda: binary_cross_entropy(sigmoid(a(1)), label="y"), "from before the sigmoid"),
    "sigmoid layer": (
        lambda: binary_cross_entropy(Linear(1, activation="sigmoid", name="o")(a()), label="y"),
        "from before the sigmoid",
    ),
    "loss is no loss": (lambda: Model(score=a(1), loss=a(1)), "loss is a lookup node"),
    "wide score": (lambda: Model(score=a(), loss=binary_cross_entropy(a(1), label="y")), "give one of width 1"),
    "score is the loss": (lambda: both(binary_cross_entropy(a(1), label="y")), "a loss is the input"),
    "nothing to train": (lambda: both(dense_input("x", width=1)), "nothing to train"),
    "not reaching the loss": (never_trained, "lookup b feeds the score but does not reach the loss"),
    "feed twice": (lambda: close(concat([a(), a()])), "two feeds are named a"),
    "feed named as the label": (lambda: close(a(name="label")), "two feeds are named label"),
    "two dims": (lambda: close(concat([a(), a(5, "b")])), "table t with dim 5, another one with 4"),
    "layer twice": (lambda: close(Linear(1, name="out")(a())), "two Linears are named out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(InvalidArgument, match=message):
        build()


def test_shared_layer_must_see_one_width():
    shared = Linear(3, name="fc")
    assert len(close(add(shared(a()), shared(a(name="b")))).parameters) == 4
    with pytest.raises(InvalidArgument, match="Linear fc sees widths 4 and 5"):
        close(add(shared(a()), shared(a(5, "b", "u"))))


def test_cost_and_pictures(reference):
    model = reference.neumf()
    lines = cost(model)
    assert {line.operation for line in lines} <= OPERATIONS.keys()
    assert sum(line.parameters for line in lines) == sum(spec.size for spec in model.parameters) == 2761
    assert sum(line.multiplications for line in lines) == 64 * 32 + 32 * 16 + 16 * 8 + 16 + 8 + 1
    assert sum(line.row_floats for line in lines) == 80
    assert len({line.name for line in lines}) == len(lines)
    text = picture(model)
    assert len(text.splitlines()) == len(lines) + 2
    assert next(line for line in text.splitlines() if line.startswith("fc1 ")).split() == [
        "fc1", "linear,", "relu", "32", "2080", "2048", "concat",
    ]  # fmt: skip
    drawn = dot(model)
    assert drawn.count(" -> ") == sum(len(line.inputs) for line in lines)
    assert drawn.count("peripheries") == 1
    assert '"user[8:40]" -> "concat"' in drawn


def test_cost_and_pictures_of_fields():
    rows, x = many(), dense_input("x", width=2)
    bottom = Linear(3, name="bottom")(x)
    products = dropout(interactions(bottom, field_columns(rows, 1, 4)), 0.25)
    model = close(concat([pool(field_columns(rows, 0, 1), 3), bottom, products]))
    lines = {line.name: line for line in cost(model)}
    assert lines["many[each 1:4]"].width == 9
    assert lines["many[each 1:4]"].multiplications == 0
    assert (lines["interactions"].width, lines["interactions"].multiplications) == (6, 18)
    assert (lines["pool"].width, lines["pool"].multiplications) == (1, 3)
    assert sum(line.row_floats for line in lines.values()) == 12
    found = next(line for line in picture(model).splitlines() if line.startswith("interactions "))
    assert found.split() == [
        "interactions",
        "interactions,",
        "3",
        "fields",
        "6",
        "0",
        "18",
        "bottom,",
        "many[each",
        "1:4]",
    ]
    assert next(line for line in picture(model).splitlines() if line.startswith("dropout ")).split() == [
        "dropout", "dropout,", "0.25", "6", "0", "6", "interactions",
    ]  # fmt: skip
    assert '"many" -> "many[each 0:1]"' in dot(model)


def test_shared_parameters_are_counted_once():
    shared = Linear(3, name="fc")
    model = close(add(shared(a()), shared(a(name="b"))))
    assert sum(line.parameters for line in cost(model)) == sum(spec.size for spec in model.parameters) == 15 + 4


def test_neumf_moves_no_columns(reference):
    """Pieces of both lookups are gathered straight to where they are read."""
    model = reference.neumf()
    layout = plan(model.loss, model.score, 16)
    assert not layout.zeros
    assert not any(layout.routes.values())
    tower, top = (node for node in model.loss_nodes if node.operation == "concat")
    for node in (tower, top):
        for group in (layout.values, layout.gradients):
            assert all(group[child].buffer is group[node].buffer for child in node.inputs)
    assert not any(node.operation == "lookup" for node in layout.values)


def test_parts_of_every_field_are_gathered_to_where_they_are_read():
    rows, x = many(), dense_input("x", width=2)
    deep = field_columns(rows, 1, 4)
    hidden = concat([deep, x])
    model = close(concat([pool(field_columns(rows, 0, 1), 3), Linear(4, activation="relu", name="fc")(hidden)]))
    layout = plan(model.loss, model.score, 16)
    assert not layout.moves[hidden]
    assert not layout.zeros
    assert not any(layout.routes.values())
    assert rows not in layout.values
    assert layout.values[deep].buffer is layout.values[hidden].buffer
    assert layout.gradients[deep].buffer is layout.gradients[hidden].buffer


def test_a_lookup_may_be_the_score_and_read_in_pieces():
    row = a(1)
    model = Model(score=row, loss=binary_cross_entropy(columns(row, 0, 1), label="y"))
    program = model.bind(2)
    feeds = {"a": (np.array([[2], [3]], np.float32), np.array([1, 0], np.int32)), "y": np.zeros(2, np.float32)}
    program.train(feeds, 2)
    np.testing.assert_array_equal(program.predict(feeds, 2), [3, 2])
    assert (program.row_gradients["a"] > 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_blas_never_reads_what_it_writes(seed, reference):
    model = reference.random_model(seed)
    layout = plan(model.loss, model.score, 8)
    for node in model.loss_nodes:
        if node.operation == "linear":
            source = layout.values[node.inputs[0]]
            assert not np.may_share_memory(source.matrix, layout.values[node].matrix)
            target = layout.targets[node][0]
            if target is not None:
                assert not np.may_share_memory(target.matrix, layout.gradients[node].matrix)


@pytest.mark.parametrize("seed", range(30))
def test_no_two_values_share_a_column(seed, reference):
    model = reference.random_model(seed)
    layout = plan(model.loss, model.score, 8)
    pieces = {piece.node for row in layout.pieces.values() for piece in row}
    seen: dict[tuple[int, int], object] = {}
    for node, strip in layout.values.items():
        if node.operation == "concat" or (node.operation == "columns" and node not in pieces):
            continue
        for column in range(strip.start, strip.start + strip.width):
            assert seen.setdefault((id(strip.buffer), column), node) is node
