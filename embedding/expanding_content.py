# SPDX-License-Identifier: Apache-2.0
"""A block's content where rows begin narrow: made of the contents of the two tables, and cut into them again.

Invariant: ``cut`` undoes ``joined``, but for the order of keys. A row that is not expanded has zeros, and the state that is given
for it, behind its first part; its last counter is 0, that of an expanded row 1. Pure functions, any thread.
"""

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.content import BlockRows
from oarlock.embedding.pointer import kernel_array
from oarlock.proto.errors import Malformed


def joined(rows: BlockRows, others: BlockRows, beginning: NDArray[np.float32]) -> BlockRows:
    """Return whole rows: the first parts ``rows``, and behind them ``others`` of some of their keys.

    beginning: float32[columns of the others' state], which stands where there are no others.
    """
    n, width = rows.weights.shape
    columns, counted = rows.state.shape[1], rows.counters.shape[1]
    weights = np.zeros((n, width + others.weights.shape[1]), np.float32)
    state = np.empty((n, columns + len(beginning)), np.float32)
    counters = np.zeros((n, counted + 1), np.uint32)
    weights[:, :width] = rows.weights
    state[:, :columns] = rows.state
    state[:, columns:] = beginning
    counters[:, :counted] = rows.counters
    if len(others.keys):
        order = np.argsort(rows.keys)
        where = order[np.searchsorted(rows.keys, others.keys, sorter=order)]
        weights[where, width:] = others.weights
        state[where, columns:] = others.state
        counters[where, counted] = 1
    return rows._replace(weights=weights, state=state, counters=counters)


def cut(
    content: BlockRows, owner: str, *, width: int, dim: int, columns: int, all_columns: int, counters: int
) -> tuple[BlockRows, BlockRows]:
    """Return first parts, and the others of those rows that have them; Malformed, in the name of ``owner``, unless it fits.

    ``width`` of ``dim`` weights and ``columns`` of ``all_columns`` of state belong to the first part. A content without
    counters, as a table of whole rows may have written it, is one of expanded rows.
    """
    keys = kernel_array("keys", content.keys, np.uint64)
    weights = kernel_array("weights", content.weights, np.float32, 2)
    state = kernel_array("state", content.state, np.float32, 2)
    counted = kernel_array("counters", content.counters, np.uint32, 2)
    n = len(keys)
    shapes = [("weights", weights.shape, dim), ("state", state.shape, all_columns)]
    if counted.size:
        shapes.append(("counters", counted.shape, counters))
    for name, shape, wanted in shapes:
        if shape != (n, wanted):
            raise Malformed(f"{owner}: {name} has shape {shape}, expected {(n, wanted)}")
    last = counted[:, -1] if counted.size else np.ones(n, np.uint32)
    if (last > 1).any():
        raise Malformed(f"{owner}: the last counter of a row is {int(last.max())}, expected 1 (expanded) or 0 (not)")
    if weights[last == 0, width:].any():
        raise Malformed(f"{owner}: a row that is not expanded has weights behind its first part")
    if not np.isfinite(state).all():
        raise Malformed(f"{owner}: state holds an infinity or NaN")
    where = np.flatnonzero(last)
    others = BlockRows(keys[where], weights[where, width:], state[where, columns:])
    first = content._replace(
        keys=keys, weights=weights[:, :width], state=state[:, :columns], counters=counted[:, : counters - 1]
    )
    return first, others
