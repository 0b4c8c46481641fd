# SPDX-License-Identifier: Apache-2.0
"""What all tests with real processes that are killed have in common."""

import logging
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from tests.conftest import load_shared

for _name in ("sync_job", "network_switch", "network_hosts", "paced_recipe", "network_job"):
    load_shared(f"chaos/{_name}.py")


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
