# SPDX-License-Identifier: Apache-2.0
"""A small data set, and jobs of it that end within seconds; and a stage for the launcher, on which nothing costs any time."""

import asyncio
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from oarlock.client.entry import write_address
from oarlock.client.job import JobSpec
from oarlock.cluster.store import Store
from oarlock.data.planted import generate_ncf
from oarlock.launch import family
from oarlock.launch.child import Child
from oarlock.launch.config import run_config
from oarlock.launch.folder import STATE_FILE, create
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses
from oarlock.launch.wanted import ROLES
from oarlock.proto.coordinator_pb2 import StatusReply
from oarlock.proto.errors import LeaseLost, Unavailable
from tests.conftest import load_shared

# The readers of metrics and of traces that the tests of telemetry have.
load_shared("telemetry/scrape.py")
load_shared("telemetry/trace_check.py")
load_shared("proto/security_rig.py")
# A counting job of real processes.
load_shared("launch/counting_job.py")
load_shared("launch/serving_process.py")

ADDRESS = "127.0.0.1:1"
Script = Iterator[Any]


@pytest.fixture(scope="session", autouse=True)
def arrow_listens_for_interrupts() -> None:
    """Arrow's pipe for Ctrl-C lasts as long as the process: it is there before anything is counted."""
    csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    generate_ncf(folder, users=100, items=200, positives_per_user=25, seed=1)
    return folder


@pytest.fixture(scope="session")
def run_of(data: Path) -> Any:
    def make(**changes: Any) -> Any:
        options = {"batch_samples": 1024, **changes.pop("recipe_options", {})}
        values = {"data": str(data), "epochs": 2, "reader": "arrow", "heartbeat_seconds": 0.1, **changes}
        return run_config({**values, "recipe_options": options})

    return make


@pytest.fixture
def start(run_of: Any, tmp_path: Path) -> Any:
    """Create a job in a folder of this test: (name, **fields) -> (spec, folder)."""

    def make(name: str = "job", **changes: Any) -> tuple[JobSpec, Path]:
        folder = tmp_path / name
        return create(folder, name, run_of(**changes)), folder

    return make


@pytest.fixture
def run_job() -> Any:
    """Run a job in this process: (spec, folder, restore, stop_when) -> last status."""

    def run(spec: JobSpec, folder: Path, restore: str = "", stop_when: Any = lambda status: False) -> dict[str, Any]:
        return run_in_process(
            spec, folder, restore=restore, watch=lambda status: not stop_when(status), watch_seconds=0.01
        )

    return run


class Stage:
    """A job whose processes are shells that wait for a line with their exit code; and the coordinator's answers."""

    address = ADDRESS

    def __init__(self, spec: JobSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec, self.folder = spec, folder
        self.started: list[tuple[str, int, list[str]]] = []
        self.blas_threads: dict[str, int] = {}
        self.phase = "training"
        self.term = 1
        self.away = False
        self.deaf_to_leaves = 0
        self.warnings: list[str] = []
        self.outsiders: list[dict[str, Any]] = []
        self.gone: set[int] = set()
        # Whom the coordinator struck off, by pid; how many it wants, and the pids of those that it told to leave.
        self.struck: set[int] = set()
        self.scale = {"servers": spec.servers, "workers": spec.workers}
        self.leaving: set[int] = set()
        self.left: list[tuple[int, str]] = []
        self.stops = 0
        self.statuses: list[dict[str, Any]] = []
        # Whether the next coordinator ends by SIGKILL at once: before or after it has recorded a new run.
        self.stillborn: list[str] = []
        self.launched: LocalProcesses
        monkeypatch.setattr(family, "start_child", self.start_child)

    def start_child(
        self,
        role: str,
        number: int,
        module: str,
        arguments: list[str],
        *,
        logs: Path,
        log_level: str,
        blas_threads: int,
    ) -> Child:
        self.started.append((role, number, arguments))
        self.blas_threads[role] = blas_threads
        log = logs / f"{role}-{number}.log"
        with log.open("ab") as out:
            begun = out.tell()
            process = subprocess.Popen(
                ["sh", "-c", 'read -r code words; echo "$words"; exit "${code:-1}"'],
                stdin=subprocess.PIPE,
                stdout=out,
            )
        if role == "coordinator":
            fate = self.stillborn.pop(0) if self.stillborn else ""
            if "--restore" in arguments and fate != "before":
                with Store(self.folder / STATE_FILE).open() as store:
                    store.set_fact("run", store.fact("run", 1) + 1)
                store.close()
            if fate:
                process.kill()
                process.wait()
            else:
                write_address(self.folder, ADDRESS)
        return Child(role, number, process, log, begun)

    # The transport

    async def call(self, address: str, method: str, request: Any, *, timeout_seconds: float) -> Any:
        assert address == ADDRESS
        if self.away or self.child("coordinator").ended:
            raise Unavailable("nobody is there")
        if method == "Coordinator.Status":
            return StatusReply(status=json.dumps(self.status()))
        if method == "Coordinator.Leave":
            if self.deaf_to_leaves:
                self.deaf_to_leaves -= 1
                raise Unavailable("not now")
            if request.header.sender in self.gone:
                raise LeaseLost("no member any more")
            self.gone.add(request.header.sender)
            self.left.append((request.header.sender, request.error))
        elif method == "Coordinator.Stop":
            self.stops += 1
            self.phase = "stopped"
        return None

    async def close(self) -> None:
        pass

    def status(self) -> dict[str, Any]:
        host = socket.gethostname()
        everybody = [
            {
                "role": c.role,
                "id": c.process.pid,
                "pid": c.process.pid,
                "host": host,
                "incarnation": c.process.pid,
                "stats": {},
            }
            for c in self.seen
            if c.role != "coordinator"
        ]
        members = [m for m in everybody if m["pid"] not in self.gone]
        leaving = {r: [m["id"] for m in members if m["role"] == r and m["pid"] in self.leaving] for r in ROLES}
        return {
            "job": self.spec.job,
            "name": self.spec.name,
            "phase": self.phase,
            "reason": "",
            "run": 1,
            "term": self.term,
            "history": [],
            "best": None,
            "checkpoints": [],
            "warnings": self.warnings,
            "members": members + self.outsiders,
            "lost": [m for m in everybody if m["pid"] in self.struck],
            "scale": {**self.scale, "leaving": leaving},
            "samples": 0,
        }

    # For scripts

    def child(self, role: str, number: int = 0) -> Child:
        return next(c for c in self.launched.children if (c.role, c.number) == (role, number))

    def kill(self, role: str, number: int = 0) -> Child:
        child = self.child(role, number)
        child.process.kill()
        child.process.wait()
        return child

    def end(self, role: str, number: int, code: int, words: str = "") -> Child:
        """Let a process end by itself."""
        child = self.child(role, number)
        assert child.process.stdin is not None
        child.process.stdin.write(f"{code} {words}\n".encode())
        child.process.stdin.flush()
        child.process.wait()
        return child

    @staticmethod
    def until(condition: Callable[[], Any]) -> Script:
        while not condition():
            yield

    def starts(self, role: str) -> int:
        return sum(r == role for r, _, _ in self.started)

    def play(self, script: Callable[["Stage"], Script], **options: Any) -> dict[str, Any]:
        """Run the job; each turn of its watch is one step of ``script``, after whose end the job is asked to stop."""
        self.launched = LocalProcesses(self.spec, self.folder, **options)
        self.launched._transport = self  # type: ignore[assignment]
        self.seen: list[Child] = []
        steps: Script | None = None

        def watch(status: dict[str, Any]) -> bool:
            nonlocal steps
            self.seen += [c for c in self.launched.children if not any(c is s for s in self.seen)]
            if not status:
                return True
            self.statuses.append(status)
            steps = script(self) if steps is None else steps
            return next(steps, self) is not self

        async def body() -> dict[str, Any]:
            async with asyncio.timeout(30):
                return await self.launched.run(watch, 0.0)

        return asyncio.run(body())


@pytest.fixture
def settings() -> dict[str, Any]:
    """What the job of ``stage`` is like, beside a shard and two workers."""
    return {}


@pytest.fixture
def stage(start: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage(*start(**{"servers": 1, "workers": 2, **settings}), monkeypatch)
    # Shells end when their input closes; nobody waits for them to end by themselves.
    monkeypatch.setattr(family, "END_SECONDS", 0.0)
    yield made
    for child in made.launched.children:
        assert child.ended
        assert child.process.stdin is not None
        assert child.process.stdin.closed
