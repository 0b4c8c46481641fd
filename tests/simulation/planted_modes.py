# SPDX-License-Identifier: Apache-2.0
"""Bugs of the modes, planted on purpose as in planted.py: of groups of several batches, of local copies, and of ssp's wait."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from oarlock.client.client import Client, Pushing
from oarlock.worker import compute, pipeline
from oarlock.worker.clock import WorkerClock
from oarlock.worker.compute import Trained
from oarlock.worker.prepare import Prepared
from oarlock.worker.recipe import Rates
from oarlock.worker.splits import OpenSplit

Patch = pytest.MonkeyPatch


def short_group_is_forgotten(patch: Patch) -> None:
    """accumulate: batches that do not fill a group are not trained."""
    patch.setattr(OpenSplit, "groups", property(lambda self: max(1, self.batches // self.accumulate)))


def batches_of_a_group_pushed_one_by_one(patch: Patch) -> None:
    """accumulate: each batch is pushed by itself; the first marks the group, and the others pass for repetitions."""
    original, make = pipeline.train_group, Client.push
    others: list[Trained] = []

    def train_group(program: Any, lookups: Any, prepared: Prepared, rates: Any, *, draw: int, **named: Any) -> Trained:
        out, at = [], 0
        for number, size in enumerate(prepared.sizes):
            run = slice(at, at + size)
            at += size
            one = replace(
                prepared,
                sizes=(size,),
                inverse={name: values[run] for name, values in prepared.inverse.items()},
                feeds={name: values[run] for name, values in prepared.feeds.items()},
                rows={name: values.copy() for name, values in prepared.rows.items()},
            )
            found = original(program, lookups, one, rates, draw=draw + number, **named)
            rows = {name: values.copy() for name, values in found.rows.items()}
            out.append(found._replace(rows=rows, dense=found.dense.copy()))
        others[:] = out[1:]
        return out[0]._replace(loss_sum=sum(found.loss_sum for found in out))

    def push(self: Client, split: int, group: int, gradients: Any, *, dense: Any, **named: Any) -> Any:
        pushes = [make(self, split, group, gradients, dense=dense, **named)]
        for found in others:
            again = {name: replace(part, gradients=found.rows[name]) for name, part in gradients.items()}
            pushes.append(make(self, split, group, again, dense=found.dense, **named))
        others.clear()

        async def one_by_one() -> Any:
            counts = [await push for push in pushes]
            return counts[0]

        return Pushing(one_by_one)

    patch.setattr(pipeline, "train_group", train_group)
    patch.setattr(Client, "push", push)


def marks_taken_for_batches(patch: Patch) -> None:
    """accumulate: a successor reads a group's mark as if it counted batches."""
    original = Client.next_group

    async def next_group(self: Client, split: int) -> int:
        return await original(self, split) * self._member.spec.accumulate

    patch.setattr(Client, "next_group", next_group)


def geo_pushes_the_sum(patch: Patch) -> None:
    """geo: what is pushed is the sum of the gradients and not the difference that they made."""
    original = pipeline.train_group

    def train_group(*arguments: Any, local: bool, **named: Any) -> Trained:
        found = original(*arguments, local=False, **named)
        return found._replace(rates=Rates(1.0, 1.0)) if local else found

    patch.setattr(pipeline, "train_group", train_group)


def geo_pushes_at_the_recipes_rate(patch: Patch) -> None:
    """geo: the difference is multiplied by the learning rate once more."""
    original = pipeline.train_group

    def train_group(program: Any, lookups: Any, prepared: Any, rates: Rates, **named: Any) -> Trained:
        return original(program, lookups, prepared, rates, **named)._replace(rates=rates)

    patch.setattr(pipeline, "train_group", train_group)


def geo_forgets_the_batches_before(patch: Patch) -> None:
    """geo: each batch begins at the rows that were pulled, so that the difference is the last batch's alone."""
    original = compute._feeds

    def feeds(lookups: Any, prepared: Prepared, run: slice) -> Any:
        kept = prepared.__dict__.setdefault("kept", {name: values.copy() for name, values in prepared.rows.items()})
        for name, values in kept.items():
            prepared.rows[name][:] = values
        return original(lookups, prepared, run)

    patch.setattr(compute, "_feeds", feeds)


def pull_does_not_wait(patch: Patch) -> None:
    """ssp: rows are pulled before the groups that they must hold are there."""

    async def may_pull(self: WorkerClock, number: int) -> None:
        return

    patch.setattr(WorkerClock, "may_pull", may_pull)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    short_group_is_forgotten,
    batches_of_a_group_pushed_one_by_one,
    marks_taken_for_batches,
    geo_pushes_the_sum,
    geo_pushes_at_the_recipes_rate,
    geo_forgets_the_batches_before,
    pull_does_not_wait,
)
