# SPDX-License-Identifier: Apache-2.0
"""Some rows of a block are those of the whole block, wherever they are kept: in memory, in the spill file, in two halves."""

import numpy as np
import pytest

from oarlock.embedding.keys import KeySorter
from oarlock.embedding.lookup import counter_names, row_bytes, rows_from, rows_of
from oarlock.embedding.make import make_table
from oarlock.embedding.spec import Admission, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec

ADAM = OptimizerSpec("adam")
COUNT = Admission("count", occurrences=2)
SPECS = {
    "plain": TableSpec("t", 3, ADAM, Initializer("normal", 0.1), 4),
    "undo": TableSpec("t", 3, ADAM, Initializer("normal", 0.1), 4, guard=Guard(undo=2), usage=True),
    "int8": TableSpec("t", 3, ADAM, Initializer("normal", 0.1), 4, dtype="int8", eviction=Eviction(age=9)),
    "waiting": TableSpec("t", 3, ADAM, Initializer("normal", 0.1), 4, admission=COUNT),
    "spilled": TableSpec("t", 3, ADAM, Initializer("normal", 0.1), 4, memory_bytes=1, admission=COUNT),
    "expanding": TableSpec("t", 3, parts=(Part(1), Part(2)), blocks=4, expand_score=2.5),
}


@pytest.fixture(params=SPECS)
def table(request, tmp_path):
    made = make_table(SPECS[request.param], seed=3, spill_folder=tmp_path)
    for block in range(4):
        made.adopt(block)
    sorter, rng = KeySorter(), np.random.default_rng(5)
    for step in range(1, 5):
        # Late keys have come once: they wait, where keys wait.
        raw = np.concatenate(
            [np.arange(200, dtype=np.uint64) * 7, np.arange(step * 1000, step * 1000 + 40, dtype=np.uint64)]
        )
        found = sorter.build(raw, made.salt, made.bits, np.arange(4, dtype=np.int32))
        gradients = rng.standard_normal((len(found.keys), 3)).astype(np.float32)
        made.push(found.keys, found.blocks, found.counts, gradients, rate=0.1, step=step)
    yield made
    made.close()


def lines(rows):
    """Return the rows as {key: bytes}."""
    columns = zip(rows.keys.tolist(), rows.weights, rows.state, rows.counters, strict=True)
    return {key: b"".join(c.tobytes() for c in values) for key, *values in columns}


def test_a_walk_of_runs_is_the_block(table):
    for block in range(4):
        whole = lines(table.export_block(block))
        least, seen, more = 0, [], True
        while more:
            rows, more = rows_from(table, block, least, 7)
            assert (len(rows.keys) == 7) >= more
            assert lines(rows) == {key: whole[key] for key in rows.keys.tolist()}
            seen += rows.keys.tolist()
            least = seen[-1] + 1
        assert seen == sorted(whole)
        assert len(rows_from(table, block, least, 7)[0].keys) == 0


def test_rows_of_keys_are_those_that_are_there(table):
    for block in range(4):
        whole = lines(table.export_block(block))
        keys = np.array([*list(whole)[::3], 5, 1003, (1 << 64) - 1], np.uint64)
        assert lines(rows_of(table, block, keys)) == {k: whole[k] for k in keys.tolist() if k in whole}
        before = table.version(block)
        assert rows_of(table, block, np.empty(0, np.uint64)).weights.shape == (0, 3)
        assert table.version(block) == before


def test_a_row_is_as_wide_as_it_is_said_to_be(table):
    (rows, _) = rows_from(table, 0, 0, 1)
    assert row_bytes(table) == 8 + 4 * (rows.weights.shape[1] + rows.state.shape[1] + rows.counters.shape[1])
    assert len(counter_names(table.spec)) == rows.counters.shape[1] == table.counters


def test_such_a_table_does_spill(tmp_path):
    """Or the tests above would say nothing of the file."""
    spec = SPECS["spilled"]
    made = make_table(spec, seed=3, spill_folder=tmp_path)
    made.adopt(0)
    keys = KeySorter().build(np.arange(900, dtype=np.uint64), made.salt, made.bits, np.arange(4, dtype=np.int32))
    first = int(keys.counts[0])
    blocks, counts = keys.blocks[:1], keys.counts[:1]
    for _ in range(2):
        made.push(keys.keys[:first], blocks, counts, np.ones((first, 3), np.float32), rate=0.1)
    assert "was_in" in {name for key in keys.keys[:first].tolist() for name in made.explain(key)}
    made.close()
