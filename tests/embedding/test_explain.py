# SPDX-License-Identifier: Apache-2.0
"""What a table tells of one key: of a row, of a key that waits, of one nobody pushed; and that it is plain JSON."""

import json

import numpy as np
import pytest
import table_reference

from oarlock.embedding.spec import Admission, Eviction, Guard, OptimizerSpec, TableSpec
from oarlock.proto.errors import InvalidArgument, StalePlacement


def test_a_row_a_waiting_key_and_an_absent_one():
    spec = TableSpec(
        "t",
        2,
        OptimizerSpec("adagrad"),
        blocks=2,
        admission=Admission("count", 2),
        eviction=Eviction(age=5, occurrences=3, norm=0.5, score=0.25, decay=0.5),
        guard=Guard(undo=2),
    )
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    for step, keys in ((3, [1, 2]), (4, [1]), (6, [1])):
        table_reference.push(table, keys, step=step, clicks=np.ones(len(keys), np.float32))
        for key in keys:
            model.push(key, np.ones(2, np.float32), 0.125, step, 1, 1.0)
    row = table.explain(1, tick=9)
    json.dumps(row)
    assert (row["table"], row["key"], row["block"]) == ("t", 1, model.block(1))
    assert (row["present"], row["occurrences"], row["last_update"], row["age"]) == (True, 3, 6, 3)
    assert (row["shows"], row["clicks"], row["score"], row["undo_kept"]) == (2.0, 2.0, 2.0, 2)
    assert np.array(row["weights"], np.float32).tobytes() == model.pull(1).tobytes()
    assert row["norm"] == pytest.approx(float(np.linalg.norm(model.pull(1).astype(np.float64))))
    assert np.array(row["state"], np.float32).tobytes() == model.rows[1].state.tobytes()
    assert row["eviction"] == {
        "age": {"limit": 5, "now": 3},
        "occurrences": {"least": 3, "now": 3},
        "norm": {"least": 0.5},
        "score": {"least": 0.25, "now": 2.0},
    }
    assert table.explain(1)["age"] is None
    for key, waited in ((2, 1), (3, 0)):
        found = table.explain(key)
        json.dumps(found)
        assert (found["present"], found["reads_as"]) == (False, "first")
        assert found["admission"] == {"kind": "count", "occurrences": waited, "needed": 2}
        assert np.array(found["weights"], np.float32).tobytes() == model.first(key).tobytes()
        assert "state" not in found


def test_what_is_no_key_and_a_block_that_is_elsewhere_are_refused():
    table = table_reference.stored(TableSpec("t", 1, blocks=1))
    for key in (-1, 1 << 64, 1.0, True, "1", np.uint64(1)):
        with pytest.raises(InvalidArgument, match="give an integer from 0"):
            table.explain(key)
    assert not table.explain((1 << 64) - 1)["present"]
    table.drop(0)
    with pytest.raises(StalePlacement):
        table.explain(0)
