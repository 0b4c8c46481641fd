# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.cluster`: the coordinator of the job in a folder."""

import asyncio
import random
import signal
import sys
import time
from pathlib import Path

from oarlock.checkpoint.store import open_checkpoint
from oarlock.client.entry import ADDRESS_FILE, parser, run, write_address
from oarlock.client.job import JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_coordinator
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.proto.errors import NotFound
from oarlock.proto.rpc import GrpcServer, GrpcTransport


def main() -> int:
    """Run the coordinator until its job is over."""
    options = parser("oarlock.cluster", "The coordinator: membership, placement, work and checkpoints of one job.")
    options.add_argument("--dir", required=True, type=Path, help="the job's folder, with job.json in it")
    options.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT|unix:PATH", help="port 0: any free port")
    options.add_argument("--restore", default="", metavar="PATH", help="begin a new run from this checkpoint")
    given = options.parse_args()
    folder: Path = given.dir.absolute()

    async def body() -> None:
        try:
            spec = JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise NotFound(
                f"{folder / 'job.json'} cannot be read ({error.strerror}); make it with `oarlock prepare`"
            ) from None
        store = Store(folder / "state.sqlite").open()
        transport = GrpcTransport()
        server: GrpcServer | None = None
        try:
            coordinator = Coordinator(store, spec, clock=boot_clock, rng=random.SystemRandom())
            coordinator.open()
            if given.restore:
                coordinator.begin_run(open_checkpoint(given.restore)[1], given.restore)
            server = GrpcServer(CoordinatorService(coordinator), "Coordinator", listen=given.listen, threads=16)
            write_address(folder, server.start())
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, coordinator.stop, True, signal.Signals(number).name)
            await run_coordinator(coordinator, Orders(coordinator, transport, folder / "checkpoints"))
        finally:
            if server is not None:
                server.stop()
                (folder / ADDRESS_FILE).unlink(missing_ok=True)
            await transport.close()
            store.close()

    return run(body, given)


def boot_clock() -> float:
    """Return seconds that also pass while the machine sleeps: leases end then, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
