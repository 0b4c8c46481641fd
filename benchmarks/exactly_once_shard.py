# SPDX-License-Identifier: Apache-2.0
"""The shards of `oarlock.benchmarks.exactly_once`: one process each, with or without marks (unmarked.py), for one caller.

Invariant: it ends when its standard input closes. The first line on it is the job's spec; for every other one it prints the
processor seconds that it has used.
"""

import json
import subprocess
import sys
import time

from oarlock.benchmarks.unmarked import UnmarkedService
from oarlock.client.job import JobSpec
from oarlock.client.router import ShardAddress
from oarlock.embedding.warmup import warm_up
from oarlock.proto.rpc import GrpcServer
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService

RUN = 1


class ShardProcess:
    """A shard of its own process, as the one who measures sees it."""

    def __init__(self, spec: JobSpec, number: int, *, marks: bool) -> None:
        self._spec = spec
        self._number = number
        self._marks = marks

    def start(self) -> None:
        """Start the process; ``address()`` waits for it."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "oarlock.benchmarks.exactly_once_shard", str(self._number), str(self._marks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(json.dumps(self._spec.to_json()))

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None, "made with a pipe"
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None, "made with a pipe"
        return str(json.loads(self._process.stdout.readline()))

    def address(self) -> ShardAddress:
        return ShardAddress(self._number, self._answer(), incarnation_of(self._number))

    def processor_seconds(self) -> float:
        """Return the processor time that the shard has used."""
        self._ask("")
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None, "made with a pipe"
        assert self._process.stdout is not None, "made with a pipe"
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def incarnation_of(number: int) -> int:
    return 100 + number


def make_service(spec: JobSpec, number: int, *, marks: bool) -> ShardService:
    """Return the service of shard ``number``, as yet without blocks."""
    service = ShardService() if marks else UnmarkedService()
    service.configure(spec, Identity(spec.job_bytes, RUN, number, incarnation_of(number)))
    return service


def main() -> int:
    """Serve until standard input closes."""
    number, marks = int(sys.argv[1]), sys.argv[2] == "True"
    spec = JobSpec.from_json(json.loads(sys.stdin.readline()))
    warm_up()
    server = GrpcServer(make_service(spec, number, marks=marks), "Shard", listen="127.0.0.1:0")
    try:
        print(json.dumps(server.start()), flush=True)
        for _ in sys.stdin:
            print(json.dumps(time.process_time()), flush=True)
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
