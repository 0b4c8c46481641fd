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
            swept = [[table.sweep(block, tick=step) for block in range(2)] for table in tables]
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
