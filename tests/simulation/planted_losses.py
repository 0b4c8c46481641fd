# SPDX-License-Identifier: Apache-2.0
"""Bugs of what follows the loss of a shard, planted on purpose: in cuts that it was in, and in the run that begins after it."""

from collections.abc import Callable
from typing import Any

import pytest

from oarlock.checkpoint import manifest
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.closed import ClosedSet
from oarlock.cluster import coordinator, recovery
from oarlock.cluster.cutting import Cutting
from oarlock.cluster.store import Store
from oarlock.proto.errors import PSError, WrongJob
from oarlock.proto.version import check_protocol
from oarlock.ps.identity import Identity

Patch = pytest.MonkeyPatch


def runs_and_lives_are_not_told_apart(patch: Patch) -> None:
    """A shard takes pushes that were meant for one that listened at its address in the run before."""

    def check(self: Identity, header: Any) -> None:
        check_protocol(header.protocol)
        if header.job != self.job:
            raise WrongJob("another job")

    patch.setattr(Identity, "check", check)


def splits_closed_since_the_cut_stay_closed(patch: Patch) -> None:
    """A new run merges the manifest's closed set into the one that there is."""
    original = recovery.go_back

    def go_back(c: Any, found: Manifest, path: str) -> None:
        since = ClosedSet(c.work.closed.floor, c.work.closed.above)
        original(c, found, path)
        c.work.closed.merge(since)

    patch.setattr(coordinator, "go_back", go_back)


def results_of_the_lost_run_stay_on_disk(patch: Patch) -> None:
    """What an epoch after the cut came to is there again when the coordinator is started again."""
    patch.setattr(Store, "clear_epochs", lambda self: None)


def the_new_run_is_not_recorded(patch: Patch) -> None:
    """A coordinator that dies in the new run is in the old one when it is started again."""
    original = Store.set_fact

    def set_fact(self: Store, name: str, value: Any) -> None:
        if name != "run":
            original(self, name, value)

    patch.setattr(Store, "set_fact", set_fact)


def an_owner_that_died_is_left_out_of_the_cut(patch: Patch) -> None:
    """A cut is committed with the blocks of those that have written theirs, and nobody asks whether those are all."""
    original = Cutting._ordered

    async def ordered(self: Cutting, shard: Any, order: str, request: Any, seconds: float, part: int = 1) -> Any:
        try:
            return await original(self, shard, order, request, min(seconds, 1.0) if order == "Write" else seconds, part)
        except PSError:
            if order != "Write":
                raise
            return Nothing()

    patch.setattr(Cutting, "_ordered", ordered)
    # The rule is kept twice: a manifest that does not name every block cannot be made.
    patch.setattr(manifest, "_check_blocks", lambda tables, dense, blocks: None)


class Nothing:
    torn, entries, trouble = False, "[]", ""


PLANTED: tuple[Callable[[Patch], None], ...] = (
    runs_and_lives_are_not_told_apart,
    splits_closed_since_the_cut_stay_closed,
    results_of_the_lost_run_stay_on_disk,
    the_new_run_is_not_recorded,
    an_owner_that_died_is_left_out_of_the_cut,
)
