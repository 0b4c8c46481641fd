# SPDX-License-Identifier: Apache-2.0
"""What the tests of data share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.csv as csv
import pytest


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The plain twins of reference_transforms.py."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference_transforms.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
