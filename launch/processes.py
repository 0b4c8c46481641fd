# SPDX-License-Identifier: Apache-2.0
"""A job as local processes: a coordinator, shards and workers, each with a log file in the job's folder.

Invariant: no process outlives the launcher: each ends when its standard input closes, which the launcher's death does too.
"""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.client.entry import ADDRESS_FILE, read_address
from oarlock.client.job import OVER, JobSpec
from oarlock.proto.coordinator_pb2 import StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import NotFound, PSError, Unavailable
from oarlock.proto.rpc import GrpcTransport

logger = logging.getLogger(__name__)

# Time for the coordinator to open its state and listen; it imports numpy and gRPC on the way.
START_SECONDS = 60.0
# Time for a process to end by itself after the job is over.
END_SECONDS = 15.0


@dataclass
class Child:
    """A started process. ``role`` and ``number`` name its log file."""

    role: str
    number: int
    process: subprocess.Popen[bytes]
    log: Path

    def complaint(self) -> str:
        """Return the last error line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        text = (
            found[-1].removeprefix("error: ") if found else f"ended with code {self.process.returncode}, see {self.log}"
        )
        return f"{self.role} {self.number}: {text}"


class LocalProcesses:
    """Starts, watches and ends the processes of one job."""

    def __init__(self, spec: JobSpec, folder: Path, *, restore: str = "", log_level: str = "info") -> None:
        self._spec = spec
        self._folder = folder
        self._restore = restore
        self._log_level = log_level
        self._children: list[Child] = []
        self._transport = GrpcTransport()

    def _start(self, role: str, number: int, module: str, *arguments: str) -> Child:
        log = self._folder / "logs" / f"{role}-{number}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", module, "--until-stdin-closes", "--log-level", self._log_level, *arguments]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
            )
        child = Child(role, number, process, log)
        self._children.append(child)
        return child

    async def run(self, watch: Callable[[dict[str, Any]], bool], watch_seconds: float = 0.25) -> dict[str, Any]:
        """Run the job to its end; return the coordinator's last status.

        ``watch(status)`` is called every ``watch_seconds``; once it returns False the job is asked to stop with a
        checkpoint. Unavailable names the process that failed to start.
        """
        try:
            address = await self._coordinator()
            for number in range(self._spec.servers):
                self._start("shard", number, "oarlock.ps", "--coordinator", address)
            for number in range(self._spec.workers):
                self._start("worker", number, "oarlock.worker", "--coordinator", address, "--reader", self._spec.reader)
            return await self._watch(address, watch, watch_seconds)
        finally:
            await self._end()

    async def _coordinator(self) -> str:
        (self._folder / ADDRESS_FILE).unlink(missing_ok=True)
        restore = ("--restore", self._restore) if self._restore else ()
        child = self._start("coordinator", 0, "oarlock.cluster", "--dir", str(self._folder), *restore)
        end = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < end:
            if child.process.poll() is not None:
                raise Unavailable(child.complaint())
            try:
                return read_address(self._folder)
            except NotFound:
                await asyncio.sleep(0.02)
        raise Unavailable(f"the coordinator did not listen within {START_SECONDS:g} s, see {child.log}")

    async def _watch(self, address: str, watch: Callable[[dict[str, Any]], bool], pause: float) -> dict[str, Any]:
        asked = False
        status: dict[str, Any] = {}
        while True:
            try:
                reply: StatusReply = await self._transport.call(
                    address, "Coordinator.Status", StatusRequest(), timeout_seconds=5.0
                )
                status = json.loads(reply.status)
            except PSError:
                if self._children[0].process.poll() is not None:
                    return {**status, "phase": "failed", "reason": self._children[0].complaint()}
            if status.get("phase") in OVER:
                return self._explained(status)
            failed = next((c for c in self._children if c.process.poll() not in (None, 0)), None)
            if failed is not None and failed.role != "shard" and not asked:
                await self._stop(address, False, failed.complaint())
                return {**status, "phase": "failed", "reason": failed.complaint()}
            if not watch(status) and not asked:
                asked = True
                await self._stop(address, True, "interrupted")
            await asyncio.sleep(pause)

    def _explained(self, status: dict[str, Any]) -> dict[str, Any]:
        """Say why a shard is gone, if it said so itself."""
        failed = next((c for c in self._children if c.role == "shard" and c.process.poll() not in (None, 0)), None)
        if status["phase"] == "failed" and failed is not None:
            return {**status, "reason": f"{status['reason']} ({failed.complaint()})"}
        return status

    async def _stop(self, address: str, checkpoint: bool, reason: str) -> None:
        try:
            await self._transport.call(
                address, "Coordinator.Stop", StopRequest(checkpoint=checkpoint, reason=reason), timeout_seconds=5.0
            )
        except PSError as error:
            logger.warning("event=stop_unheard error=%s", error)

    async def _end(self) -> None:
        """Let processes end by themselves, then close their input, then kill; returns when none is left."""
        await self._transport.close()
        end = asyncio.get_running_loop().time() + END_SECONDS
        # After a failure nobody has anything left to finish.
        while asyncio.get_running_loop().time() < end and any(c.process.poll() is None for c in self._children):
            if any(c.process.poll() not in (None, 0) for c in self._children):
                break
            await asyncio.sleep(0.02)
        for child in self._children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        for child in self._children:
            try:
                child.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
