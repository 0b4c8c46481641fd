# SPDX-License-Identifier: Apache-2.0
import embedding_reference as reference
import numpy as np
import optimizer_reference
import pytest

from oarlock.embedding.dense import DenseBlock, DenseParameter
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement


def make(optimizer="adam", shape=(5, 4), slice_=8, kind="normal"):
    optimizer = OptimizerSpec(optimizer) if isinstance(optimizer, str) else optimizer
    parameter = DenseParameter(DenseSpec("w", shape, optimizer, Initializer(kind), slice_), seed=3)
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


FULL = {"clip_value": 1.2, "l1": 0.1, "l2": 0.05, "lower": -0.3, "upper": 0.4}
CUT = [name for name, optimizer in OPTIMIZERS.items() if not optimizer.norms]


@pytest.mark.parametrize("more", [{}, FULL], ids=["plain", "with all passes"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pushes_equal_the_twin_and_do_not_depend_on_the_cut_where_there_is_no_norm(name, more):
    optimizer = OptimizerSpec(name, **(optimizer_reference.CONSTANTS[name] | more))
    one = make(optimizer, slice_=100)
    weights = whole(one)
    state = one.export_block(0).state
    gradients = [np.random.default_rng(step).normal(size=20).astype(np.float32) for step in range(1, 6)]
    for step, gradient in enumerate(gradients, 1):
        assert one.push_block(0, np.frombuffer(gradient.tobytes(), np.float32), rate=0.1, step=step)
        optimizer_reference.twin(optimizer, weights, state, gradient, 0.1, step)
    assert whole(one).tobytes() == weights.tobytes()
    assert one.export_block(0).state.tobytes() == state.tobytes()
    if name in CUT:
        cut = make(optimizer)
        for step, gradient in enumerate(gradients, 1):
            for block in range(3):
                assert cut.push_block(block, gradient[8 * block : 8 * block + 8], rate=0.1, step=step)
        assert whole(cut).tobytes() == weights.tobytes()


def test_the_rate_follows_the_schedule():
    scheduled = make(OptimizerSpec("sgd", schedule=Schedule("step", every=2, gamma=0.5)))
    constant = make("sgd")
    gradient = np.linspace(-1, 1, 8, dtype=np.float32)
    for step, rate in ((1, 0.1), (2, 0.1), (3, 0.05), (4, 0.05), (5, 0.025)):
        scheduled.push_block(0, gradient, rate=0.1, step=step)
        constant.push_block(0, gradient, rate=rate)
    assert whole(scheduled).tobytes() == whole(constant).tobytes()


def test_lamb_takes_a_parameter_that_is_one_block():
    with pytest.raises(InvalidArgument, match=r"dense w: lamb needs the norm of the whole .*: give slice >= 20"):
        make("lamb")
    assert make("lamb", slice_=20).owned.tolist() == [0]


def test_the_step_counts_where_the_bias_goes_by_it():
    gradient = np.linspace(-1, 1, 8, dtype=np.float32)
    for bias, same in (("row", True), ("step", False)):
        first, later = (make(OptimizerSpec("adam", bias=bias)) for _ in range(2))
        first.push_block(0, gradient, rate=0.1, step=1)
        later.push_block(0, gradient, rate=0.1, step=1000)
        assert (whole(first).tobytes() == whole(later).tobytes()) is same
    for step in (-1, 1.0, True, 1 << 63):
        with pytest.raises(InvalidArgument, match=r"step = .*give an integer from 0 to 2\^63 - 1"):
            first.push_block(0, gradient, rate=0.1, step=step)


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
