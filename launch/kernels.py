# SPDX-License-Identifier: Apache-2.0
"""Kernels ready before a job starts: compiled once on a machine, by one process, and not while leases run.

Compiling takes the interpreter lock for seconds; four processes that each compile the same would also take four times as long.
"""

from collections.abc import Callable

from oarlock.embedding.frozen import warm_up as warm_up_serving
from oarlock.embedding.jit import kernel_folder
from oarlock.embedding.partition import warm_up as warm_up_parts
from oarlock.embedding.warmup import warm_up as warm_up_shard
from oarlock.worker.warmup import warm_up as warm_up_worker

_READY = "ready"


def are_compiled() -> bool:
    """Return whether this release's kernels were all compiled on this machine before."""
    return (kernel_folder() / _READY).exists()


def compile_or_load() -> None:
    """Compile all kernels, or load them from the cache into this process."""
    warm_up_shard()
    warm_up_worker()
    warm_up_serving()
    warm_up_parts()
    (kernel_folder() / _READY).touch()


def make_ready(say: Callable[[str], None]) -> None:
    """Compile what is not compiled yet, after saying so."""
    if not are_compiled():
        say("compiling kernels for this machine, once; this takes about half a minute")
        compile_or_load()
