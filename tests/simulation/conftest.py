# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of the simulation its planted bugs: ``import planted``."""

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).parent / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
if "planted" not in sys.modules:
    sys.modules["planted"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["planted"])
