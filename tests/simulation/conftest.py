# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of the simulation its planted bugs: ``import planted`` and the others."""

import importlib.util
import sys
from pathlib import Path

for _name in (
    "planted",
    "planted_modes",
    "planted_caches",
    "planted_residuals",
    "planted_ranks",
    "planted_hybrid",
    "planted_cuts",
    "planted_losses",
):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
    assert _spec is not None
    assert _spec.loader is not None
    if _name not in sys.modules:
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
