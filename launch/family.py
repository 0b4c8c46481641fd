# SPDX-License-Identifier: Apache-2.0
"""Family: the processes that the launcher started for one job: what each is started with, and how all are ended.

Invariant: one process at most of each role and number runs; a number's ports, cores and log file are its own. One event loop.
"""

import asyncio
from pathlib import Path

from oarlock.client.job import JobSpec
from oarlock.client.processors import format_cores
from oarlock.launch.child import Child, start_child
from oarlock.launch.folder import stored_run
from oarlock.launch.processors import Processors
from oarlock.launch.trace import TraceParts
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.security import SecuritySpec

# Time for a coordinator that is started again to get the address back that it had.
LISTEN_SECONDS = 30.0
# Time for processes to end by themselves after the job is over, and after their input was closed.
END_SECONDS = 5.0
CLOSE_SECONDS = 3.0
# The same, after the coordinator has ended.
ALONE_SECONDS = 1.0
MAX_PORT = 65535


class Family:
    """``children``: the newest process of each role and number, ended ones too; the coordinator first. ``address``: its own.

    ``metrics_port``: the coordinator's, then come those of the shards and workers that the job begins with, then those of whoever
    comes later; 0: any; None: no metrics.
    """

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        *,
        restore: str,
        accept_signature: bool,
        log_level: str,
        metrics_port: int | None,
        processors: Processors,
        trace: TraceParts | None,
        push_notes: Path | None,
        security: SecuritySpec,
    ) -> None:
        self._security = security
        self._spec = spec
        self._folder = folder
        self._restore = restore
        self._accept_signature = accept_signature
        self._log_level = log_level
        self._metrics_port = metrics_port
        self._processors = processors
        self._trace = trace
        self._push_notes = push_notes
        self.children: list[Child] = []
        self.address = ""
        # The run that the state was in before the first coordinator was started.
        self.run_before = 0
        # By role and number, which port after the first one; a number keeps it.
        begins = [("coordinator", 0), *(("shard", n) for n in range(spec.servers))]
        begins += [("worker", n) for n in range(spec.workers)]
        self._places = {each: place for place, each in enumerate(begins)}
        if metrics_port and metrics_port + len(begins) - 1 > MAX_PORT:
            raise InvalidArgument(
                f"--metrics-port {metrics_port} and one more for each of {spec.servers} shards and {spec.workers} workers "
                f"goes beyond {MAX_PORT}: give a lower one, or 0"
            )

    def of(self, role: str) -> list[Child]:
        """Return the processes of a role, ended ones too."""
        return [c for c in self.children if c.role == role]

    def start(self, role: str, number: int) -> None:
        """Start a process, in the place of the one that was there."""
        if role == "coordinator":
            module, arguments = "oarlock.cluster", ["--dir", str(self._folder)]
            # A run is begun once. A coordinator that died before it had recorded the new one is told again.
            if stored_run(self._folder) == self.run_before:
                arguments += ["--restore", self._restore] if self._restore else []
                arguments += ["--accept-signature"] if self._accept_signature else []
            if self.address:
                # Where its members look for it.
                arguments += ["--listen", self.address, "--listen-seconds", f"{LISTEN_SECONDS:g}"]
        else:
            module = "oarlock.ps" if role == "shard" else "oarlock.worker"
            arguments = ["--coordinator", self.address]
            if role == "worker":
                arguments += ["--reader", self._spec.reader]
                arguments += ["--push-notes", str(self._push_notes)] if self._push_notes is not None else []
            else:
                arguments += ["--spill-folder", str(self._folder)]
                arguments += ["--request-memory-bytes", str(self._processors.request_memory_bytes)]
                arguments += ["--network-threads", str(self._processors.network_threads)]
        arguments += self._security.arguments()
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
        for place, old in enumerate(self.children):
            if (old.role, old.number) == (role, number):
                if old.process.stdin is not None:
                    old.process.stdin.close()
                self.children[place] = child
                return
        self.children.append(child)

    def start_another(self, role: str) -> int:
        """Start one more process of a role, under the lowest number that is free; return it."""
        taken = {c.number for c in self.of(role) if not (c.ended and c.noticed)}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        self.start(role, number)
        return number

    def _metrics(self, role: str, number: int) -> list[str]:
        """Return the options of a process's metrics."""
        if self._metrics_port is None:
            return []
        # The port of one that comes later, or again, may be taken, which is no reason for the job to fail after all.
        later = (role, number) not in self._places or any((c.role, c.number) == (role, number) for c in self.children)
        place = self._places.setdefault((role, number), len(self._places))
        port = self._metrics_port + place if self._metrics_port else 0
        arguments = ["--metrics-port", str(port if port <= MAX_PORT else 0)]
        return [*arguments, "--metrics-if-free"] if later else arguments

    async def end(self, *, graceful: bool) -> None:
        """Let processes end by themselves if ``graceful``, then close their input, then kill; returns when none is left."""
        if graceful:
            await self._wait_for_all(END_SECONDS, ALONE_SECONDS)
        for child in self.children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        await self._wait_for_all(CLOSE_SECONDS)
        for child in self.children:
            if not child.ended:
                child.process.kill()
            child.process.wait()

    async def _wait_for_all(self, seconds: float, alone_seconds: float | None = None) -> None:
        """Wait until all have ended; at most ``seconds``, and at most ``alone_seconds`` without the coordinator."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while clock() < end and not all(c.ended for c in self.children):
            if alone_seconds is not None and self.children[0].ended:
                # Whoever has not heard by now that the job is over, will not.
                end, alone_seconds = min(end, clock() + alone_seconds), None
            await asyncio.sleep(0.02)
