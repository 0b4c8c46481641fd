# SPDX-License-Identifier: Apache-2.0
"""A job as local processes: a coordinator, shards and workers, each with a log file in the job's folder.

Invariant: no process outlives the launcher: each ends when its standard input closes, which the launcher's death does too.
A coordinator that a signal ended is started again on the same state and address; of shards and workers there are as many as the
coordinator says are wanted, as far as ends.py allows. What the launcher sees end, the coordinator is told, at once or when it is
back; it need not wait for a lease. One event loop.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from oarlock.checkpoint.roots import roots_of
from oarlock.client.entry import ADDRESS_FILE, read_address
from oarlock.client.job import FAILED, OVER, STOPPED, JobSpec
from oarlock.launch.child import Child
from oarlock.launch.config import RunConfig
from oarlock.launch.ends import Ends
from oarlock.launch.family import Family
from oarlock.launch.folder import record_failure, stored_run, stored_status
from oarlock.launch.processors import Processors
from oarlock.launch.restarts import Notices, Restarts
from oarlock.launch.trace import TraceParts
from oarlock.proto.coordinator_pb2 import StatusReply, StatusRequest, StopRequest
from oarlock.proto.errors import NotFound, PSError, Unavailable
from oarlock.proto.roles import ROLES
from oarlock.proto.rpc import GrpcTransport
from oarlock.proto.security import Security, SecuritySpec

logger = logging.getLogger(__name__)

# Time for the coordinator to open its state and listen; it imports numpy and gRPC on the way.
START_SECONDS = 60.0
# A coordinator that does not answer for so long is asked again; meanwhile nothing is shown and no interrupt is seen.
ASK_SECONDS = 2.0
# Between two looks whether a process has ended.
LOOK_SECONDS = 0.02


class LocalProcesses:
    """Starts, watches, starts again and ends the processes of one job; ``restarts`` is how often, all in all.

    ``metrics_port``: the coordinator's, then come the shards' and the workers'; 0: any; None: no metrics. ``processors``: what
    each one runs on; None: wherever the system puts it.
    ``trace``: gives each process the file that it records itself into. ``push_notes``: the folder in which workers note when each
    push was acknowledged. ``security``: what they, and the launcher, go by.
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
        push_notes: Path | None = None,
        security: Security | None = None,
    ) -> None:
        security = security or Security()
        # Processes of all roles are started, asked and told here.
        security.needs(ROLES)
        self._spec = spec
        self._folder = folder
        self._transport = GrpcTransport(security=security)
        self._notices = Notices()
        self._restarts = Restarts(restarts, self._notices)
        self._family = Family(
            spec,
            folder,
            restore=restore,
            accept_signature=accept_signature,
            log_level=log_level,
            metrics_port=metrics_port,
            processors=processors or Processors(),
            trace=trace,
            push_notes=push_notes,
            security=_bounded(security, spec, folder),
        )
        self._ends = Ends(spec, self._family, self._restarts, self._notices, self.call)

    @property
    def children(self) -> list[Child]:
        """The newest process of each role and number, ended ones too."""
        return list(self._family.children)

    def start_nobody_again(self) -> None:
        """Act from now on as if all restarts were used."""
        self._restarts.most = self._restarts.used

    async def call(self, method: str, request: Any) -> Any:
        """Ask the coordinator."""
        return await self._transport.call(self._family.address, method, request, timeout_seconds=ASK_SECONDS)

    async def run(self, watch: Callable[[dict[str, Any]], bool], watch_seconds: float = 0.25) -> dict[str, Any]:
        """Run the job to its end; return the coordinator's last status.

        ``watch(status)`` is called every ``watch_seconds``, with an empty status while there is none, and with the last one
        and a ``note`` while the coordinator does not answer; once it returns False the job is asked to stop with a checkpoint.
        A process that ends by its own error before the job does makes it fail, and so does a shard without which the job cannot
        go on, or whoever may not be started again, except members while others live: these get the splits, or have copies.
        """
        # Also sees to it that no coordinator runs, before its address is deleted.
        self._family.run_before = stored_run(self._folder)
        (self._folder / ADDRESS_FILE).unlink(missing_ok=True)
        status: dict[str, Any] = {}
        try:
            if await self._listening(watch):
                for number in range(self._spec.servers):
                    self._family.start("shard", number)
                for number in range(self._spec.workers):
                    self._family.start("worker", number)
                status = await self._watch(watch, watch_seconds)
        finally:
            await self._transport.close()
            await self._family.end(graceful=status.get("phase") in OVER and status["phase"] != FAILED)
        if not status:
            return {**stored_status(self._folder), "phase": STOPPED, "reason": "interrupted"}
        if status["phase"] == FAILED:
            record_failure(self._folder, status["reason"])
        return self._told(status)

    async def _listening(self, watch: Callable[[dict[str, Any]], bool]) -> bool:
        """Start the coordinator and wait until it listens; return False if the user had enough before."""
        self._family.start("coordinator", 0)
        end = asyncio.get_running_loop().time() + START_SECONDS
        while asyncio.get_running_loop().time() < end:
            child = self._family.children[0]
            if child.ended and not (child.killed and self._restarts.take(child)):
                raise Unavailable(child.complaint())
            if child.ended:
                self._family.start("coordinator", 0)
            if not watch({}):
                return False
            try:
                self._family.address = read_address(self._folder)
                return True
            except NotFound:
                await asyncio.sleep(0.02)
        raise Unavailable(f"the coordinator did not listen within {START_SECONDS:g} s, see {child.log}")

    async def _watch(self, watch: Callable[[dict[str, Any]], bool], pause: float) -> dict[str, Any]:
        asked = returning = False
        status: dict[str, Any] = {}
        while True:
            # Looked at before the status is asked for: what ended because the job was over, ended after it was.
            ended = [c for c in self._family.children if c.ended]
            answer = await self._ask()
            if answer is not None:
                status = answer
                self._notices.hear(status)
            if status.get("phase") in OVER:
                return self._explained(status)
            if (coordinator := self._family.children[0]) in ended:
                if not (coordinator.killed and self._start_again(coordinator)):
                    return self._without(coordinator, status)
                returning = True
            if answer is not None and (reason := await self._ends.judge(status, ended)):
                # The coordinator has the better words once blocks were trained there.
                latest = await self._ask()
                if latest is None or latest["phase"] not in OVER:
                    return self._failed(status, reason)
            if answer is not None:
                returning, note = False, ""
            else:
                note = f"the coordinator {'is being started again' if returning else 'does not answer'}"
            if not watch(self._told(status, note) if status else {}) and not asked:
                asked = await self._stop("interrupted")
            await self._rest(pause, ended)

    async def _rest(self, seconds: float, ended: list[Child]) -> None:
        """Wait, but no longer than until another process ends than those that have ``ended``."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, end - clock())))
            if clock() >= end or any(c.ended and not any(c is each for each in ended) for c in self._family.children):
                return

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
            reply: StatusReply = await self.call("Coordinator.Status", StatusRequest())
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
        self._family.start(child.role, child.number)
        return True

    def _explained(self, status: dict[str, Any]) -> dict[str, Any]:
        """Say why a shard is gone, if it said so itself."""
        failed = next(
            (c for c in self._family.children if c.role == "shard" and c.process.poll() not in (None, 0)), None
        )
        if status["phase"] == FAILED and failed is not None and failed.end() not in status["reason"]:
            return {**status, "reason": f"{status['reason']} ({failed.complaint()})"}
        return status

    async def _stop(self, reason: str) -> bool:
        """Ask the job to stop with a checkpoint; return whether the coordinator heard it."""
        try:
            await self.call("Coordinator.Stop", StopRequest(checkpoint=True, reason=reason))
        except PSError as error:
            logger.info("event=stop_unheard error=%s", error)
            return False
        return True


def _bounded(security: Security, spec: JobSpec, folder: Path) -> SecuritySpec:
    """Return what the processes are told: where callers are told apart, also where they may name checkpoints."""
    if not (security.identifies or security.spec.roots):
        return security.spec
    return replace(security.spec, roots=(*roots_of(spec, folder), *security.spec.roots))
