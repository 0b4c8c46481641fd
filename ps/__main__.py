# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.ps`: one shard."""

import random
import socket
import sys
from pathlib import Path

from oarlock.client.entry import keep_what_is_loaded, parser, run
from oarlock.client.processors import NETWORK_THREADS, NETWORK_THREADS_RANGE, announce
from oarlock.client.security import security_of
from oarlock.client.telemetry import client_source, observed_as, server_source
from oarlock.client.trace import trace_requests
from oarlock.proto.errors import PSError
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.rpc.frame_client import CONNECTIONS
from oarlock.proto.work import REQUEST_MEMORY_BYTES, REQUEST_MEMORY_RANGE
from oarlock.ps.process import SWITCH_SECONDS, run_shard
from oarlock.ps.service import ShardService
from oarlock.ps.warmup import warm_up


def main() -> int:
    """Run a shard until its job is over."""
    options = parser("oarlock.ps", "A shard: holds rows and dense blocks of one job.")
    options.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    options.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT|unix:PATH", help="port 0: any free port")
    options.add_argument("--advertise", default="", metavar="HOST", help="the name under which others reach this host")
    options.add_argument(
        "--network-threads",
        type=int,
        default=NETWORK_THREADS,
        metavar="N",
        help=f"requests and connections served at once; a worker has up to {CONNECTIONS} (default {NETWORK_THREADS})",
    )
    options.add_argument(
        "--request-memory-bytes",
        type=int,
        default=REQUEST_MEMORY_BYTES,
        metavar="N",
        help=f"memory of all requests in work, beside the tables; more wait or are refused (default {REQUEST_MEMORY_BYTES})",
    )
    options.add_argument(
        "--spill-folder",
        type=Path,
        metavar="FOLDER",
        help="where tables with memory_bytes keep their cold rows, on a local disk (default: the temporary folder)",
    )
    given = options.parse_args()
    if given.spill_folder is not None and not given.spill_folder.is_dir():
        options.error(f"--spill-folder {given.spill_folder} is no folder")
    least, most = NETWORK_THREADS_RANGE
    if not least <= given.network_threads <= most:
        options.error(f"--network-threads {given.network_threads}: give an integer from {least} to {most}")
    fewest, largest = REQUEST_MEMORY_RANGE
    if not fewest <= given.request_memory_bytes <= largest:
        options.error(
            f"--request-memory-bytes {given.request_memory_bytes}: give an integer from {fewest} to {largest}"
        )
    try:
        security = security_of(given, own=True)
        security.check_listen(given.listen, "--listen")
    except PSError as error:
        options.error(str(error))
    bounded = security.identifies or security.spec.roots
    transport = GrpcTransport(security=security)
    service = ShardService(spill_folder=given.spill_folder, roots=security.spec.roots if bounded else None)
    server = GrpcServer(
        service,
        "Shard",
        listen=given.listen,
        threads=given.network_threads,
        request_memory_bytes=given.request_memory_bytes,
        security=security,
    )

    sys.setswitchinterval(SWITCH_SECONDS)

    async def body() -> None:
        with observed_as("shard", given, security) as telemetry:
            announce("shard", pinned=bool(given.pin_cores), network_threads=given.network_threads)
            telemetry.registry.add(server_source(server))
            trace_requests(server.counts, telemetry.track)
            telemetry.registry.add(client_source(transport))
            warm_up()
            keep_what_is_loaded()
            address = advertised(server.start(), given.advertise)
            try:
                await run_shard(
                    transport, given.coordinator, service, address, rng=random.SystemRandom(), telemetry=telemetry
                )
            finally:
                await transport.close()

    try:
        return run(body, given)
    finally:
        server.stop()
        service.end()


def advertised(address: str, host: str) -> str:
    """Return the address to tell others: ``0.0.0.0`` is no place to call."""
    if address.startswith("unix:"):
        return address
    bound, _, port = address.rpartition(":")
    return f"{host or (socket.gethostname() if bound in ('0.0.0.0', '[::]') else bound)}:{port}"


if __name__ == "__main__":
    sys.exit(main())
