# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of hostile input what they share: modules of this folder and four of others."""

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_SHARED = {
    "rig": _HERE.parent / "client" / "rig.py",
    "cluster_rig": _HERE.parent / "cluster" / "conftest.py",
    "frame_rig": _HERE.parent / "proto" / "frame_rig.py",
    "scripted_rig": _HERE.parent / "proto" / "scripted_rig.py",
    "mutate": _HERE / "mutate.py",
    "targets": _HERE / "targets.py",
    "coordinator_target": _HERE / "coordinator_target.py",
    "h2": _HERE / "h2.py",
    "ports": _HERE / "ports.py",
}
for _name, _path in _SHARED.items():
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, _path)
        assert _spec is not None
        assert _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)
