# SPDX-License-Identifier: Apache-2.0
"""What a process lets be observed: the registry of its metrics, their page and its trace if it was asked for them.

Invariant: without ``--metrics-port`` nobody listens and nothing is asked; with it, the page is there from before the process
joins its job until after it left. The registry may be added to from any thread.
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oarlock import __version__
from oarlock.client.membership import Membership
from oarlock.client.trace import traced
from oarlock.proto.coordinator_pb2 import WORKER
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import GrpcServer, GrpcTransport
from oarlock.proto.security import Security
from oarlock.telemetry.exposition import exposition
from oarlock.telemetry.prometheus import LOOPBACK, MetricsServer
from oarlock.telemetry.registry import Registry, Source
from oarlock.telemetry.system import system_source
from oarlock.telemetry.trace import Track

logger = logging.getLogger(__name__)


@dataclass
class Telemetry:
    """A process's registry, where its page is (empty: nowhere), and where its work is recorded (None: nowhere)."""

    registry: Registry = field(default_factory=Registry)
    address: str = ""
    track: Track | None = None

    def beside(self, role: str) -> "Telemetry":
        """Return the same with a track of its own, for one of several members within one process."""
        return self if self.track is None else replace(self, track=self.track.beside(role))

    def told(self, stats: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """Return ``stats`` with the page's address, if there is one, as heartbeats tell them."""
        return (lambda: {**stats(), "metrics": self.address}) if self.address else stats

    @contextmanager
    def of_member(self, member: Membership, source: Source) -> Iterator[None]:
        """Ask ``source``, and for the membership, while the body runs. ``member`` has joined."""
        role = "worker" if member.role == WORKER else "shard"
        number = str(member.id)
        if self.track is not None:
            self.track.name = f"{role} {number}"
        with (
            self.registry.added(source, **{role: number}),
            self.registry.added(_membership(member), role=role, member=number),
        ):
            yield


def observed_as(
    role: str, options: argparse.Namespace, security: Security | None = None
) -> AbstractContextManager[Telemetry]:
    """Serve the metrics of a process of its own, and record it, by the options of ``entry.parser``."""
    needed = not options.metrics_if_free
    port, host = options.metrics_port, options.metrics_host
    return observed(role, port, host, needed=needed, trace=options.trace, security=security)


@contextmanager
def observed(
    role: str,
    port: int | None,
    host: str = LOOPBACK,
    *,
    needed: bool = True,
    trace: str | Path | None = None,
    security: Security | None = None,
) -> Iterator[Telemetry]:
    """Serve the metrics of this process while the body runs, and record it into ``trace`` (None: it does not).

    ``port`` None: nowhere; not ``needed``: if it is free.
    """
    with traced(role, trace) as track, _served(role, port, host, needed, security or Security()) as telemetry:
        telemetry.track = track
        yield telemetry


@contextmanager
def _served(role: str, port: int | None, host: str, needed: bool, security: Security) -> Iterator[Telemetry]:
    telemetry = Telemetry()
    telemetry.registry.add(lambda: {"oarlock_process_info": 1}, role=role, version=__version__)
    telemetry.registry.add(system_source())
    if port is None:
        yield telemetry
        return
    security.check_listen(host, "--metrics-host")
    server = MetricsServer(
        lambda: exposition(telemetry.registry.collect()),
        host=host,
        port=port,
        allowed=security.may_read,
        context=security.http_context,
    )
    try:
        telemetry.address = server.start()
    except OSError as error:
        words = f"metrics cannot be served at {host}:{port} ({error.strerror or error})"
        if needed:
            raise InvalidArgument(f"{words}: give another --metrics-port, 0 for any free one, or none") from None
        logger.warning("event=no_metrics error=%s", words)
        yield telemetry
        return
    scheme = "https" if security.serves_tls else "http"
    logger.info("event=metrics address=%s://%s/metrics", scheme, telemetry.address)
    try:
        yield telemetry
    finally:
        server.stop()


def server_source(server: GrpcServer) -> Source:
    """Return the source of what a server was asked."""

    def source() -> dict[str, Any]:
        return {
            **_calls("server", server),
            "oarlock_rpc_server_open_calls": server.open_calls(),
            "oarlock_rpc_server_refused_total": server.memory.refused,
            "oarlock_rpc_server_denied_total": server.denied,
            "oarlock_rpc_server_memory_bytes": server.memory.nbytes,
            "oarlock_rpc_server_waiting_requests": server.memory.received.waiting,
        }

    return source


def client_source(transport: GrpcTransport) -> Source:
    """Return the source of what a process asked others."""

    def source() -> dict[str, Any]:
        return {**_calls("client", transport), "oarlock_rpc_client_connections": transport.connections}

    return source


def _calls(side: str, counted: GrpcServer | GrpcTransport) -> dict[str, Any]:
    found = counted.counts.all()
    return {
        f"oarlock_rpc_{side}_requests_total": {method: c.requests for method, c in found.items()},
        f"oarlock_rpc_{side}_received_bytes_total": {method: c.received for method, c in found.items()},
        f"oarlock_rpc_{side}_sent_bytes_total": {method: c.sent for method, c in found.items()},
        f"oarlock_rpc_{side}_seconds_total": {method: c.seconds for method, c in found.items()},
        f"oarlock_rpc_{side}_failures_total": {
            (method, error): n for method, c in found.items() for error, n in c.failures.copy().items()
        },
    }


def _membership(member: Membership) -> Source:
    def source() -> dict[str, Any]:
        found = {"oarlock_member_lease_seconds": member.lease_left(), "oarlock_member_run": member.run}
        if member.role == WORKER:
            # Nobody tells a shard's membership of placements: the order to adopt one goes to its service.
            found["oarlock_member_generation"] = member.routes.generation if member.routes else 0
        return found

    return source
