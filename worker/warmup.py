# SPDX-License-Identifier: Apache-2.0
"""Warm-up of a worker: compile, or load from the cache, the kernels of every layer before joining a job.

A process that compiles holds the interpreter lock and cannot renew its lease.
"""

import numpy as np

from oarlock.client.cache import warm_up as warm_up_cache
from oarlock.data.negatives import NegativeSampler, group_positives
from oarlock.data.order import permutation
from oarlock.data.ranking import rank_lists
from oarlock.embedding.keys import KeySorter
from oarlock.embedding.warmup import warm_up_compression
from oarlock.nn import (
    Linear,
    Model,
    add,
    binary_cross_entropy,
    columns,
    concat,
    dense_input,
    dropout,
    field_columns,
    interactions,
    lookup,
    multiply,
    pair_tiles,
    pool,
    relu,
    sigmoid,
    tanh,
    tiled,
)


def warm_up() -> None:
    """Train a step of a graph that has every layer, and call the data kernels once."""
    row, other, x = lookup("a", table="a", dim=4), lookup("b", table="b", dim=4), dense_input("x", width=4)
    pair = lookup("c", table="a", dim=4, fields=2)
    product = multiply(columns(row, 0, 2), columns(other, 0, 2))
    hidden = Linear(4, activation="relu", name="h")(concat([columns(row, 2, 4), columns(other, 2, 4), x]))
    deep = tanh(sigmoid(relu(Linear(4, name="i")(add(hidden, x)))))
    many = pool(
        concat([field_columns(row, 1, 3), columns(pair, 3, 5), interactions(deep, row), columns(other, 1, 2)]), 2
    )
    score = Linear(1, name="o")(concat([product, dropout(deep, 0.5), many]))
    program = Model(score=score, loss=binary_cross_entropy(score, label="label")).bind(8)
    keys = np.arange(8, dtype=np.uint64)
    found = KeySorter().build(keys, np.uint64(1), 1, np.arange(2, dtype=np.int32))
    rows = np.ones((8, 4), np.float32)
    feeds = {"a": (rows, found.inverse), "b": (rows, found.inverse), "x": rows, "label": np.ones(8, np.float32)}
    feeds["c"] = (rows, np.stack([found.inverse, found.inverse], axis=1))
    program.train(feeds, 8, step=0)
    program.predict(feeds, 8)
    tiled.warm_up()
    pair_tiles.warm_up()
    permutation(8, 0, 1)
    positives = group_positives(keys, keys)
    NegativeSampler(positives, keys, per_positive=1, seed=0).draw(keys, epoch=0, split=0, batch=0)
    warm_up_cache()
    rank_lists(np.ones(8, np.float32), np.array([0, 4, 8], np.int64), keys)
    warm_up_compression()
