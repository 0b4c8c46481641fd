# SPDX-License-Identifier: Apache-2.0
"""A job as local processes: a coordinator, shards and workers, each with a log file in the job's folder.

Invariant: no process outlives the launcher: each ends when its standard input closes, which the launcher's death does too.
A coordinator that a signal ended is started again on the same state and address, a worker while the job wants workers. What
the launcher sees end, the coordinator is told, at once or when it is back; it need not wait for a lease. One event loop.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oarlock.client.entry import ADDRESS_FILE, read_address
from oarlock.client.job import FAILED, OVER, STOPPED, STOPPING, JobSpec
from oarlock.client.processors import format_cores
from oarlock.launch.child import Child, start_child
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import record_failure, stored_run, stored_status
from oarlock.launch.processors import Processors
from oarlock.launch.restarts import Notices, Restarts
from oarlock.launch.trace import TraceParts
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import LeaveRequest, StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import GrpcTransport

logger = logging.getLogger(__name__)

# Time for the coordinator to open its state and listen; it imports numpy and gRPC on the way.
START_SECONDS = 60.0
# Time for a coordinator that is started again to get the address back that it had.
LISTEN_SECONDS = 30.0
# A coordinator that does not answer for so long is asked again; meanwhile nothing is shown and no interrupt is seen.
ASK_SECONDS = 2.0
# Time for processes to end by themselves after the job is over, and after their input was closed.
END_SECONDS = 5.0
CLOSE_SECONDS = 3.0
# The same, after the coordinator has ended.
ALONE_SECONDS = 1.0
MAX_PORT = 65535


class LocalProcesses:
    """Starts, watches, starts again and ends the processes of one job; ``restarts`` is how often, all in all.

    ``metrics_port``: the coordinator's, then come the shards' and the workers'; 0: any; None: no metrics. ``processors``: what
    each one runs on; None: wherever the system puts it.
    ``trace``: gives each process the file that it records itself into.
    """

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        *,
        restore: str = "",
        accept_signature: bool = False,
        log_level: str = "info",
        restarts: int = RunConfig.restarts,
        metrics_port: int | None = None,
        processors: Processors | None = None,
        trace: TraceParts | None = None,
    ) -> None:
        self._spec = spec
        self._processors = processors or Processors()
        self._folder = folder
        self._restore = restore
        self._accept_signature = accept_signature
        self._log_level = log_level
        self._children: list[Child] = []
        self._transport = GrpcTransport()
        self._notices = Notices()
        self._restarts = Restarts(restarts, self._notices)
        # The run that the state was in before the first coordinator was started.
        self._run_before = 0
        self._address = ""
        self._metrics_port = metrics_port
        self._trace = trace
        if metrics_port and metrics_port + spec.servers + spec.workers > MAX_PORT:
            raise InvalidArgument(
                f"--metrics-port {metrics_port} and one more for each of {spec.servers} shards and {spec.workers} workers "
                f"goes beyond {MAX_PORT}: give a lower one, or 0"
            )
        # Processes that ended, and what the coordinator is still to be told of it.
        self._unreported: list[tuple[Child, str]] = []

    @property
    def children(self) -> list[Child]:
        """The newest process of each role and number, ended ones too."""
        return list(self._children)

    def _start(self, role: str, number: int) -> None:
        """Start a process, in the place of the one that was there."""
        if role == "coordinator":
            module, arguments = "oarlock.cluster", ["--dir", str(self._folder)]
            # A run is begun once. A coordinator that died before it had recorded the new one is told again.
            if stored_run(self._folder) == self._run_before:
                arguments += ["--restore", self._restore] if self._restore else []
                arguments += ["--accept-signature"] if self._accept_signature else []
            if self._address:
                # Where its members look for it.
                arguments += ["--listen", self._address, "--listen-seconds", f"{LISTEN_SECONDS:g}"]
        else:
            module = "oarlock.ps" if role == "shard" else "oarlock.worker"
            arguments = ["--coordinator", self._address]
            if role == "worker":
                arguments += ["--reader", self._spec.reader]
            else:
                arguments += ["--spill-folder", str(self._folder)]
                arguments += ["--request-memory-bytes", str(self._processors.request_memory_bytes)]
                arguments += ["--network-threads", str(self._processors.network_threads)]
        arguments += self._metrics(role, number)
        arguments += self._trace.options(role, number) if self._trace is not None else []
        if cores := self._processors.of(role, number):
            arguments += ["--pin-cores", format_cores(cores)]
        child = start_child(
            role,
            number,
            module,
            arguments,
            logs=self._folder / "logs",
            log_level=self._log_level,
            blas_threads=self._spec.blas_threads if role == "worker" else 1,
        )
        for place, old in enumerate(self._children):
            if (old.role, old.number) == (role, number):
                if old.process.stdin is not None:
                    old.process.stdin.close()
                self._children[place] = child
                return
        self._children.append(child)

    def _metrics(self, role: str, number: int) -> list[str]:
        """Return the options of a process's metrics."""
        if self._metrics_port is None:
            return []
        place = {"coordinator": 0, "shard": 1, "worker": 1 + self._spec.servers}[role] + number
        arguments = ["--metrics-port", str(self._metrics_port and self._metrics_port + place)]
        # Its port may have been taken in between, which is no reason for the job to fail after all.
        again = any((child.role, child.number) == (role, number) for child in self._children)
        return [*arguments, "--metrics-if-free"] if again else arguments

    async def run(self, watch: Callable[[dict[str, Any]], bool], watch_seconds: float = 0.25) -> dict[str, Any]:
        """Run the job to its end; return the coordinator's last status.

        ``watch(status)`` is called every ``watch_seconds``, with an empty status while there is none, and with the last one
        and a ``note`` while the coordinator does not answer; once it returns False the job is asked to stop with a checkpoint.
        A process that ends by its own error before the job does makes it fail, and so does a shard or whoever may not be
        started again, except workers while others live: these get the splits.
        """
        # Also sees to it that no coordinator runs, before its address is deleted.
        self._run_before = stored_run(self._folder)
        (self._folder / ADDRESS_FILE).unlink(missing_ok=True)
        status: dict[str, Any] = {}
        try:
            if await self._listening(watch):
                for number in range(self._spec.servers):
                    self._start("shard", number)
                for number in range(self._spec.workers):
                    self._start("worker", number)
                status = await self._watch(watch, watch_seconds)
        finally:
            await self._end(graceful=status.get("phase") in OVER and status["phase"] != FAILED)
        if not status:
            return {**stored_status(self._folder), "phase": STOPPED, "reason": "interrupted"}
        if status["phase"] == FAILED:
            record_failure(self._folder, status["reason"])
        return self._told(status)

    async def _listening(self, watch: Callable[[dict[str, Any]], bool]) -> bool:
        """Start the coordinator and wait until it listens; return False if the user had enough before."""
        self._start("coordinator", 0)
        end = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < end:
            child = self._children[0]
            if child.ended and not (child.killed and self._restarts.take(child)):
                raise Unavailable(child.complaint())
            if child.ended:
                self._start("coordinator", 0)
            if not watch({}):
                return False
            try:
                self._address = read_address(self._folder)
                return True
            except NotFound:
                await asyncio.sleep(0.02)
        raise Unavailable(f"the coordinator did not listen within {START_SECONDS:g} s, see {child.log}")

    async def _watch(self, watch: Callable[[dict[str, Any]], bool], pause: float) -> dict[str, Any]:
        asked = returning = False
        status: dict[str, Any] = {}
        while True:
            # Looked at before the status is asked for: what ended because the job was over, ended after it was.
            ended = [c for c in self._children if c.ended]
            answer = await self._ask()
            if answer is not None:
                status = answer
                self._notices.hear(status)
            if status.get("phase") in OVER:
                return self._explained(status)
            if (coordinator := self._children[0]) in ended:
                if not (coordinator.killed and self._start_again(coordinator)):
                    return self._without(coordinator, status)
                returning = True
            if answer is not None and (reason := await self._judge(status, ended)):
                return self._failed(status, reason)
            if answer is not None:
                returning, note = False, ""
            else:
                note = f"the coordinator {'is being started again' if returning else 'does not answer'}"
            if not watch(self._told(status, note) if status else {}) and not asked:
                asked = await self._stop("interrupted")
            await asyncio.sleep(pause)

    def _without(self, coordinator: Child, status: dict[str, Any]) -> dict[str, Any]:
        """Return the last status of a job whose coordinator ended for good."""
        # If it ended with the job, between two questions, what it had to say is in its file.
        stored = self._stored()
        if stored.get("phase") in OVER:
            return self._explained({**status, **stored})
        return self._failed(status, coordinator.complaint())

    async def _ask(self) -> dict[str, Any] | None:
        """Return the coordinator's status, None if it does not answer."""
        try:
            reply: StatusReply = await self._transport.call(
                self._address, "Coordinator.Status", StatusRequest(), timeout_seconds=ASK_SECONDS
            )
        except PSError as error:
            logger.info("event=status_unanswered error=%s", error)
            return None
        status: dict[str, Any] = json.loads(reply.status)
        if status["job"] == self._spec.job:
            return status
        # While ours is away its port is anybody's.
        logger.info("event=status_of_another_job job=%s", status["job"])
        return None

    def _told(self, status: dict[str, Any], note: str = "") -> dict[str, Any]:
        """Return the status with what the launcher has to add; ``warnings`` are those of all the coordinator's lives."""
        told = {**status, "warnings": list(self._notices.told), "restarts": self._restarts.used}
        return {**told, "note": note} if note else told

    def _failed(self, status: dict[str, Any], reason: str) -> dict[str, Any]:
        # What is asked of any status, for a job that nobody could be asked about.
        blank: dict[str, Any] = {
            "name": self._spec.name,
            "history": [],
            "best": None,
            "checkpoints": [],
            "run": 1,
            "samples": 0,
        }
        return {**blank, **status, "phase": FAILED, "reason": reason}

    def _stored(self) -> dict[str, Any]:
        try:
            return stored_status(self._folder)
        except PSError:
            return {}

    def _start_again(self, child: Child) -> bool:
        """Start a process in the place of one that ended; return False if that is not allowed."""
        if not self._restarts.take(child):
            return False
        self._start(child.role, child.number)
        return True

    async def _judge(self, status: dict[str, Any], ended: list[Child]) -> str:
        """Deal with processes that ended before ``status`` was asked for; return why the job cannot go on, if it cannot."""
        wanted = status["phase"] != STOPPING
        failed = ""
        for child in ended:
            if child.noticed or child.role == "coordinator":
                continue
            child.noticed = True
            words = child.end()
            if child.role == "shard":
                failed = failed or f"{child.complaint()}; the job cannot go on without it"
            elif child.replaceable:
                # No error of its own, so none that the coordinator would hold against the splits that it had.
                words = ""
                if wanted:
                    self._start_again(child)
            elif child.process.returncode == 0:
                self._notices.say(f"worker {child.number} left as it was asked to; the others go on")
            elif wanted and not _struck_off(status, child):
                failed = failed or child.complaint()
            self._unreported.append((child, words))
        await self._report(status)
        workers = [c for c in self._children if c.role == "worker"]
        if wanted and not failed and all(c in ended for c in workers) and not self._others(status):
            failed = f"no worker is left; {workers[-1].complaint()}"
        if failed:
            # The coordinator has the better words once blocks were trained there.
            latest = await self._ask()
            if latest is not None and latest["phase"] in OVER:
                return ""
        return failed

    def _others(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Return workers that somebody else started."""
        mine = [*self._children, *(child for child, _ in self._unreported)]
        return [m for m in status["members"] if m["role"] == "worker" and not any(_is(m, c) for c in mine)]

    async def _report(self, status: dict[str, Any]) -> None:
        """Tell the coordinator of ends that processes may not have told themselves; what it does not hear is kept."""
        left = []
        for child, words in self._unreported:
            for member in status["members"]:
                if _is(member, child):
                    header = Header(
                        protocol=PROTOCOL, job=self._spec.job_bytes, run=status["run"], sender=member["incarnation"]
                    )
                    request = LeaveRequest(header=header, error=words)
                    try:
                        await self._transport.call(
                            self._address, "Coordinator.Leave", request, timeout_seconds=ASK_SECONDS
                        )
                    except PSError as error:
                        logger.info("event=leave_unheard error=%s", error)
                        if error.retryable:
                            left.append((child, words))
        self._unreported = left

    def _explained(self, status: dict[str, Any]) -> dict[str, Any]:
        """Say why a shard is gone, if it said so itself."""
        failed = next((c for c in self._children if c.role == "shard" and c.process.poll() not in (None, 0)), None)
        if status["phase"] == FAILED and failed is not None and failed.end() not in status["reason"]:
            return {**status, "reason": f"{status['reason']} ({failed.complaint()})"}
        return status

    async def _stop(self, reason: str) -> bool:
        """Ask the job to stop with a checkpoint; return whether the coordinator heard it."""
        request = StopRequest(checkpoint=True, reason=reason)
        try:
            await self._transport.call(self._address, "Coordinator.Stop", request, timeout_seconds=ASK_SECONDS)
        except PSError as error:
            logger.info("event=stop_unheard error=%s", error)
            return False
        return True

    async def _end(self, *, graceful: bool) -> None:
        """Let processes end by themselves if ``graceful``, then close their input, then kill; returns when none is left."""
        await self._transport.close()
        if graceful:
            await self._wait_for_all(END_SECONDS, ALONE_SECONDS)
        for child in self._children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        await self._wait_for_all(CLOSE_SECONDS)
        for child in self._children:
            if not child.ended:
                child.process.kill()
            child.process.wait()

    async def _wait_for_all(self, seconds: float, alone_seconds: float | None = None) -> None:
        """Wait until all have ended; at most ``seconds``, and at most ``alone_seconds`` without the coordinator."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while clock() < end and not all(c.ended for c in self._children):
            if alone_seconds is not None and self._children[0].ended:
                # Whoever has not heard by now that the job is over, will not.
                end, alone_seconds = min(end, clock() + alone_seconds), None
            await asyncio.sleep(0.02)


def _is(member: dict[str, Any], child: Child) -> bool:
    """Whether a member of a status is this process; a number of another machine's process says nothing."""
    return bool(
        member["pid"] == child.process.pid
        and member["role"] == child.role
        and member["host"] == socket.gethostname()[:256]
    )


def _struck_off(status: dict[str, Any], child: Child) -> bool:
    """Whether the coordinator had given the process up before it ended: it was away too long, and found no way back."""
    return any(_is(m, child) for m in status.get("lost", ()))
