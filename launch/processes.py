# SPDX-License-Identifier: Apache-2.0
"""A job as local processes: a coordinator, shards and workers, each with a log file in the job's folder.

Invariant: no process outlives the launcher: each ends when its standard input closes, which the launcher's death does too.
What the launcher sees end, the coordinator is told at once; it need not wait for a lease. One event loop.
"""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarlock.client.entry import ADDRESS_FILE, read_address
from oarlock.client.job import FAILED, OVER, STOPPED, STOPPING, JobSpec
from oarlock.cluster.store import Store
from oarlock.launch.folder import STATE_FILE, record_failure, stored_status
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import LeaveRequest, StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import NotFound, PSError, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport

logger = logging.getLogger(__name__)

# Time for the coordinator to open its state and listen; it imports numpy and gRPC on the way.
START_SECONDS = 60.0
# Time for processes to end by themselves after the job is over, and after their input was closed.
END_SECONDS = 5.0
CLOSE_SECONDS = 3.0
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*")


@dataclass
class Child:
    """A started process. ``role`` and ``number`` name its log file."""

    role: str
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    # Whether its end was dealt with.
    noticed: bool = False

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, rather than it itself."""
        return self.ended and self.process.returncode < 0

    def complaint(self) -> str:
        return f"{self.role} {self.number}: {self.end()}"

    def end(self) -> str:
        """Return why it ended: its own error line, the exception that nobody caught, the signal, or its code."""
        code = self.process.returncode
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            hint = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
            return f"ended by {name}{hint}"
        with self.log.open("rb") as log:
            # The log of an earlier run of the job stands above.
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raised = [line for line in lines[-20:] if _EXCEPTION.fullmatch(line)]
        if own:
            return own[-1]
        if raised:
            return f"{raised[-1]}, see {self.log}"
        return f"ended with code {code}, see {self.log}"


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
        # -P: the current folder may hold a `proto` or a `data` that is not meant.
        command = [
            sys.executable,
            "-P",
            "-m",
            module,
            "--until-stdin-closes",
            "--log-level",
            self._log_level,
            *arguments,
        ]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as out:
            log_start = out.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
            )
        child = Child(role, number, process, log, log_start)
        self._children.append(child)
        return child

    async def run(self, watch: Callable[[dict[str, Any]], bool], watch_seconds: float = 0.25) -> dict[str, Any]:
        """Run the job to its end; return the coordinator's last status.

        ``watch(status)`` is called every ``watch_seconds``, with an empty status while there is none; once it returns False
        the job is asked to stop with a checkpoint. A process that ends before the job does makes it fail, except workers
        that were killed while others live: these get the splits.
        """
        # Before the address of a coordinator that runs is deleted.
        Store(self._folder / STATE_FILE).open().close()
        (self._folder / ADDRESS_FILE).unlink(missing_ok=True)
        status: dict[str, Any] = {}
        try:
            address = await self._coordinator(watch)
            if address:
                for number in range(self._spec.servers):
                    self._start("shard", number, "oarlock.ps", "--coordinator", address)
                reader = self._spec.reader
                for number in range(self._spec.workers):
                    self._start("worker", number, "oarlock.worker", "--coordinator", address, "--reader", reader)
                status = await self._watch(address, watch, watch_seconds)
        finally:
            await self._end(graceful=status.get("phase") in OVER and status["phase"] != FAILED)
        if not status:
            return {**stored_status(self._folder), "phase": STOPPED, "reason": "interrupted"}
        if status["phase"] == FAILED:
            record_failure(self._folder, status["reason"])
        return status

    async def _coordinator(self, watch: Callable[[dict[str, Any]], bool]) -> str:
        """Start the coordinator and return its address; an empty one if the user had enough before."""
        restore = ("--restore", self._restore) if self._restore else ()
        child = self._start("coordinator", 0, "oarlock.cluster", "--dir", str(self._folder), *restore)
        end = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < end:
            if child.ended:
                raise Unavailable(child.complaint())
            if not watch({}):
                return ""
            try:
                return read_address(self._folder)
            except NotFound:
                await asyncio.sleep(0.02)
        raise Unavailable(f"the coordinator did not listen within {START_SECONDS:g} s, see {child.log}")

    async def _watch(self, address: str, watch: Callable[[dict[str, Any]], bool], pause: float) -> dict[str, Any]:
        asked = False
        status: dict[str, Any] = {}
        while True:
            # Looked at before the status is asked for: what ended because the job was over, ended after it was.
            ended = [c for c in self._children if c.ended]
            try:
                reply: StatusReply = await self._transport.call(
                    address, "Coordinator.Status", StatusRequest(), timeout_seconds=5.0
                )
                status = json.loads(reply.status)
            except PSError as error:
                logger.info("event=status_unanswered error=%s", error)
            if status.get("phase") in OVER:
                return self._explained(status)
            coordinator = self._children[0]
            if coordinator in ended and coordinator.process.returncode == 0:
                # It ended in good order between two questions; what it had to say is in its file.
                stored = stored_status(self._folder)
                if stored["phase"] in OVER:
                    return self._explained({**status, **stored})
            if failed := await self._judge(address, status, ended):
                return {**self._blank(), **status, "phase": FAILED, "reason": failed}
            if not watch(status) and not asked:
                asked = True
                await self._stop(address, True, "interrupted")
            await asyncio.sleep(pause)

    def _blank(self) -> dict[str, Any]:
        """Return the status of a job that nobody could be asked about."""
        return {"name": self._spec.name, "history": [], "best": None, "checkpoints": [], "run": 1, "samples": 0}

    async def _judge(self, address: str, status: dict[str, Any], ended: list[Child]) -> str:
        """Deal with processes that ended; return why the job cannot go on, if it cannot."""
        stopping = status.get("phase") == STOPPING
        for child in ended:
            if child.noticed:
                continue
            child.noticed = True
            await self._report(address, status, child)
            if child.role == "coordinator":
                return child.complaint()
            if child.role == "shard":
                # The coordinator has the better words once blocks were trained there.
                if not await self._is_over(address):
                    return f"{child.complaint()}; the job cannot go on without it"
            elif not stopping and not child.killed and not _struck_off(status, child):
                return child.complaint()
        workers = [c for c in ended if c.role == "worker"]
        if len(workers) == self._spec.workers and not stopping and not await self._is_over(address):
            return f"no worker is left; {workers[-1].complaint()}"
        return ""

    async def _is_over(self, address: str) -> bool:
        try:
            reply = await self._transport.call(address, "Coordinator.Status", StatusRequest(), timeout_seconds=5.0)
        except PSError:
            return False
        return json.loads(reply.status)["phase"] in OVER

    async def _report(self, address: str, status: dict[str, Any], child: Child) -> None:
        """Tell the coordinator of an end that the process may not have told itself."""
        for member in status.get("members", ()):
            if member["pid"] == child.process.pid and member["role"] == child.role:
                header = Header(
                    protocol=PROTOCOL,
                    job=self._spec.job_bytes,
                    run=status["run"],
                    sender=member["incarnation"],
                )
                request = LeaveRequest(header=header, error=child.end())
                try:
                    await self._transport.call(address, "Coordinator.Leave", request, timeout_seconds=5.0)
                except PSError as error:
                    logger.info("event=leave_unheard error=%s", error)

    def _explained(self, status: dict[str, Any]) -> dict[str, Any]:
        """Say why a shard is gone, if it said so itself."""
        failed = next((c for c in self._children if c.role == "shard" and c.process.poll() not in (None, 0)), None)
        if status["phase"] == FAILED and failed is not None and failed.end() not in status["reason"]:
            return {**status, "reason": f"{status['reason']} ({failed.complaint()})"}
        return status

    async def _stop(self, address: str, checkpoint: bool, reason: str) -> None:
        try:
            await self._transport.call(
                address, "Coordinator.Stop", StopRequest(checkpoint=checkpoint, reason=reason), timeout_seconds=5.0
            )
        except PSError as error:
            logger.warning("event=stop_unheard error=%s", error)

    async def _end(self, *, graceful: bool) -> None:
        """Let processes end by themselves if ``graceful``, then close their input, then kill; returns when none is left."""
        await self._transport.close()
        if graceful:
            await self._wait_for_all(END_SECONDS)
        for child in self._children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        await self._wait_for_all(CLOSE_SECONDS)
        for child in self._children:
            if not child.ended:
                child.process.kill()
            child.process.wait()

    async def _wait_for_all(self, seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while clock() < end and not all(c.ended for c in self._children):
            await asyncio.sleep(0.02)


def _struck_off(status: dict[str, Any], child: Child) -> bool:
    """Whether the coordinator had given the process up before it ended: it was away too long, and found no way back."""
    return any(m["pid"] == child.process.pid and m["role"] == child.role for m in status.get("lost", ()))
