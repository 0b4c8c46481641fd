# SPDX-License-Identifier: Apache-2.0
"""What the tests of data share."""

from types import ModuleType

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from tests.conftest import load_shared


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The plain twins of reference_transforms.py."""
    return load_shared("data/reference_transforms.py")
