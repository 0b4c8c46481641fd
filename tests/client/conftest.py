# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of client/ and ps/ their rig: ``import rig``."""

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("rig", Path(__file__).parent.parent / "client" / "rig.py")
assert _SPEC is not None
assert _SPEC.loader is not None
if "rig" not in sys.modules:
    sys.modules["rig"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["rig"])
rig = sys.modules["rig"]


@pytest.fixture
def job():
    return rig.Job(rig.spec_of()).place()


@pytest.fixture
def spy(job):
    return rig.Spy(job.transport)
