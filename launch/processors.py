# SPDX-License-Identifier: Apache-2.0
"""Which cores and threads the processes of a job get on this machine, decided before any of them is started.

Invariant: a pure function of the configuration and of the cores at hand, so one that is started again gets what the one
before it had. With ``auto`` no two processes share a core as long as there is one for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oarlock.client.job import JobSpec
from oarlock.client.processors import (
    NETWORK_THREADS,
    Blas,
    Cores,
    allowed_cores,
    crowded,
    format_cores,
    usable_cores,
)
from oarlock.launch.config import AUTO, RunConfig
from oarlock.proto.rpc.frame_client import CONNECTIONS
from oarlock.proto.work import REQUEST_MEMORY_BYTES


@dataclass(frozen=True)
class Processors:
    """What each shard and worker runs on: its cores by number (no entry, or an empty one: not pinned)."""

    network_threads: int = NETWORK_THREADS
    servers: tuple[Cores, ...] = ()
    workers: tuple[Cores, ...] = ()
    # Of each shard, beside its tables.
    request_memory_bytes: int = REQUEST_MEMORY_BYTES

    def of(self, role: str, number: int) -> Cores:
        """Return the cores of a process, none if it is not pinned."""
        pins = {"shard": self.servers, "worker": self.workers}.get(role, ())
        return pins[number] if number < len(pins) else ()

    @property
    def server_cores(self) -> Cores:
        """The cores of all shards together."""
        return tuple(sorted({core for cores in self.servers for core in cores}))

    def warnings(self, spec: JobSpec) -> list[str]:
        """Return what is allowed but slow."""
        least = min((len(self.of("worker", n) or allowed_cores()) for n in range(spec.workers)), default=1)
        found = [crowded(spec.compute_threads, spec.blas_threads, least)]
        # Three quarters of what a server has are for pulls and pushes.
        wanted = CONNECTIONS * spec.workers
        if wanted > self.network_threads * 3 // 4:
            found.append(
                f"network_threads = {self.network_threads} are too few for up to {CONNECTIONS} connections of each of "
                f"{spec.workers} workers, which then wait for each other; give {-(-4 * wanted // 3)}"
            )
        return [words for words in found if words]

    def described(self, spec: JobSpec, blas: Blas) -> str:
        """Return the same for the user: one line."""
        pins = [
            f"{role}s {'share' if len(set(cores)) == 1 < len(cores) else 'on'} "
            f"{' | '.join(dict.fromkeys(format_cores(c) for c in cores))}"
            for role, cores in (("shard", self.servers), ("worker", self.workers))
            if any(cores)
        ]
        return (
            f"processors: cores {format_cores(allowed_cores())}, {'; '.join(pins) or 'nothing is pinned'}; "
            f"compute_threads {spec.compute_threads}, blas_threads {spec.blas_threads} "
            f"({blas.name}, kernels for {blas.kernels}), network_threads {self.network_threads}"
        )


def processors_of(run: RunConfig, allowed: Cores | None = None) -> Processors:
    """Decide for the processes of ``run``, on the cores that this process may use."""
    shared = _shared_out(run, allowed or allowed_cores())
    return replace(shared, request_memory_bytes=run.request_memory_bytes)


def _shared_out(run: RunConfig, allowed: Cores) -> Processors:
    weight = run.compute_threads * run.blas_threads
    workers = [] if run.worker_pin_cores == "" else [weight] * run.workers
    servers = [] if run.server_pin_cores == "" else [1] * run.servers
    fixed: dict[str, Cores] = {}
    for name in ("server_pin_cores", "worker_pin_cores"):
        text = getattr(run, name)
        if text != AUTO:
            fixed[name] = usable_cores(text, name, allowed) if text else ()
    if not fixed:
        if len(allowed) >= len(workers) + len(servers):
            shares = spread(allowed, [*workers, *servers])
            return Processors(run.network_threads, shares[len(workers) :], shares[: len(workers)])
        return Processors(run.network_threads, spread(allowed, servers), spread(allowed, workers))
    taken = {core for cores in fixed.values() for core in cores}
    free = tuple(core for core in allowed if core not in taken)

    def cores_of(name: str, weights: list[int]) -> tuple[Cores, ...]:
        if name in fixed:
            return (fixed[name],) * len(weights)
        return spread(free if len(free) >= len(weights) else allowed, weights)

    return Processors(run.network_threads, cores_of("server_pin_cores", servers), cores_of("worker_pin_cores", workers))


def spread(cores: Cores, weights: Sequence[int]) -> tuple[Cores, ...]:
    """Return a run of neighbouring cores for each weight, as long as its part of all; in turns, one each, if they are too few."""
    if len(cores) < len(weights):
        return tuple((cores[i % len(cores)],) for i in range(len(weights)))
    lengths = [1] * len(weights)
    for _ in range(len(cores) - len(weights) if weights else 0):
        neediest = max(range(len(weights)), key=lambda i: (weights[i] / lengths[i], -i))
        lengths[neediest] += 1
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(cores[end - length : end] for end, length in zip(ends, lengths, strict=True))
