# SPDX-License-Identifier: Apache-2.0
"""Bugs of row caches, planted on purpose as in planted.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from oarlock.embedding.newer import Newer
from oarlock.embedding.table import Table
from oarlock.worker.session import Session

Patch = pytest.MonkeyPatch


def bound_is_one_too_wide(patch: Patch) -> None:
    """A shard lets a kept row lack one update more than the worker said."""
    original = Table.pull_newer

    def pull_newer(self: Table, keys: Any, blocks: Any, counts: Any, versions: Any, *, bound: int) -> Newer:
        kept = versions + (versions > 0).astype(np.uint32)
        now = original(self, keys, blocks, counts, np.zeros_like(versions), bound=0).versions
        return original(self, keys, blocks, counts, np.minimum(kept, np.maximum(now, versions)), bound=bound)

    patch.setattr(Table, "pull_newer", pull_newer)


def evaluation_uses_kept_rows(patch: Patch) -> None:
    """What an evaluation finds depends on what the worker kept."""
    original = Session.pull

    async def pull(self: Session, prepared: Any, number: int = 0, *, cached: bool = False, **about: int) -> Any:
        return await original(self, prepared, number, cached=True, **about)

    patch.setattr(Session, "pull", pull)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    bound_is_one_too_wide,
    evaluation_uses_kept_rows,
)
