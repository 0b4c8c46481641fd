# SPDX-License-Identifier: Apache-2.0
"""Gives the tests their own readers of metrics and of traces: ``import scrape``, ``import trace_check``."""

import importlib.util
import sys
from pathlib import Path

for name in ("scrape", "trace_check"):
    if name not in sys.modules:
        _SPEC = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert _SPEC is not None
        assert _SPEC.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[name])
