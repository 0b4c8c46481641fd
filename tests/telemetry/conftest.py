# SPDX-License-Identifier: Apache-2.0
"""Gives the tests their own readers of metrics and of traces, ``import scrape``, ``import trace_check``, and ``security_rig``."""

from tests.conftest import load_shared

load_shared("telemetry/scrape.py")
load_shared("telemetry/trace_check.py")
load_shared("proto/security_rig.py")
