# SPDX-License-Identifier: Apache-2.0
"""Undo gives back the values before the last updates, newest first, each once; what keeps none says so."""

import numpy as np
import pytest
import table_reference

from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Guard, OptimizerSpec, TableSpec
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [1, 3])
def test_values_come_back_newest_first_as_often_as_they_were_kept(dtype, kept):
    spec = TableSpec("t", 3, OptimizerSpec("adam"), blocks=2, dtype=dtype, guard=Guard(undo=kept), usage=True)
    table, keys = table_reference.stored(spec), [0, 5, 6]
    history = []
    for step in range(1, 6):
        history.append(table_reference.content(table)[0])
        table_reference.push(table, keys, np.full((3, 3), step, np.float32), step=step)
    counters = {key: row[-8:] for key, row in table_reference.content(table)[0].items()}
    for back in range(1, kept + 1):
        assert table.undo(np.array([5, 99, 0], np.uint64)).tolist() == [1, 0, 1]
        found, before = table_reference.content(table)[0], history[-back]
        assert found[5][:-8] == before[5][:-8]
        assert found[0][:-8] == before[0][:-8]
        assert found[5][-8:] == counters[5]  # counters stay
    assert table.undo(np.array([5], np.uint64), steps=9).tolist() == [0]
    assert table.undo(np.array([6, 6], np.uint64), steps=9).tolist() == [kept, 0]
    assert table_reference.content(table)[0][6][:-8] == history[-kept][6][:-8]


def test_undo_counts_as_a_change_and_skips_blocks_that_are_elsewhere():
    table = table_reference.stored(TableSpec("t", 1, blocks=2, guard=Guard(undo=1)))
    table_reference.push(table, range(20))
    versions = [table.version(block) for block in range(2)]
    table.drop(1)
    done = table.undo(np.arange(30, dtype=np.uint64))
    assert 0 < done.sum() == table.rows < 20
    assert table.version(0) == versions[0] + 1
    table.undo(np.arange(30, dtype=np.uint64))
    assert table.version(0) == versions[0] + 1


def test_a_table_without_old_values_and_fewer_than_one_step_are_refused():
    with pytest.raises(InvalidArgument, match="keeps no old values"):
        table_reference.stored(TableSpec("t", 1)).undo(np.zeros(1, np.uint64))
    with pytest.raises(InvalidArgument, match="give 1 or more"):
        table_reference.stored(TableSpec("t", 1, guard=Guard(undo=1))).undo(np.zeros(1, np.uint64), steps=0)
