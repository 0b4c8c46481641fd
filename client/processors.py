# SPDX-License-Identifier: Apache-2.0
"""What a process computes on: the cores that it may use, and the library and threads of its matrix products.

Invariant: after ``pin`` no thread of the process runs elsewhere, also none that BLAS or gRPC had started before, as BLAS does
while numpy is loaded; threads made later inherit it. ``limit_blas`` is for the whole process. Called from its main thread,
``on_cores`` from any.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from threadpoolctl import threadpool_info, threadpool_limits

from oarlock.proto.errors import InvalidArgument, Unavailable

logger = logging.getLogger(__name__)

# In ascending order; none: not pinned.
Cores = tuple[int, ...]

# Requests and connections that a shard serves at once.
NETWORK_THREADS = 512
NETWORK_THREADS_RANGE = (16, 65536)
# Shards answer all workers: on a host with both, who computes waits for a processor, and not who answers.
WORKER_NICENESS = 5
# Far beyond what the kernel knows; what is typed wrong makes no list of a billion numbers.
MAX_CORE = 65535
# Tie matrix products, or numpy's own loops, to less than the CPU can do.
_FORCING = ("OPENBLAS_CORETYPE", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "BLIS_ARCH_TYPE")
_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_TASKS = Path("/proc/self/task")


def allowed_cores() -> Cores:
    """Return the cores that the calling thread may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def parse_cores(text: str, name: str) -> Cores:
    """Return the cores of a list like ``0-3,8``; ``name`` begins the message if it is none."""
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if not first <= last <= MAX_CORE:
            raise InvalidArgument(f"{name} = {text!r}: give cores like 0-3,8, each from 0 to {MAX_CORE}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def format_cores(cores: Iterable[int]) -> str:
    """Return cores as ``parse_cores`` reads them."""
    runs: list[list[int]] = []
    for core in sorted(set(cores)):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def usable_cores(text: str, name: str, allowed: Cores) -> Cores:
    """Return the cores of a list; InvalidArgument names those that are not ``allowed``."""
    cores = parse_cores(text, name)
    if others := set(cores).difference(allowed):
        raise InvalidArgument(
            f"{name} = {text!r}: {_cores(others)} cannot be used by this process; give some of {format_cores(allowed)}"
        )
    return cores


def _cores(cores: Iterable[int]) -> str:
    text = format_cores(cores)
    return f"{'core' if text.isdigit() else 'cores'} {text}"


def pin(cores: Cores) -> None:
    """Let every thread of this process run on ``cores`` alone; on none: leave them where they are."""
    done: set[str] = set()
    # A thread that is not pinned yet may make another one meanwhile.
    while cores and (found := {t.name for t in _TASKS.iterdir()} - done):
        for thread in found:
            # It may have ended meanwhile.
            with suppress(ProcessLookupError):
                _put(int(thread), cores)
        done |= found


def step_back() -> None:
    """Let the other processes of the host come before this one, threads that it has and will have."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + WORKER_NICENESS
    # Also threads that libraries started while they were loaded; those made later have what their maker has.
    for thread in _TASKS.iterdir():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


@contextmanager
def on_cores(cores: Cores) -> Iterator[None]:
    """Let the calling thread, and those that it makes meanwhile, run on ``cores`` alone while the body runs; none: anywhere."""
    before = allowed_cores()
    _put(0, cores or before)
    try:
        yield
    finally:
        _put(0, before)


def _put(thread: int, cores: Cores) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        raise
    except OSError as error:
        raise Unavailable(f"{_cores(cores)} cannot be used any more ({error.strerror}): pin to others") from None


class Blas(NamedTuple):
    """The library of matrix products: name and version, the CPU type that its kernels are for, its threads."""

    name: str = "unknown"
    kernels: str = "unknown"
    threads: int = 0


def loaded_blas() -> Blas:
    """Return the BLAS library that numpy brought, as it is set now."""
    import numpy  # noqa: F401  # what is not loaded cannot be asked

    for library in threadpool_info():
        if library["user_api"] == "blas":
            name = f"{library['internal_api']} {library['version'] or ''}".strip()
            return Blas(name, library.get("architecture") or "unknown", library["num_threads"])
    return Blas()


def limit_blas(threads: int) -> Any:
    """Give each matrix product of this process so many threads; as a context manager, only while the body runs.

    Also more than the library began with. It may give fewer than that (OpenBLAS of numpy's wheels: 64): ask ``loaded_blas``.
    """
    return threadpool_limits(threads, "blas")


def forced_kernels(environment: Mapping[str, str]) -> list[str]:
    """Return what to tell the user of variables that keep matrix products from the CPU's own kernels."""
    return [
        f"{name}={environment[name]} ties matrix products to the kernels of one CPU type, which can halve their speed; "
        f"run `unset {name}` first"
        for name in _FORCING
        if environment.get(name)
    ]


def announce(role: str, *, pinned: bool, **settings: int) -> None:
    """Log the one line of what this process computes on, and a warning if it computes on more threads than it has cores.

    ``settings``: its own numbers of threads.
    """
    blas = loaded_blas()
    logger.info(
        "event=processors role=%s cores=%s pinned=%s %sblas=%s kernels=%s blas_threads=%d",
        role,
        format_cores(allowed_cores()),
        "true" if pinned else "false",
        "".join(f"{name}={value} " for name, value in settings.items()),
        blas.name.replace(" ", "-"),
        blas.kernels,
        blas.threads,
    )
    if words := crowded(settings.get("compute_threads", 0), blas.threads, len(allowed_cores())):
        logger.warning("event=crowded words=%r", words)


def crowded(compute_threads: int, blas_threads: int, cores: int) -> str:
    """Return what to tell of a worker that has more computing threads than cores; empty if it has not."""
    threads = compute_threads * blas_threads
    if threads <= cores:
        return ""
    return (
        f"compute_threads = {compute_threads} times blas_threads = {blas_threads} are {threads} threads on "
        f"{cores} core{'s' if cores > 1 else ''} of a worker: they wait for each other; lower one of them, or give it more cores"
    )
