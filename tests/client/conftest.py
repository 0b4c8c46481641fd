# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of client/ and ps/ their rigs, by name: ``import rig``, and so on."""

import pytest

from tests.conftest import load_shared

rig = load_shared("client/rig.py")
load_shared("client/rows_rig.py")
load_shared("client/cache_rig.py")
load_shared("client/membership_rig.py")


@pytest.fixture
def job():
    return rig.Job(rig.spec_of()).place()


@pytest.fixture
def spy(job):
    return rig.Spy(job.transport)
