# SPDX-License-Identifier: Apache-2.0
"""Which rows leave, exactly: by each rule of a sweep, by slices of it, and for a byte budget."""

import numpy as np
import pytest
import table_reference

from oarlock.embedding.spec import Eviction, OptimizerSpec, TableSpec

KEYS = list(range(300))
RULES = {
    "age": Eviction(age=3),
    "occurrences": Eviction(occurrences=3),
    "norm": Eviction(norm=0.6),
    "score": Eviction(score=0.35, decay=0.7),
    "all": Eviction(age=5, occurrences=2, norm=0.4, score=0.2),
}


def trained(spec):
    """Return a table and its twin after rows were pushed unevenly often, at different steps."""
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    for block in range(spec.blocks):
        model.adopt(block)
    rng = np.random.default_rng(3)
    for step in range(1, 9):
        keys = rng.permutation(KEYS)[:120].tolist()
        gradients = rng.normal(size=(120, 2)).astype(np.float32)
        amounts = rng.integers(1, 3, 120).astype(np.uint32)
        clicks = rng.random(120).astype(np.float32)
        table_reference.push(table, keys, gradients, step=step, occurrences=amounts, clicks=clicks)
        for key, gradient, amount, click in zip(keys, gradients, amounts.tolist(), clicks, strict=True):
            model.push(key, gradient, 0.125, step, amount, click)
    assert table_reference.content(table)[0] == model.content()
    return table, model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("buckets", [1, 7, 10_000])
def test_a_sweep_in_slices_takes_away_what_the_rule_says_once_and_says_so(rule, buckets):
    table, model = trained(TableSpec("t", 2, OptimizerSpec("sgd"), blocks=2, eviction=RULES[rule]))
    before = table.rows
    for block in range(2):
        version, left, slices, wrapped = table.version(block), 0, 0, False
        while not wrapped:
            gone, wrapped, _, _ = table.sweep(block, tick=10, buckets=buckets)
            left, slices = left + gone, slices + 1
        expected = model.sweep(block, 10)
        assert 0 < len(expected) < 150
        keys, versions = table.tombstones(block, since=version)
        assert sorted(keys.tolist()) == sorted(expected)
        assert left == len(expected)
        assert (np.diff(versions) >= 0).all()
        assert versions[0] > version
        assert slices == 1 or buckets < 10_000
        assert table.version(block) > version
    assert table_reference.content(table)[0] == model.content()
    assert table.evicted == before - len(model.rows) > 0


def test_a_sweep_that_only_decays_is_a_change_of_the_block():
    table, model = trained(TableSpec("t", 2, blocks=1, eviction=Eviction(score=1e-6, decay=0.5)))
    version = table.version(0)
    assert table.sweep(0, tick=1)[:2] == (0, True)
    assert model.sweep(0, 1) == []
    assert table_reference.content(table)[0] == model.content()
    assert table.version(0) == version + 1


@pytest.mark.parametrize("order", ["recent", "frequent"])
def test_over_its_budget_a_block_loses_exactly_the_rows_that_are_last_in_order(order):
    spec = TableSpec("t", 2, OptimizerSpec("sgd"), blocks=1, eviction=Eviction(max_bytes=1, order=order))
    table, model = table_reference.stored(spec), table_reference.Model(spec, 7)
    model.adopt(0)
    ones = np.ones(2, np.float32)
    rng = np.random.default_rng(1)
    for step in range(1, 40):
        keys = rng.choice(40, 3, replace=False).tolist()
        version = table.version(0)
        table_reference.push(table, keys, step=step)
        gone, versions = table.tombstones(0, since=version)
        for one in np.unique(versions).tolist():
            absent = sum(key not in model.rows for key in keys)
            expected = model.oldest(0, len(model.rows) + absent - 16 + 1)  # 16 is the least budget; and a tenth more
            assert sorted(gone[versions == one].tolist()) == sorted(expected)
        for key in keys:
            model.push(key, ones, 0.125, step)
        assert len(model.rows) <= 16
        assert table_reference.content(table)[0] == model.content()
    assert table.evicted > 10
