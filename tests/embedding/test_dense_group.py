# SPDX-License-Identifier: Apache-2.0
"""What a group does to its blocks in one call is what each parameter does by itself."""

import numpy as np
import pytest

from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.dense_group import DenseGroup
from oarlock.embedding.optimizers import OPTIMIZERS
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement

FULL = {"clip_value": 1.2, "clip_norm": 2.0, "l1": 0.1, "l2": 0.05, "lower": -0.3, "upper": 0.4}


def specs():
    """Every optimizer, with and without all passes and a schedule; blocks of several lengths."""
    halved = Schedule("step", every=2, gamma=0.5)
    return [
        DenseSpec(
            f"{name}{len(more)}", (5, 4), OptimizerSpec(name, **more, schedule=schedule), Initializer("normal"), cut
        )
        for name in OPTIMIZERS
        for more, schedule in (({}, Schedule()), (FULL, halved))
        for cut in ((100,) if name == "lamb" else (8,))
    ]


def both():
    group = DenseGroup(specs(), seed=3)
    alone = [DenseParameter(spec, seed=3) for spec in specs()]
    for parameter in (*group.parameters, *alone):
        for block in range(parameter.spec.blocks):
            parameter.adopt(block)
    blocks = [(p, block) for p, spec in enumerate(specs()) for block in range(spec.blocks)]
    return group, alone, blocks


def content(parameters, blocks):
    return [tuple(part.tobytes() for part in parameters[p].export_block(block)) for p, block in blocks]


def test_a_group_does_what_its_parameters_do_alone():
    group, alone, blocks = both()
    assert group.lengths.tolist() == [alone[p].length(block) for p, block in blocks]
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        chosen = np.sort(rng.choice(len(blocks), 2 * len(blocks) // 3, replace=False))
        # In another order than the blocks', with a gap between: where each begins is what counts.
        order = rng.permutation(len(chosen))
        lengths = group.lengths[chosen]
        starts = np.empty(len(chosen), np.int64)
        starts[order] = np.cumsum(lengths[order] + 3) - lengths[order] - 3
        gradients = rng.normal(size=int((lengths + 3).sum())).astype(np.float32)
        poisoned = starts[rng.integers(len(chosen))]
        gradients[poisoned] = np.inf
        gradients.flags.writeable = False
        refused = group.push(chosen, starts, gradients, rate=0.1, step=step)
        for i, number in enumerate(chosen.tolist()):
            p, block = blocks[number]
            mine = gradients[starts[i] : starts[i] + lengths[i]]
            assert alone[p].push_block(block, mine, rate=0.1, step=step) is not bool(refused[i])
        assert refused.tolist() == (starts == poisoned).tolist()
    assert content(group.parameters, blocks) == content(alone, blocks)
    out = np.empty(int(group.lengths.sum()), np.float32)
    group.pull(np.arange(len(blocks)), out)
    assert out.tobytes() == b"".join(weights for weights, _ in content(alone, blocks))


def test_a_block_that_is_not_here_changes_nothing():
    group, alone, blocks = both()
    group.parameters[1].drop(1)
    before = content(group.parameters, [b for b in blocks if b != (1, 1)])
    gone = blocks.index((1, 1))
    every = np.arange(len(blocks))
    gradients = np.ones(int(group.lengths.sum()), np.float32)
    with pytest.raises(StalePlacement, match=rf"dense block {gone} is not stored here"):
        group.push(every, np.cumsum(group.lengths) - group.lengths, gradients, rate=0.1)
    with pytest.raises(StalePlacement, match="fetch the placement"):
        group.pull(every, np.empty(len(gradients), np.float32))
    assert content(group.parameters, [b for b in blocks if b != (1, 1)]) == before
    # What came back lies elsewhere, and that is where the next push goes.
    group.parameters[1].import_block(1, alone[1].export_block(1))
    group.push(every, np.cumsum(group.lengths) - group.lengths, gradients, rate=0.1)
    alone[1].push_block(1, gradients[:8], rate=0.1)
    assert content(group.parameters, [(1, 1)]) == content(alone, [(1, 1)])


def test_what_does_not_fit_is_refused():
    group, _, _ = both()
    one = np.zeros(1, np.int64)
    for start, size in ((-1, 8), (1, 8), (0, 7)):
        with pytest.raises(Malformed, match="dense gradients came, the blocks reach to"):
            group.push(one, one + start, np.ones(size, np.float32), rate=0.1)
    for out in (np.empty(7, np.float32), np.empty(8), np.empty(16, np.float32)[::2]):
        with pytest.raises(Malformed, match=r"out is .* expected float32\[8\]"):
            group.pull(one, out)
    with pytest.raises(InvalidArgument, match="give a finite number"):
        group.push(one, one, np.ones(8, np.float32), rate=float("nan"))
    with pytest.raises(InvalidArgument, match=r"give an integer from 0"):
        group.push(one, one, np.ones(8, np.float32), rate=0.1, step=-1)
    assert not len(group.push(one[:0], one[:0], np.empty(0, np.float32), rate=0.1))
