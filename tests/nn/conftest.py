# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of nn their twins."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import load_shared


@pytest.fixture(autouse=True)
def words_may_overflow() -> Iterator[None]:
    """In interpreted kernels, where numpy warns of it."""
    with np.errstate(over="ignore"):
        yield


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The twins: every kernel in numpy, whole graphs in float64 numpy and PyTorch."""
    return load_shared("nn/reference.py", "nn_reference")
