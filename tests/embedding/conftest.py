# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of embedding/ their twins: ``import embedding_reference``."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

_SPEC = importlib.util.spec_from_file_location("embedding_reference", Path(__file__).with_name("reference.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
reference = importlib.util.module_from_spec(_SPEC)
sys.modules["embedding_reference"] = reference
_SPEC.loader.exec_module(reference)

if not reference.JIT:
    np.seterr(over="ignore")  # interpreted kernels wrap around in numpy scalars, which compiled ones do silently
