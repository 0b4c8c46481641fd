# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: seeded randomness, nothing left behind, loud words about what could not be run.

Invariant: after a test that passed, and after a module whose tests passed, the process has the threads, open files,
sockets and children that it had before. What ends by itself (a closing channel, an executor's threads) is given
``GRACE_SECONDS`` to do so. pytest calls all of it from the main thread.
"""

import contextlib
import gc
import importlib.util
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 5.0
OPTIONAL = {
    "torch": "torch is not installed: make setup-torch",
    "petastorm": "petastorm is not installed",
}
MISSING = (*OPTIONAL, "shared data", "network namespaces")
# Epoll sets, event counters and timers belong to gRPC's and Arrow's own threads, which last; so do devices.
LASTING_FILES = ("anon_inode:", "/dev/", "/proc/", "/sys/")
FAILED = pytest.StashKey[bool]()

# onnxruntime tells its maker of its use otherwise.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
hypothesis.settings.register_profile("same-every-time", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("same-every-time")


def load_shared(path: str, name: str = "") -> ModuleType:
    """Import a file of this folder, once; ``import name`` finds it then, by default the name of the file: none is on the path."""
    name = name or Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tests" / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def open_files() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if not target.startswith(LASTING_FILES):
            found.add(f"{descriptor} -> {target}")
    return found


def children() -> dict[int, str]:
    """Return the command line of every child of this process; a child that nobody has waited for counts too."""
    found = {}
    for thread in Path("/proc/self/task").iterdir():
        try:
            pids = [int(pid) for pid in (thread / "children").read_text().split()]
        except OSError:
            continue
        for pid in pids:
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            found[pid] = arguments.replace(b"\0", b" ").decode(errors="replace").strip() or "(ended, not waited for)"
    return found


class Leaks:
    """What exists now that did not when this was made."""

    def __init__(self) -> None:
        self.threads = set(threading.enumerate())
        self.files = open_files()
        self.children = children()

    def now(self) -> list[str]:
        new = [thread for thread in threading.enumerate() if thread not in self.threads]
        # A thread of a library in C++ that called into Python once: how long it lives is the library's business.
        threads = [f"thread {thread.name}" for thread in new if not isinstance(thread, threading._DummyThread)]
        files = [f"file {name}" for name in sorted(open_files() - self.files)]
        processes = [f"child {pid}: {text}" for pid, text in children().items() if pid not in self.children]
        return threads + files + processes

    def check(self, node: pytest.Item | pytest.Collector) -> None:
        # A failed test's traceback keeps its objects alive, which would only add noise to the failure.
        failed = node.stash.get(FAILED, False)
        if not failed and self.now():
            gc.collect()
            deadline = time.monotonic() + GRACE_SECONDS
            while self.now() and time.monotonic() < deadline:
                threading.Event().wait(0.01)
        left = self.now()
        for pid in children().keys() - self.children.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left and not failed:
            pytest.fail(f"{node.nodeid} left behind: " + "; ".join(left), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for node in item.listchain():
            node.stash[FAILED] = True
    return report


@pytest.fixture(scope="module", autouse=True)
def module_leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    # Its pipe and process last as long as this process, so they are there before anything is counted.
    multiprocessing.resource_tracker.ensure_running()
    leaks = Leaks()
    yield
    leaks.check(request.node)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    leaks = Leaks()
    yield
    # What a module's fixture started may connect and grow while any of its tests runs: its module answers for it.
    used = (name for name in request.fixturenames if name != "module_leaves_nothing_behind")
    if not any(scope_of(request, name) in ("module", "class") for name in used):
        leaks.check(request.node)


def scope_of(request: pytest.FixtureRequest, name: str) -> str:
    definitions = request.node._fixtureinfo.name2fixturedefs.get(name)
    return definitions[-1].scope if definitions else "function"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number that is the test's own and the same in every run."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    number = zlib.crc32(request.node.nodeid.encode())
    random.seed(number)
    np.random.seed(number)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data sets, beside the checkout or where OARLOCK_SHARED_DATA says."""
    folder = Path(os.environ.get("OARLOCK_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("shared data: no folder of published data sets beside the checkout; set OARLOCK_SHARED_DATA")
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {name: reason for name, reason in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("shared_data")
        for name, reason in absent.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts.update(name for name in MISSING if name in reason)
    if counts:
        text = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        terminalreporter.write_line(f"NOT RUN for lack of what they need - {text}", yellow=True, bold=True)
