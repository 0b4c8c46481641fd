# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding.dense import DenseBlock, DenseParameter
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement


def make(optimizer="adam", shape=(5, 4), slice_=8, kind="normal"):
    parameter = DenseParameter(DenseSpec("w", shape, OptimizerSpec(optimizer), Initializer(kind), slice_), seed=3)
    for block in range(parameter.spec.blocks):
        parameter.adopt(block)
    return parameter


def whole(parameter):
    parts = []
    for block in range(parameter.spec.blocks):
        out = np.empty(parameter.length(block), np.float32)
        parameter.pull_block(block, out)
        parts.append(out)
    return np.concatenate(parts)


def test_blocks_cut_the_flat_values_and_the_last_is_shorter():
    parameter = make()
    assert [parameter.length(block) for block in range(3)] == [8, 8, 4]
    assert [parameter.state_length(block) for block in range(3)] == [17, 17, 9]
    assert parameter.owned.tolist() == [0, 1, 2]
    expected = [reference.first_value(3, "dense/w", i, 0, "normal", 0.0, 0.01) for i in range(20)]
    assert whole(parameter).tobytes() == np.array(expected, np.float32).tobytes()
    assert make(slice_=3).nbytes > parameter.nbytes


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_pushes_equal_the_twin_and_do_not_depend_on_the_cut(optimizer):
    cut, one = make(optimizer), make(optimizer, slice_=100)
    weights, state = whole(one), reference.first_state(one.spec.optimizer, 20)
    for step in range(5):
        gradient = np.random.default_rng(step).normal(size=20).astype(np.float32)
        for block in range(3):
            assert cut.push_block(block, gradient[8 * block : 8 * block + 8], rate=0.1)
        assert one.push_block(0, np.frombuffer(gradient.tobytes(), np.float32), rate=0.1)
        reference.update(one.spec.optimizer, weights, state, gradient, 0.1)
    assert whole(cut).tobytes() == whole(one).tobytes() == weights.tobytes()
    assert one.export_block(0).state.tobytes() == state.tobytes()


def test_a_gradient_that_is_not_finite_changes_nothing():
    parameter = make()
    before = parameter.export_block(1)
    gradient = np.ones(8, np.float32)
    gradient[5] = np.nan
    assert parameter.push_block(1, gradient, rate=0.1) is False
    after = parameter.export_block(1)
    assert before.weights.tobytes() == after.weights.tobytes()
    assert before.state.tobytes() == after.state.tobytes()


def test_a_block_moves_and_trains_on():
    quiet, moved = make(), make()
    gradient = np.linspace(-1, 1, 8, dtype=np.float32)
    other = DenseParameter(moved.spec, seed=3)
    for parameter in (quiet, moved):
        parameter.push_block(0, gradient, rate=0.1)
    other.import_block(0, moved.export_block(0))
    for parameter in (quiet, other):
        parameter.push_block(0, gradient, rate=0.1)
    assert quiet.export_block(0).weights.tobytes() == other.export_block(0).weights.tobytes()
    assert quiet.export_block(0).state.tobytes() == other.export_block(0).state.tobytes()


def test_an_export_is_a_copy_and_so_is_an_import():
    parameter = make("sgd", kind="zeros")
    out = parameter.export_block(0)
    out.weights[:] = 5
    assert (parameter.export_block(0).weights == 0).all()
    parameter.import_block(0, out)
    out.weights[:] = 6
    assert (parameter.export_block(0).weights == 5).all()


def test_what_does_not_fit_is_refused():
    parameter = make("adagrad")
    good = np.ones(8, np.float32)
    for wrong in (np.ones(7, np.float32), np.ones(8), np.ones((8, 1), np.float32)):
        with pytest.raises(Malformed, match=r"expected float32\[8\]"):
            parameter.push_block(0, wrong, rate=0.1)
        with pytest.raises(Malformed, match=r"expected float32\[8\]"):
            parameter.pull_block(0, wrong)
        with pytest.raises(Malformed, match=r"state is .*expected float32\[8\]"):
            parameter.import_block(0, DenseBlock(good, wrong))
    with pytest.raises(Malformed, match="infinity or NaN"):
        parameter.import_block(0, DenseBlock(good, good * np.float32(np.inf)))
    with pytest.raises(InvalidArgument, match="rate"):
        parameter.push_block(0, good, rate=float("inf"))
    with pytest.raises(InvalidArgument, match=r"block 3 is not in \[0, 3\)"):
        parameter.adopt(3)
    with pytest.raises(InvalidArgument, match="stored here already"):
        parameter.adopt(0)
    parameter.drop(0)
    for call in (
        lambda: parameter.drop(0),
        lambda: parameter.export_block(0),
        lambda: parameter.pull_block(0, good),
        lambda: parameter.push_block(0, good, rate=0.1),
    ):
        with pytest.raises(StalePlacement, match="dense w: block 0 is not stored here"):
            call()
