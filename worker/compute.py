# SPDX-License-Identifier: Apache-2.0
"""The computing of one group: its batches through a Program, one after the other, to what is pushed of them.

Invariant: what comes out depends on the group, its rows and the draws alone. The arrays may be the program's own, which the next
group overwrites. In whichever thread has the program.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.nn import Lookup, Program
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import Rates

Rows = dict[str, NDArray[np.float32]]


class Trained(NamedTuple):
    """What a group adds: gradients of rows, float32[u, dim] by table, and of all dense parameters, and the rates for them."""

    loss_sum: float
    rows: Rows
    dense: NDArray[np.float32]
    rates: Rates


def train_group(
    program: Program,
    lookups: tuple[Lookup, ...],
    prepared: Prepared,
    rates: Rates,
    *,
    seed: int,
    draw: int,
    local: bool,
    summed_rows: bool = False,
    summed_dense: bool = False,
) -> Trained:
    """Train a group's batches; ``draw``, ``draw`` + 1, ... tell them apart.

    Without ``local`` all of them see the rows that were pulled, and their gradients are added up. With it (geo) each one's
    gradients are applied to the rows and dense values at hand, by plain sgd, and what comes out is the difference that all of
    them made, for a shard that applies it at the rate 1. ``summed_rows``, ``summed_dense``: gradients of the samples' losses,
    added up, and not of each batch's mean loss: for a shard that divides by the samples of all ranks.
    """
    program.flat_parameters[:] = prepared.dense
    before = {table: rows.copy() for table, rows in prepared.rows.items()} if local else {}
    loss_sum, total, dense = 0.0, Rows(), program.flat_gradients
    at = 0
    for number, size in enumerate(prepared.sizes):
        feeds = _feeds(lookups, prepared, slice(at, at + size))
        at += size
        loss_sum += program.train(feeds, size, seed=seed, step=draw + number) * size
        found, of_dense = _by_table(program, lookups), program.flat_gradients
        if summed_rows:
            found = {table: gradient * np.float32(size) for table, gradient in found.items()}
        if summed_dense:
            of_dense = of_dense * np.float32(size)
        if local:
            for table, gradient in found.items():
                prepared.rows[table] -= np.float32(rates.rows) * gradient
            program.flat_parameters -= np.float32(rates.dense) * program.flat_gradients
        elif len(prepared.sizes) == 1:
            total, dense = found, of_dense
        elif not number:
            total, dense = {table: gradient.copy() for table, gradient in found.items()}, of_dense.copy()
        else:
            for table, gradient in found.items():
                total[table] += gradient
            dense += of_dense
    if local:
        total = {table: rows - prepared.rows[table] for table, rows in before.items()}
        return Trained(loss_sum, total, prepared.dense - program.flat_parameters, Rates(1.0, 1.0))
    return Trained(loss_sum, total, dense, rates)


def scores_with(program: Program, lookups: tuple[Lookup, ...], prepared: Prepared, rows: Rows) -> NDArray[np.float32]:
    """Return the scores float32[samples] of a group, batch by batch, with these ``rows``; no gradient changes."""
    program.flat_parameters[:] = prepared.dense
    group = replace(prepared, rows=rows)
    scores, at = np.empty(prepared.samples, np.float32), 0
    for size in prepared.sizes:
        run = slice(at, at + size)
        scores[run] = program.predict(_feeds(lookups, group, run), size)
        at += size
    return scores


def predict(program: Program, lookups: tuple[Lookup, ...], prepared: Prepared) -> NDArray[np.float32]:
    """Return the scores float32[samples] of a batch; the program overwrites them with its next one."""
    program.flat_parameters[:] = prepared.dense
    return program.predict(_feeds(lookups, prepared, slice(0, prepared.samples)), prepared.samples)


def _feeds(lookups: tuple[Lookup, ...], prepared: Prepared, run: slice) -> dict[str, Any]:
    """Return what the program is fed of the samples of ``run``."""
    whole = len(prepared.sizes) == 1
    feeds: dict[str, Any] = {name: values if whole else values[run] for name, values in prepared.feeds.items()}
    for lookup in lookups:
        inverse = prepared.inverse[lookup.name]
        feeds[lookup.name] = (prepared.rows[lookup.table], inverse if whole else inverse[run])
    return feeds


def _by_table(program: Program, lookups: tuple[Lookup, ...]) -> Rows:
    """Return the last batch's row gradients; those of lookups that share a table are added up."""
    out: Rows = {}
    for lookup in lookups:
        found = program.row_gradients[lookup.name]
        known = out.get(lookup.table)
        out[lookup.table] = found if known is None else np.add(known, found)
    return out
