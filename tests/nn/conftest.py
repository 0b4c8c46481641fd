# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of nn their twins."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The twins: every kernel in numpy, whole graphs in float64 numpy and PyTorch."""
    spec = importlib.util.spec_from_file_location("nn_reference", Path(__file__).parent / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
