# SPDX-License-Identifier: Apache-2.0
"""What makes a schedule cheap, though nothing of it is left out: what would be found out again and again is remembered.

Invariant: inside ``quick`` every function returns what it returns outside: of manifests by the bytes, of the compute signature
by the process; blocks' files are written one after the other in the caller's thread, in the same order. Outside it all is as
it was. Not nested; one thread.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oarlock.worker.process as worker_process
from oarlock.checkpoint import writing
from oarlock.checkpoint.direct import buffers
from oarlock.checkpoint.manifest import Manifest
from oarlock.client.signature import compute_signature
from oarlock.proto.errors import PSError

# Manifests that are remembered: of one schedule hardly more than these are read again.
MANIFESTS = 64


@contextmanager
def quick() -> Iterator[None]:
    """Run what is inside at less cost: one call, so that nothing of it has a name any more when its rubbish is looked for."""
    # Rubbish is looked for once, at the end, and only among what came to be here: most of what is in memory stays for ever.
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()
    instead: tuple[tuple[Any, str, Any], ...] = (
        (Manifest, "decode", _remembering(Manifest.decode)),
        (writing, "in_threads", _in_turn),
        (worker_process, "compute_signature", _signature),
    )
    before = [vars(owner)[name] for owner, name, _ in instead]
    try:
        for owner, name, function in instead:
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(instead, before, strict=True):
            setattr(owner, name, function)
        gc.collect()
        gc.unfreeze()
        if collecting:
            gc.enable()


_signature = functools.cache(compute_signature)


def _remembering(decode: Callable[..., Manifest]) -> Any:
    """Return ``decode`` that reads the same bytes once, also those that it refuses."""

    @functools.lru_cache(MANIFESTS)
    def read(data: bytes, file: str) -> Manifest | PSError:
        try:
            return decode(data, file=file)
        except PSError as error:
            return error

    def remembered(data: bytes, *, file: str) -> Manifest:
        found = read(data, file)
        if isinstance(found, PSError):
            raise found
        return found

    return remembered


def _in_turn(tasks: Sequence[Any], do: Callable[[Any], Any], size: Callable[[Any], int], **_: Any) -> list[Any]:
    """As ``in_threads``, without any."""
    try:
        return [do(task) for task in tasks]
    finally:
        buffers.let_go()
