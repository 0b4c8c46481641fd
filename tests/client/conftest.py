# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of client/ and ps/ their rigs, by name: ``import rig``, and so on."""

import importlib.util
import sys
from pathlib import Path

import pytest

for _name in ("rig", "rows_rig", "cache_rig", "membership_rig"):
    _SPEC = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
    assert _SPEC is not None
    assert _SPEC.loader is not None
    if _name not in sys.modules:
        sys.modules[_name] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[_name])
rig = sys.modules["rig"]


@pytest.fixture
def job():
    return rig.Job(rig.spec_of()).place()


@pytest.fixture
def spy(job):
    return rig.Spy(job.transport)
