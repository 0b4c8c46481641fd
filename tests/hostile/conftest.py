# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of hostile input what they share: modules of this folder and four of others."""

from tests.conftest import load_shared

load_shared("client/rig.py")
load_shared("cluster/conftest.py", "cluster_rig")
for _name in ("frame_rig", "scripted_rig"):
    load_shared(f"proto/{_name}.py")
for _name in ("mutate", "copies_messages", "targets", "coordinator_target", "h2", "ports"):
    load_shared(f"hostile/{_name}.py")
