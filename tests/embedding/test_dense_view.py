# SPDX-License-Identifier: Apache-2.0
"""Views of dense blocks, of a parameter alone and of a group: what they were when the view began, and which changed."""

import numpy as np
import pytest

from oarlock.embedding.dense import DenseParameter
from oarlock.embedding.dense_group import DenseGroup
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec
from oarlock.proto.errors import InvalidArgument

SPECS = (
    DenseSpec("a", (7, 3), OptimizerSpec("adam"), Initializer("normal"), 8),
    DenseSpec("b", (5,), OptimizerSpec("sgd"), Initializer("normal"), 8),
)


class Alone:
    """One parameter, with the calls of a group."""

    def __init__(self):
        self.parameter = DenseParameter(SPECS[0], seed=3)
        self.places = [(self.parameter, block) for block in range(3)]
        self.begin_view, self.commit_view = self.parameter.begin_view, self.parameter.commit_view

    def push(self, block, bad=False):
        gradient = np.full(self.parameter.length(block), np.nan if bad else 1, np.float32)
        self.parameter.push_block(block, gradient, rate=0.1)


class Together:
    def __init__(self):
        self.group = DenseGroup(SPECS, seed=3)
        first, second = self.group.parameters
        self.places = [(first, 0), (first, 1), (first, 2), (second, 0)]
        self.begin_view, self.commit_view = self.group.begin_view, self.group.commit_view

    def push(self, block, bad=False):
        gradient = np.full(int(self.group.lengths[block]), np.nan if bad else 1, np.float32)
        self.group.push(np.array([block]), np.zeros(1, np.int64), gradient, rate=0.1)


@pytest.fixture(params=[Alone, Together])
def some(request):
    some = request.param()
    for parameter, block in some.places:
        parameter.adopt(block)
    return some


def as_bytes(content):
    return content.weights.tobytes(), content.state.tobytes()


def now(some, number):
    parameter, block = some.places[number]
    return as_bytes(parameter.export_block(block))


@pytest.mark.parametrize("seed", range(3))
def test_a_view_gives_what_was_and_tells_what_changed_since_the_committed_one(some, seed):
    rng = np.random.default_rng(seed)
    many = len(some.places)
    disk, changed = {}, dict.fromkeys(range(many), True)
    unchanged = 0
    for number in range(40):
        for block in rng.integers(many, size=rng.integers(3)).tolist():
            some.push(block)
            changed[block] = True
        if number % 7 == 5:
            parameter, block = some.places[1]
            content = parameter.export_block(block)
            if number % 2:
                parameter.import_block(block, content)
            else:
                parameter.drop(block)
                parameter.adopt(block)
            changed[1] = True
        before = {block: now(some, block) for block in range(many)}
        view = some.begin_view(number)
        assert (view.number, view.blocks.tolist()) == (number, list(range(many)))
        since = set()
        for block in range(many):
            for other in rng.integers(many, size=rng.integers(3)).tolist():
                some.push(other)
                since.add(other)
            assert as_bytes(view.content(block)) == before[block]
            assert view.changed(block) == changed[block]
            if not changed[block]:
                assert disk[block] == before[block]
                unchanged += 1
            if rng.random() < 0.5:
                view.release(block)
                with pytest.raises(InvalidArgument, match="released"):
                    view.content(block)
        if number % 3 != 1:
            assert some.commit_view(number)
            disk, changed = before, {block: block in since for block in range(many)}
        else:
            changed |= dict.fromkeys(since, True)
        assert not some.commit_view(number - 1)
    assert unchanged > 10


def test_a_view_keeps_a_block_that_went_or_was_replaced_until_it_is_released(some):
    before = [now(some, number) for number in range(3)]
    view = some.begin_view(1)
    some.push(0)
    for number in (0, 2):
        parameter, block = some.places[number]
        content = parameter.export_block(block)
        parameter.import_block(block, content)
        some.push(number)
    some.places[1][0].drop(some.places[1][1])
    assert [as_bytes(view.content(number)) for number in range(3)] == before
    later = some.begin_view(2)
    with pytest.raises(InvalidArgument, match="released"):
        view.content(2)
    assert later.blocks.tolist() == [0, *range(2, len(some.places))]
    with pytest.raises(InvalidArgument, match="dense block 1 was not stored here when view 2 began"):
        later.content(1)
    later.close()
    later.close()
    with pytest.raises(InvalidArgument, match="an integer from 0 on"):
        some.begin_view(-1)


def test_a_refused_gradient_changes_nothing_of_a_view(some):
    before = now(some, 0)
    view = some.begin_view(1)
    some.push(0, bad=True)
    assert as_bytes(view.content(0)) == before


def test_a_parameter_of_a_group_has_no_views_of_its_own():
    parameter = Together().group.parameters[0]
    for act in (parameter.begin_view, parameter.commit_view):
        with pytest.raises(InvalidArgument, match="begun and committed by that"):
            act(1)
