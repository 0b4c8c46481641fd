# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of embedding/ what they share: ``import embedding_reference``, ``optimizer_reference``, ..."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

for _name, _file in (
    ("embedding_reference", "reference.py"),
    ("optimizer_reference", "optimizer_reference.py"),
    ("table_reference", "table_reference.py"),
    ("expanding_rig", "expanding_rig.py"),
    ("compress_reference", "compress_reference.py"),
    ("view_rig", "view_rig.py"),
    ("live_rig", "live_rig.py"),
    ("table_machine", "test_table_machine.py"),
):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(_file))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
reference = sys.modules["embedding_reference"]

if not reference.JIT:
    np.seterr(over="ignore")  # interpreted kernels wrap around in numpy scalars, which compiled ones do silently
