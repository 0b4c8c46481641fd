# SPDX-License-Identifier: Apache-2.0
"""What all tests with real processes that are killed have in common."""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pytest

if "sync_job" not in sys.modules:
    _SPEC = importlib.util.spec_from_file_location("sync_job", Path(__file__).with_name("sync_job.py"))
    assert _SPEC is not None
    assert _SPEC.loader is not None
    sys.modules["sync_job"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["sync_job"])


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(autouse=True)
def warnings_are_not_printed() -> Iterator[None]:
    handler = logging.NullHandler()
    logging.getLogger("oarlock").addHandler(handler)
    yield
    logging.getLogger("oarlock").removeHandler(handler)
