# SPDX-License-Identifier: Apache-2.0
"""What the tests of expanding tables share. Loaded by conftest under the name ``expanding_rig``."""

import embedding_reference as reference
import numpy as np

from oarlock.embedding.expanding import ExpandingTable
from oarlock.embedding.make import make_table
from oarlock.embedding.schedule import Schedule
from oarlock.embedding.spec import Initializer, OptimizerSpec, Part, TableSpec

MANY = reference.MANY
PARTS = (
    Part(1, OptimizerSpec("ftrl", l1=0.01), Initializer("normal", 0.0, 0.1)),
    Part(2, OptimizerSpec("adagrad", schedule=Schedule("exponential", gamma=0.5)), Initializer("uniform", 0.0, 0.5)),
    Part(1, OptimizerSpec("adam", bias="step"), Initializer("normal", 1.0, 0.1)),
)
SPEC = TableSpec("t", 4, parts=PARTS, blocks=8, expand_score=0.25)


def make(spec=SPEC, *, adopt=True):
    table = make_table(spec, seed=7)
    if adopt:
        for block in range(spec.blocks):
            table.adopt(block)
    return table


def push(table, keys, gradients=None, *, occurrences=None, clicks=None, rate=0.1, step=1):
    """Push distinct ``keys``, with a gradient of ones each unless given."""
    gradients = np.ones((len(keys), table.spec.dim), np.float32) if gradients is None else gradients
    found, inverse, blocks, counts = reference.group(table.spec.name, table.bits, keys)
    grouped = np.empty_like(gradients)
    grouped[inverse] = gradients
    more = {}
    for name, values, kind in (("occurrences", occurrences, np.uint32), ("clicks", clicks, np.float32)):
        if values is not None:
            more[name] = np.empty(len(keys), kind)
            more[name][inverse] = values
    return table.push(found, blocks, counts, grouped, rate=rate, step=step, **more)


def pull(table, keys):
    found, inverse, blocks, counts = reference.group(table.spec.name, table.bits, keys)
    rows = np.full((len(found), table.spec.dim), np.nan, np.float32)
    present = table.pull(found, blocks, counts, rows)
    return rows[inverse], present


def content(table):
    """Return {key: (weights, state, counters) as bytes}; every expanded row must be one of those that there are."""
    found = {}
    for block in table.owned.tolist():
        rows = table.export_block(block)
        for i, key in enumerate(rows.keys.tolist()):
            assert key not in found
            found[key] = (rows.weights[i].tobytes(), rows.state[i].tobytes(), rows.counters[i].tobytes())
    if isinstance(table, ExpandingTable):
        others = np.concatenate([table.wide.export_block(block).keys for block in table.owned.tolist()])
        assert set(others.tolist()) <= set(found)
        assert len(others) == table.expanded
    return found


def random_batch(rng, highest=None):
    keys = np.unique(rng.integers(0, highest or MANY // 3, MANY // 3, dtype=np.uint64))
    return keys, rng.normal(size=(len(keys), 4)).astype(np.float32)
