# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of embedding/ what they share: ``import embedding_reference``, ``optimizer_reference``, ..."""

import numpy as np

from tests.conftest import load_shared

reference = load_shared("embedding/reference.py", "embedding_reference")
for _name in (
    "optimizer_reference",
    "table_reference",
    "expanding_rig",
    "compress_reference",
    "view_rig",
    "live_rig",
):
    load_shared(f"embedding/{_name}.py")
load_shared("embedding/test_table_machine.py", "table_machine")

if not reference.JIT:
    np.seterr(over="ignore")  # interpreted kernels wrap around in numpy scalars, which compiled ones do silently
