# SPDX-License-Identifier: Apache-2.0
"""What a process may have, of files that a test writes: the narrowest limit counts, and what is missing limits nothing."""

import os
from pathlib import Path
from typing import Any

import pytest

from oarlock.telemetry import limits
from oarlock.telemetry.limits import memory_limit, processors

MB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write files of a system: path under /proc or /sys/fs/cgroup -> text."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(limits, "memory", lambda: (300 * MB, 100 * MB))

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def machine(system: Any, free_mb: int) -> None:
    system(proc__meminfo=f"MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable:   {free_mb * 1024} kB\n")


def test_the_machines_memory(system: Any) -> None:
    assert memory_limit() == 0, "nothing is told"
    machine(system, 400)
    assert memory_limit() == 500 * MB


def test_the_narrowest_group_counts(system: Any) -> None:
    machine(system, 4000)
    system(
        proc__self__cgroup="0::/outer/inner\n",
        groups__outer__memory_DOT_max=f"{900 * MB}\n",
        groups__outer__memory_DOT_current=f"{600 * MB}\n",
        groups__outer__memory_DOT_stat=f"anon 5\ninactive_file {50 * MB}\n",
        groups__outer__inner__memory_DOT_max="max\n",
    )
    assert memory_limit() == (100 + 300 + 50) * MB
    system(groups__outer__memory_DOT_current=f"{2000 * MB}\n")
    assert memory_limit() == 100 * MB, "what it has it has"


def test_groups_of_the_first_version(system: Any) -> None:
    machine(system, 4000)
    system(
        proc__self__cgroup="3:cpu,cpuacct:/a\n4:memory:/a\nno line\n",
        groups__memory__a__memory_DOT_limit_in_bytes=f"{200 * MB}\n",
        groups__memory__a__memory_DOT_usage_in_bytes=f"{150 * MB}\n",
        groups__memory__a__memory_DOT_stat="total_inactive_file 0\n",
    )
    assert memory_limit() == 150 * MB


def test_what_is_no_number_limits_nothing(system: Any) -> None:
    machine(system, 400)
    system(
        proc__self__cgroup="0::/a\n",
        groups__a__memory_DOT_max="much\n",
        groups__a__cpu_DOT_max="some more words\n",
    )
    assert memory_limit() == 500 * MB
    assert processors() == len(os.sched_getaffinity(0))


def test_the_limit_of_addresses(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(system, 400)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (350 * MB, 350 * MB))
    assert memory_limit() == 150 * MB


@pytest.mark.parametrize(("text", "share"), [("25000 100000", 0.25), ("max 100000", None), ("-1 100000", None)])
def test_a_share_of_a_processor(system: Any, text: str, share: float | None) -> None:
    system(proc__self__cgroup="0::/\n", groups__cpu_DOT_max=text)
    assert processors() == (share or len(os.sched_getaffinity(0)))


def test_this_process() -> None:
    assert memory_limit() > limits.memory()[1] > 0
    assert 0 < processors() <= len(os.sched_getaffinity(0))
