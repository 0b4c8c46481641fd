# SPDX-License-Identifier: Apache-2.0
"""Every planted bug fits the code: what it puts in the place of a function takes what that takes.

Else a schedule would find that the plant fails, and nobody that the bug is not looked for any more.
"""

import inspect
from collections.abc import Callable
from typing import Any

import planted
import planted_caches
import planted_cuts
import planted_hybrid
import planted_losses
import planted_modes
import planted_moves
import planted_ranks
import planted_residuals
import pytest

MODULES = (
    planted, planted_caches, planted_cuts, planted_hybrid, planted_losses, planted_modes, planted_moves, planted_ranks,
    planted_residuals,
)  # fmt: skip


def function_of(found: Any) -> Any:
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def misfit(before: Any, after: Any) -> str:
    """Return in what a function differs from the one that it takes the place of, empty if it takes the same."""
    if not (inspect.isroutine(before) and inspect.isroutine(after)):
        return ""
    old, new = (list(inspect.signature(each).parameters.values()) for each in (before, after))
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in new):
        return ""
    return "" if len(old) == len(new) else f"{[p.name for p in new]} in the place of {[p.name for p in old]}"


@pytest.mark.parametrize("plant", [p for m in MODULES for p in m.PLANTED], ids=lambda plant: plant.__name__)
def test_a_plant_fits_the_code(plant: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    put = monkeypatch.setattr
    wrong = []

    def looked_at(owner: Any, name: str, value: Any, **options: Any) -> None:
        found = inspect.getattr_static(owner, name, None)
        if text := misfit(function_of(found), function_of(value)):
            wrong.append(f"{name}: {text}")
        put(owner, name, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(patch, "setattr", looked_at)
        plant(patch)
    assert wrong == []
