# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of metrics their own reader of the exposition format: ``import scrape``."""

import importlib.util
import sys
from pathlib import Path

if "scrape" not in sys.modules:
    _SPEC = importlib.util.spec_from_file_location("scrape", Path(__file__).parent / "scrape.py")
    assert _SPEC is not None
    assert _SPEC.loader is not None
    sys.modules["scrape"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["scrape"])
