# SPDX-License-Identifier: Apache-2.0
"""A counting job whose coordinator, shards and workers each run on a host of their own (network_hosts.py).

Processes are begun by their entry points, as an engine on many machines would; one that ended since its lease was over, or by a
signal, is begun again on its host. Invariant: on leaving, every process has ended. One thread.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from network_hosts import Hosts
from paced_recipe import HURRY

from oarlock.benchmarks.counting import Count, check, write_data
from oarlock.client.entry import START_AGAIN, read_address
from oarlock.client.job import DONE, OVER
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.kernels import compile_or_load
from oarlock.proto.errors import NotFound
from oarlock.proto.tokens import new_tokens

COORDINATOR = "coordinator"
SHARDS = ("shard-0", "shard-1", "shard-2")
WORKERS = ("worker-0", "worker-1")
LEASE_SECONDS = 3.0
LOOK_SECONDS = 0.02
# What no step of a test needs: one that takes longer hangs.
MOST_SECONDS = 300.0
END_SECONDS = 10.0

Status = dict[str, Any]


@dataclass
class Process:
    host: str
    popen: "subprocess.Popen[bytes]"


class NetworkJob:
    """A job over ``hosts`` in ``folder``, which holds its data, too. A context manager."""

    def __init__(self, hosts: Hosts, folder: Path, *, seed: int, rows: int, epochs: int, **changes: Any) -> None:
        self.hosts = hosts
        self._data, self.folder = folder / "data", folder / "job"
        write_data(self._data, rows=rows, keys=5_000, seed=seed)
        run = RunConfig(
            data=str(self._data),
            recipe="paced_recipe:recipe",
            recipe_options={"blocks": 16},
            epochs=epochs,
            seed=seed,
            reader="arrow",
            servers=len(SHARDS),
            workers=len(WORKERS),
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=LEASE_SECONDS / 10,
            # What changes a placement is what the test does.
            rebalance_seconds=0.0,
            **{"replicas": 1, **changes},
        )
        self._spec = create(self.folder, "job", run)
        (self.folder / "logs").mkdir(exist_ok=True)
        # Other hosts can reach the processes, so they need tokens; nobody else is on these links.
        tokens = folder / "tokens.toml"
        tokens.touch(mode=0o600)
        tokens.write_text(new_tokens())
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        secure = {"OARLOCK_TOKEN_FILE": str(tokens), "OARLOCK_PLAINTEXT_TOKENS": "1"}
        self._environment = {**os.environ, **one_thread, **secure}
        self._running: list[Process] = []
        self._watch: subprocess.Popen[bytes] | None = None
        self._unread = b""
        # The newest, and when it came.
        self.status: Status = {}
        self.heard = 0.0
        # Which hosts' processes were begun again, and when.
        self.begun_again: list[str] = []
        self.begun_at: list[float] = []

    def __enter__(self) -> "NetworkJob":
        compile_or_load()
        try:
            self._begin(COORDINATOR)
            self._address = self._wait_for_address()
            for host in (*SHARDS, *WORKERS):
                self._begin(host)
            watch = [sys.executable, "-P", str(Path(__file__).with_name("network_watch.py")), self._address]
            self._watch = subprocess.Popen(
                self.hosts.command(COORDINATOR, watch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
            )
            assert self._watch.stdout is not None
            os.set_blocking(self._watch.stdout.fileno(), False)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, host: str) -> None:
        address = self.hosts.address(host)
        if host == COORDINATOR:
            command = ["oarlock.cluster", "--dir", str(self.folder), "--listen", f"{address}:0"]
        elif host in SHARDS:
            command = ["oarlock.ps", "--coordinator", self._address, "--listen", f"{address}:0"]
            # Where it may be told to write.
            command += ["--root", str(self.folder)]
        else:
            command = ["oarlock.worker", "--coordinator", self._address, "--reader", "arrow"]
        whole = [sys.executable, "-P", "-m", *command, "--until-stdin-closes", "--log-level", "debug"]
        with (self.folder / "logs" / f"{host}.log").open("ab") as log:
            popen = subprocess.Popen(
                self.hosts.command(host, whole), stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment
            )
        self._running.append(Process(host, popen))

    def _wait_for_address(self) -> str:
        found: list[str] = []

        def there() -> bool:
            try:
                found.append(read_address(self.folder))
            except NotFound:
                return False
            return True

        self._until(there, "the coordinator listens")
        return found[0]

    # What the test waits for

    def until(self, wanted: Callable[[Status], bool], what: str, seconds: float = MOST_SECONDS) -> float:
        """Wait until a status that is new from now on is as ``wanted``; return how long that took."""
        begun = time.monotonic()

        def so() -> bool:
            assert self.status.get("phase") not in OVER, f"the job is over: {self.summary()}"
            return self.heard > begun and wanted(self.status)

        self._until(so, what, seconds)
        return time.monotonic() - begun

    def rest(self, seconds: float) -> None:
        """Let the job run for a while."""
        end = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= end, "time passes")

    def _until(self, true: Callable[[], bool], what: str, seconds: float = MOST_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() >= end:
                raise AssertionError(f"not within {seconds:g} s: {what}; the job: {self.summary()}; {self._ends()}")
            self._look()
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Hear what the job says, and begin again what has to be."""
        if self._watch is not None and self._watch.stdout is not None:
            self._unread += self._watch.stdout.read() or b""
            *lines, self._unread = self._unread.split(b"\n")
            if lines:
                self.status, self.heard = json.loads(lines[-1]), time.monotonic()
        for each in [p for p in self._running if p.popen.poll() is not None]:
            self._running.remove(each)
            assert each.popen.stdin is not None
            each.popen.stdin.close()
            code = each.popen.returncode
            if self.status.get("phase") in OVER or code == 0:
                continue
            if code != START_AGAIN:
                raise AssertionError(f"{each.host} ended with code {code}: {self._last_words(each.host)}")
            self.begun_again.append(each.host)
            self.begun_at.append(time.monotonic())
            self._begin(each.host)

    def _last_words(self, host: str) -> str:
        return (self.folder / "logs" / f"{host}.log").read_text(errors="replace")[-2000:]

    def _ends(self) -> str:
        return "; ".join(f"{host}: ...{self._last_words(host)[-300:]}" for host in (COORDINATOR, *SHARDS, *WORKERS))

    def summary(self) -> dict[str, Any]:
        """Return of the newest status what says whether all are back."""
        names = (
            "phase",
            "reason",
            "epoch",
            "splits_closed",
            "generation",
            "incomplete",
            "ownerless",
            "moving",
            "warnings",
        )
        members = [(m["role"], m["id"], m["stats"].get("batches")) for m in self.status.get("members", ())]
        return {**{n: self.status.get(n) for n in names}, "members": members, "begun_again": self.begun_again}

    # What it came to

    def end(self) -> Count:
        """Let the job run to its end without rest; return what it counted."""
        (self._data / HURRY).touch()
        self._until(lambda: self.status.get("phase") in OVER, "the job ends")
        assert self.status["phase"] == DONE, self.status["reason"]
        self._until(lambda: not self._running, "all processes end", END_SECONDS)
        return check(self._data, self.folder, self._spec, self.status["history"])

    def close(self) -> None:
        """End all processes."""
        running = [p.popen for p in self._running] + ([self._watch] if self._watch is not None else [])
        for popen in running:
            assert popen.stdin is not None
            popen.stdin.close()
        for popen in running:
            try:
                popen.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
        if self._watch is not None and self._watch.stdout is not None:
            self._watch.stdout.close()
        self._watch = None
        self._running.clear()


def alive(status: Status, role: str) -> list[dict[str, Any]]:
    """Return the members of a role."""
    return [m for m in status["members"] if m["role"] == role]


def all_members(status: Status) -> bool:
    """Tell whether everybody is a member."""
    return len(alive(status, "shard")) == len(SHARDS) and len(alive(status, "worker")) == len(WORKERS)


def all_there(status: Status) -> bool:
    """Tell whether everybody is a member, and every block has its owner and its copy."""
    return all_members(status) and not status["incomplete"] and not status["ownerless"]


def batches(status: Status) -> dict[int, int]:
    """Return how many batches each worker that is a member has trained, by its incarnation."""
    return {m["incarnation"]: m["stats"].get("batches", 0) for m in alive(status, "worker")}


def all_train(status: Status, before: dict[int, int]) -> bool:
    """Tell whether every worker has trained more since ``before``."""
    now = batches(status)
    return len(now) == len(WORKERS) and all(n > before.get(i, 0) for i, n in now.items())
