# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of client/ and ps/ their rigs: ``import rig``, ``import rows_rig``, and two of those of checkpoint/."""

from tests.conftest import load_shared

for _name in ("rig", "rows_rig"):
    load_shared(f"client/{_name}.py")
for _name in ("story", "faulty_files"):
    load_shared(f"checkpoint/{_name}.py", f"checkpoint_{_name}")
for _name in ("compacting_rig", "copies_rig", "scenes_rig"):
    load_shared(f"ps/{_name}.py")
