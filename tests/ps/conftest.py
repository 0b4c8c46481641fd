# SPDX-License-Identifier: Apache-2.0
"""Gives the tests of client/ and ps/ their rigs: ``import rig``, ``import rows_rig``, and two of those of checkpoint/."""

import importlib.util
import sys
from pathlib import Path

for _name in ("rig", "rows_rig"):
    _SPEC = importlib.util.spec_from_file_location(_name, Path(__file__).parent.parent / "client" / f"{_name}.py")
    assert _SPEC is not None
    assert _SPEC.loader is not None
    if _name not in sys.modules:
        sys.modules[_name] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[_name])

for _name in ("story", "faulty_files"):
    if f"checkpoint_{_name}" not in sys.modules:
        _SPEC = importlib.util.spec_from_file_location(
            f"checkpoint_{_name}", Path(__file__).parent.parent / "checkpoint" / f"{_name}.py"
        )
        assert _SPEC is not None
        assert _SPEC.loader is not None
        sys.modules[f"checkpoint_{_name}"] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[f"checkpoint_{_name}"])

for _name in ("compacting_rig", "copies_rig"):
    if _name not in sys.modules:
        _SPEC = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
        assert _SPEC is not None
        assert _SPEC.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_SPEC)
        _SPEC.loader.exec_module(sys.modules[_name])
