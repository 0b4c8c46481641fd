# SPDX-License-Identifier: Apache-2.0
"""A table with a memory budget beside one without: the same in everything, with most rows in the file."""

import dataclasses

import embedding_reference as reference
import numpy as np
import pytest
import table_reference

from oarlock.embedding import cold
from oarlock.embedding.descriptor import ROWS, SPILLED_ROWS
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.spec import Admission, Eviction, OptimizerSpec, TableSpec
from oarlock.embedding.spill_file import SpillFile
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

MANY = 1500 if reference.JIT else 250


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("admission", [Admission(), Admission("count", 2)], ids=["always", "count"])
def test_everything_is_as_without_a_budget_and_most_rows_are_in_the_file(tmp_path, monkeypatch, dtype, admission):
    monkeypatch.setattr(cold, "LEAST_ROWS", 16)
    monkeypatch.setattr(cold, "TIDY_RECORDS", 10)
    small = lambda folder, width, slack: SpillFile(folder, width, limit_bytes=1 << 24, segment_bytes=1024, slack=slack)  # noqa: E731
    monkeypatch.setattr(cold, "SpillFile", small)
    plain = TableSpec(
        "t", 3, OptimizerSpec("adam"), blocks=2, dtype=dtype, admission=admission, usage=True, eviction=Eviction(age=6)
    )
    tables = [
        table_reference.stored(dataclasses.replace(plain, memory_bytes=budget), folder=tmp_path) for budget in (0, 1)
    ]
    rng = np.random.default_rng(2)
    for step in range(1, 13):
        keys = (rng.zipf(1.2, MANY // 5) % MANY).tolist()  # with repeated ones
        gradients = rng.normal(size=(len(keys), 3)).astype(np.float32)
        some = rng.integers(0, MANY, 50).tolist()
        sent = [table_reference.push(table, keys, gradients, step=step) for table in tables]
        assert sent[0] == sent[1]
        pulled = [table_reference.pull(table, some) for table in tables]
        assert pulled[0][0].tobytes() == pulled[1][0].tobytes()
        assert pulled[0][1] == pulled[1][1]
        assert table_reference.content(tables[0]) == table_reference.content(tables[1])
        if step == 8:
            swept = [[table.sweep(block, tick=step)[:2] for block in range(2)] for table in tables]
            assert swept[0] == swept[1]
            assert sum(n for n, _ in swept[0]) > 0 or not reference.JIT
        explained = [table.explain(keys[0], tick=step) for table in tables]
        for found in explained:
            found.pop("slot", None)
            found.pop("was_in", None)
        assert explained[0] == explained[1]
        if step == 10:
            for table in tables:
                table.import_block(0, table.export_block(0))
                table.drop(1)
                table.adopt(1)
        assert tables[0].rows == tables[1].rows
    words = tables[1].descriptors
    assert words[:, SPILLED_ROWS].sum() > words[:, ROWS].sum() or not reference.JIT
    assert table_reference.content(tables[0]) == table_reference.content(tables[1])
    for table in tables:
        table.close()
    assert list(tmp_path.iterdir()) == []


def spilled_table(folder, keys):
    table = table_reference.stored(TableSpec("t", 3, OptimizerSpec("sgd"), blocks=2, memory_bytes=1), folder=folder)
    for _ in range(3):  # those of the first rounds are cold in the last
        for begin in range(0, keys, 200):
            some = list(range(begin, min(begin + 200, keys)))
            table_reference.push(table, some, np.ones((len(some), 3), np.float32))
    return table


def test_a_record_of_another_key_is_an_error_that_names_the_key_and_never_a_value(tmp_path, monkeypatch):
    table = spilled_table(tmp_path, 1000)
    assert table.descriptors[:, SPILLED_ROWS].sum() > 300
    real = cold.ColdRows._read
    monkeypatch.setattr(cold.ColdRows, "_read", lambda self, records: real(self, records)[::-1])
    keys = list(range(1000))
    with pytest.raises(CorruptCheckpoint, match="another row for key"):
        table_reference.pull(table, keys)
    with pytest.raises(CorruptCheckpoint, match="another row for key"):
        table_reference.push(table, keys, np.ones((1000, 3), np.float32))
    monkeypatch.undo()
    table_reference.pull(table, keys)
    table.close()


def test_nothing_goes_to_the_file_while_it_is_tidied(tmp_path):
    table = spilled_table(tmp_path, 1000)
    written = table._cold.file.counts.records_written
    with table._cold._lock:
        table._cold.spill_over(table.owned)
        table_reference.pull(table, list(range(300)))
        table._cold.spill_over(table.owned)
    assert table._cold.file.counts.records_written == written
    table._cold.spill_over(table.owned)
    assert table._cold.file.counts.records_written > written
    table.close()


@pytest.mark.parametrize("block", [-1, 2, 1 << 40])
def test_a_block_that_cannot_be_is_refused_before_its_lock_is_touched(tmp_path, block):
    table = table_reference.stored(TableSpec("t", 3, blocks=2), folder=tmp_path)
    for call in (table.tombstones, lambda b: table.sweep(b, tick=1), lambda b: table.forget_tombstones(b, until=1)):
        with pytest.raises(InvalidArgument, match="is not in"):
            call(block)
