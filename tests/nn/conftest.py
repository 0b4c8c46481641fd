# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of nn their twins."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def words_may_overflow() -> Iterator[None]:
    """In interpreted kernels, where numpy warns of it."""
    with np.errstate(over="ignore"):
        yield


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The twins: every kernel in numpy, whole graphs in float64 numpy and PyTorch."""
    spec = importlib.util.spec_from_file_location("nn_reference", Path(__file__).parent / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
