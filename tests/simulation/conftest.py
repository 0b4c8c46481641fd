# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of the simulation its planted bugs: ``import planted`` and the others."""

from tests.conftest import load_shared

for _name in (
    "planted",
    "planted_modes",
    "planted_caches",
    "planted_residuals",
    "planted_ranks",
    "planted_hybrid",
    "planted_cuts",
    "planted_losses",
    "planted_moves",
):
    load_shared(f"simulation/{_name}.py")
