# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.cluster`: the coordinator of the job in a folder."""

import asyncio
import contextlib
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from oarlock.checkpoint.place import place_of
from oarlock.checkpoint.roots import Roots, roots_of
from oarlock.client.entry import ADDRESS_FILE, parser, run, write_address
from oarlock.client.job import JobSpec
from oarlock.client.processors import announce
from oarlock.client.security import security_of
from oarlock.client.telemetry import Telemetry, client_source, observed_as, server_source
from oarlock.client.trace import trace_requests
from oarlock.cluster.beginning import begin
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.orders import Orders
from oarlock.cluster.process import run_job
from oarlock.cluster.service import CoordinatorService
from oarlock.cluster.store import Store
from oarlock.cluster.telemetry import coordinator_source
from oarlock.proto.errors import InvalidArgument, NotFound, PSError
from oarlock.proto.rpc import GrpcServer, GrpcTransport

logger = logging.getLogger(__name__)

LISTEN_PAUSE_SECONDS = 0.2


def main() -> int:
    """Run the coordinator until its job is over."""
    options = parser("oarlock.cluster", "The coordinator: membership, placement, work and checkpoints of one job.")
    options.add_argument("--dir", required=True, type=Path, help="the job's folder, with job.json in it")
    options.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT|unix:PATH", help="port 0: any free port")
    options.add_argument(
        "--listen-seconds", default=0.0, type=float, metavar="S", help="how long to wait for an address that is taken"
    )
    options.add_argument("--restore", default="", metavar="PATH", help="begin a new run from this checkpoint")
    options.add_argument(
        "--accept-signature", action="store_true", help="of mode sync: the new run's workers may compute in other ways"
    )
    given = options.parse_args()
    folder: Path = given.dir.absolute()
    try:
        security = security_of(given, own=True)
        security.check_listen(given.listen, "--listen")
    except PSError as error:
        options.error(str(error))

    async def body() -> None:
        with observed_as("coordinator", given, security) as telemetry:
            announce("coordinator", pinned=bool(given.pin_cores))
            await coordinate(telemetry)

    async def coordinate(telemetry: Telemetry) -> None:
        try:
            spec = JobSpec.from_json((folder / "job.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise NotFound(
                f"{folder / 'job.json'} cannot be read ({error.strerror}); make it with `oarlock prepare`"
            ) from None
        store = Store(folder / "state.sqlite").open()
        transport = GrpcTransport(security=security)
        server: GrpcServer | None = None
        coordinator = Coordinator(store, spec, clock=boot_clock, rng=random.SystemRandom(), goes_back=True)
        service = CoordinatorService(coordinator)

        def stop(name: str) -> None:
            service.newest.stop(True, name)

        @contextlib.contextmanager
        def orders_of(c: Coordinator) -> Iterator[Orders]:
            orders = Orders(c, transport, folder / "checkpoints")
            with telemetry.registry.added(coordinator_source(c, orders)):
                yield orders

        try:
            coordinator.open()
            if security.identifies or security.spec.roots:
                coordinator.roots = Roots((*roots_of(spec, folder), *security.spec.roots))
            checkpoints = place_of(spec).open(folder)
            begin(coordinator, given.restore, checkpoints, accept_signature=given.accept_signature)
            server = GrpcServer(service, "Coordinator", listen=given.listen, threads=16, security=security)
            coordinator.metrics_address = telemetry.address
            telemetry.registry.add(server_source(server))
            trace_requests(server.counts, telemetry.track)
            telemetry.registry.add(client_source(transport))
            write_address(folder, await started(server, given.listen_seconds))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop, signal.Signals(number).name)
            await run_job(service, orders_of, checkpoints, telemetry.track)
        finally:
            if server is not None:
                server.stop()
                (folder / ADDRESS_FILE).unlink(missing_ok=True)
            await transport.close()
            service.newest.store.close()

    return run(body, given)


async def started(server: GrpcServer, seconds: float) -> str:
    """Listen and return the address; while somebody else has it, try again for ``seconds``.

    Members look for a coordinator that was started again where the one before it was, and nowhere else.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while True:
        try:
            return server.start()
        except InvalidArgument as error:
            if clock() >= end:
                waited = f" (waited {seconds:g} s for it)" if seconds > 0 else ""
                raise InvalidArgument(f"{error}{waited}") from None
            logger.info("event=address_taken error=%s", error)
        await asyncio.sleep(LISTEN_PAUSE_SECONDS)


def boot_clock() -> float:
    """Return seconds that also pass while the machine sleeps: leases end then, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
