# SPDX-License-Identifier: Apache-2.0
"""Ends: what follows when a shard or a worker ends while its job goes on, and how many are started that are missing.

    in good order       told to leave: nothing. By itself: nobody comes in its place
    killed, or away     started again, while so many are wanted and restarts are left; a shard that hangs and was struck off is
                        killed first. The job goes on without a shard: with copies, or without its blocks (on_loss "reload"), or
                        it goes back with all (on_loss "rollback"), which takes as many shards as are wanted
    its own error       the job fails; but not for a shard that was a member. A worker that told the coordinator itself, which
                        holds it against its split, is done without: the job fails once no worker is left

Invariant: each end is dealt with once, and told to the coordinator before anything is started in its place: at once, or when
it hears again. One event loop.
"""

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from oarlock.client.job import GATHERING, RELOAD, STOPPING, JobSpec
from oarlock.launch.child import Child
from oarlock.launch.family import Family
from oarlock.launch.restarts import Notices, Restarts
from oarlock.launch.wanted import ROLES, Wanted, leaving
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import LeaveRequest
from oarlock.proto.errors import PSError
from oarlock.proto.methods import PROTOCOL

logger = logging.getLogger(__name__)


class Ends:
    """``call(method, request)`` asks the coordinator."""

    def __init__(
        self,
        spec: JobSpec,
        family: Family,
        restarts: Restarts,
        notices: Notices,
        call: Callable[[str, Any], Awaitable[Any]],
    ) -> None:
        self._spec = spec
        self._family = family
        self._restarts = restarts
        self._notices = notices
        self._call = call
        self._wanted = Wanted(spec)
        # Processes that ended, and what the coordinator is still to be told of it.
        self._unreported: list[tuple[Child, str]] = []

    async def judge(self, status: dict[str, Any], ended: list[Child]) -> str:
        """Deal with processes that ended before ``status`` was asked for; return why the job cannot go on, if it cannot."""
        wanted = status["phase"] != STOPPING
        self._wanted.hear(status)
        failed, again = "", []
        for child in ended:
            if child.noticed or child.role == "coordinator":
                continue
            child.noticed = True
            words = child.end()
            if child.process.returncode == 0 and not (child.role == "shard" and status["phase"] == GATHERING):
                self._left(child)
            elif child.role == "shard" and not self._goes_on_without(child, status):
                failed = failed or f"{child.complaint()}; the job cannot go on without it{_how_to_go_on(status)}"
            elif child.role == "shard" or child.replaceable:
                again.append(child)
                # Of a worker it is no error of its own, so none that the coordinator would hold against its splits.
                words = words if child.role == "shard" else ""
            elif wanted and not _is_one_of(status.get("lost", ()), child):
                failed = failed or child.complaint()
            elif wanted:
                # Another one would meet the same error, again and again.
                self._wanted.goes_without(child.role)
            self._unreported.append((child, words))
        await self._report(status)
        failed = failed or self._end_given_up(status)
        if wanted and not failed:
            self._start_again(status, again)
            self._start_missing(status)
        return failed or self._nobody_left(status, ended) or self._cannot_gather(status)

    def _left(self, child: Child) -> None:
        if self._wanted.went(child.role, child.process.pid):
            self._notices.say(f"{child.role} {child.number} left as it was asked to; the others go on")
        else:
            logger.info("event=left role=%s number=%d", child.role, child.number)

    def _goes_on_without(self, child: Child, status: dict[str, Any]) -> bool:
        """Whether the death of a shard is one that the job survives; one that cannot even start would die again."""
        if not self._spec.replicas and self._spec.on_loss != RELOAD and not self._restarts.left:
            # It goes back, and needs as many as it had.
            return False
        return child.replaceable or _is_one_of([*status["members"], *status.get("lost", ())], child)

    def _end_given_up(self, status: dict[str, Any]) -> str:
        """Kill shards that hang: they were struck off, would end as soon as they hear of it, and stand in another one's place.

        Return why the job cannot go on without one of them, if it cannot.
        """
        for child in self._family.of("shard"):
            given_up = _is_one_of(status.get("lost", ()), child) and not _is_one_of(status["members"], child)
            if not given_up or child.ended or child.given_up:
                continue
            words = f"shard {child.number} was away for longer than its lease"
            if not self._goes_on_without(child, status):
                return f"{words}; the job cannot go on without it{_how_to_go_on(status)}"
            self._notices.say(f"{words}, and is ended")
            child.process.kill()
            child.given_up = True
        return ""

    def _staying(self, role: str, status: dict[str, Any]) -> int:
        """Return how many processes of a role are here and not told to leave."""
        go = leaving(status)
        # Whose end is not dealt with yet is not missed yet.
        return sum(not c.noticed and (c.role, c.process.pid) not in go for c in self._family.of(role))

    def _start_again(self, status: dict[str, Any], again: list[Child]) -> None:
        for child in again:
            if self._staying(child.role, status) >= self._wanted.numbers[child.role]:
                logger.info("event=not_missed role=%s number=%d", child.role, child.number)
            elif self._restarts.take(child):
                self._family.start(child.role, child.number)
            else:
                self._wanted.goes_without(child.role)

    def _start_missing(self, status: dict[str, Any]) -> None:
        for role in ROLES:
            there = self._staying(role, status) + len(self._others(role, status))
            for _ in range(self._wanted.missing(role, there)):
                number = self._family.start_another(role)
                logger.info("event=started role=%s number=%d", role, number)

    def _nobody_left(self, status: dict[str, Any], ended: list[Child]) -> str:
        """Return that all shards, or all workers, are gone and nobody comes; empty if it is not so."""
        for role in ROLES:
            mine = self._family.of(role)
            # A job that stops lets its workers go; without shards it cannot even do that.
            if status["phase"] == STOPPING and role == "worker":
                continue
            if all(c in ended for c in mine) and not self._others(role, status):
                return f"no {role} is left; {mine[-1].complaint()}"
        return ""

    def _cannot_gather(self, status: dict[str, Any]) -> str:
        """Return that a job that goes back has fewer shards than it needs, and none is started; empty if it is not so."""
        there = self._staying("shard", status) + len(self._others("shard", status))
        if status["phase"] != GATHERING or not self._wanted.lacks("shard", there):
            return ""
        wanted = self._wanted.numbers["shard"]
        return f"{there} of {wanted} shards are left, and no more are started{_how_to_go_on(status)}"

    def _others(self, role: str, status: dict[str, Any]) -> list[dict[str, Any]]:
        """Return members of a role that somebody else started."""
        mine = [*self._family.children, *(child for child, _ in self._unreported)]
        return [m for m in status["members"] if m["role"] == role and not any(_is(m, c) for c in mine)]

    async def _report(self, status: dict[str, Any]) -> None:
        """Tell the coordinator of ends that processes may not have told themselves; what it does not hear is kept."""
        left = []
        for child, words in self._unreported:
            for member in status["members"]:
                if _is(member, child):
                    header = Header(
                        protocol=PROTOCOL, job=self._spec.job_bytes, run=status["run"], sender=member["incarnation"]
                    )
                    try:
                        await self._call("Coordinator.Leave", LeaveRequest(header=header, error=words))
                    except PSError as error:
                        logger.info("event=leave_unheard error=%s", error)
                        if error.retryable:
                            left.append((child, words))
        self._unreported = left


def _how_to_go_on(status: dict[str, Any]) -> str:
    return "; go on from the last checkpoint with --resume" if status["checkpoints"] else ""


def _is(member: dict[str, Any], child: Child) -> bool:
    """Whether a member of a status is this process; a number of another machine's process says nothing."""
    return bool(
        member["pid"] == child.process.pid
        and member["role"] == child.role
        and member["host"] == socket.gethostname()[:256]
    )


def _is_one_of(members: Any, child: Child) -> bool:
    """Whether a process is one of ``members``: among the lost it was away too long, and found no way back."""
    return any(_is(m, child) for m in members)
