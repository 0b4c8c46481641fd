# SPDX-License-Identifier: Apache-2.0
"""What a group of several batches does to rows and dense values, against plain numpy; and every mode over a wire with faults."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

Make = Callable[..., Any]


@pytest.fixture
def small(counting: Any) -> Iterator[Any]:
    import small_recipe

    yield small_recipe
    small_recipe.batches.clear()
    del sys.modules["small_recipe"]


def gradients(rows: Any, weights: Any, bias: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Return the gradients of the batch's mean loss, in float64."""
    one, other, label = batch
    keys = np.concatenate([one[:, None], other], axis=1)
    inputs = rows[keys].reshape(len(label), -1)
    error = (1 / (1 + np.exp(-(inputs @ weights + bias))) - label) / len(label)
    of_rows = np.zeros_like(rows)
    np.add.at(of_rows, keys.ravel(), np.outer(error, weights).reshape(-1, rows.shape[1]))
    return of_rows, inputs.T @ error, error.sum()


def after(rows: Any, weights: Any, bias: Any, group: list[Any], rates: Any, *, local: bool) -> tuple[Any, Any, Any]:
    """Return the parameters after one group: one step with the sum of all gradients, or a step for each batch."""
    totals = [np.zeros_like(rows), np.zeros_like(weights), 0.0]
    for batch in group:
        found = gradients(rows, weights, bias, batch)
        if local:
            rows, weights, bias = (
                rows - rates.rows * found[0],
                weights - rates.dense * found[1],
                bias - rates.dense * found[2],
            )
        else:
            totals = [total + one for total, one in zip(totals, found, strict=True)]
    if local:
        return rows, weights, bias
    return rows - rates.rows * totals[0], weights - rates.dense * totals[1], bias - rates.dense * totals[2]


def dense_of(job: Any) -> dict[str, Any]:
    """Return the dense parameters by name, from whichever shard has them."""
    out = {}
    for number, spec in enumerate(job.spec.dense):
        block = sum(table.blocks for table in job.spec.tables) + number
        for service in job.services:
            shard = service._joined[1]
            if shard.owned[block]:
                out[spec.name] = np.empty(spec.size, np.float32)
                shard.dense[number].pull_block(0, out[spec.name])
    return out


@pytest.mark.parametrize(
    ("mode", "accumulate"), [("async", 1), ("async", 3), ("ssp", 2), ("geo", 1), ("geo", 3), ("geo", 9)]
)
def test_a_group_does_what_numpy_says(make_job: Make, small: Any, mode: str, accumulate: int) -> None:
    # Splits of 20 rows make 4 batches, so the last group of three is a short one, and that of nine is all there is.
    job = make_job(
        recipe="small_recipe:recipe",
        tables=small.TABLES,
        dense=small.DENSE,
        mode=mode,
        accumulate=accumulate,
        epochs=1,
        prefetch=1,
        rows=120,
    )
    first: dict[str, Any] = {}

    async def one_after_another(method: str, request: Any) -> None:
        if method == "Shard.Pull":
            # What was pushed is there before anything more is pulled, so that numpy knows what was pulled.
            pushes = job.wire.calls
            await job.until(lambda: len(pushes("Shard.Push")) == len(pushes("Shard.Push", "answered")))
            if not first:
                first.update(rows=job.rows().astype(np.float64), dense=dense_of(job))

    job.wire.bend = one_after_another
    job.run(lambda job: job.to_the_end())
    order = list(dict.fromkeys((push.split, push.group) for push in job.wire.calls("Shard.Push")))
    assert len(order) == job.groups_per_epoch() == 6 * -(-4 // accumulate)
    rows, weights, bias = first["rows"], first["dense"]["score.weight"].astype(np.float64), 0.0
    assert np.abs(rows).max() > 0.5
    for split, group in order:
        run = range(group * accumulate, min(4, (group + 1) * accumulate))
        group_batches = [small.batches[split, number] for number in run]
        rows, weights, bias = after(rows, weights, bias, group_batches, small.RATES, local=mode == "geo")
    assert len(small.batches) == 24
    assert np.abs(rows - first["rows"]).max() > 0.05
    np.testing.assert_allclose(job.rows(), rows, rtol=1e-4, atol=1e-6)
    found = dense_of(job)
    np.testing.assert_allclose(found["score.weight"], weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["score.bias"], bias, rtol=1e-4, atol=1e-6)


MODES = [
    *(("async", 0, accumulate) for accumulate in (1, 4)),
    *(("ssp", staleness, accumulate) for staleness in (0, 2, 8) for accumulate in (1, 4)),
    *(("geo", 0, k) for k in (1, 3)),
]


@pytest.mark.parametrize(("mode", "staleness", "accumulate"), MODES)
def test_one_message_in_a_hundred_meets_each_fault_and_all_is_counted_once(
    make_job: Make, mode: str, staleness: int, accumulate: int
) -> None:
    rows = 240 if accumulate == 1 else 480
    job = make_job(workers=2, rows=rows, batch_rows=2, mode=mode, staleness=staleness, accumulate=accumulate)
    job.wire.faults = dict.fromkeys(("drop", "duplicate", "delay", "reorder"), 0.01)
    job.run(lambda job: job.to_the_end())
    assert all(job.wire.struck[kind] for kind in job.wire.faults), job.wire.struck
    job.check_counted_once()
    assert [result.loss for result in job.coordinator.work.history] == [0.25, 0.25]
