# SPDX-License-Identifier: Apache-2.0
"""What identities and marks cost inside a shard, without a wire: microseconds of a push, of its parts, and bytes of memory.

Invariant: both shards get the same requests in the same order, each group once. One thread.
"""

import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarlock.benchmarks.exactly_once_shard import RUN, incarnation_of, make_service
from oarlock.client.closed import SPLIT_WINDOW, ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import changes_of
from oarlock.proto.common_pb2 import Header
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.shard_pb2 import PushReply, PushRequest
from oarlock.ps.adopting import adopt
from oarlock.ps.identity import Identity
from oarlock.ps.marks import Marks
from oarlock.ps.request import read_dense_numbers, read_keys, refuse_repeated
from oarlock.ps.service import ShardService
from oarlock.ps.shard import Shard

# As a job of NCF has them: the recipe plans splits of eight batches, and a worker has two of them open.
GROUPS_PER_SPLIT = 8
MARK_BYTES = 4


@dataclass
class Pairs:
    """Seconds of the same work on both sides, in rounds of with, without, without, with."""

    with_marks: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)

    def add(self, which: int, seconds: float) -> None:
        (self.with_marks, self.without)[which].append(seconds)

    def ratios(self) -> list[float]:
        """Return the speed with marks over that without them, one ratio for each round of four."""
        seconds = list(zip(self.with_marks, self.without, strict=True))
        return [
            (b1 + b2) / (a1 + a2) for (a1, b1), (a2, b2) in zip(seconds[::2], seconds[1::2], strict=True) if a1 + a2 > 0
        ]


def spread(ratios: list[float]) -> dict[str, Any]:
    """Return the median, the interquartile range, and an interval that holds the true median 95 times of 100.

    The interval comes of the ranks alone, so nothing is assumed of how the ratios are distributed.
    """
    ordered = sorted(ratios)
    n = len(ordered)
    reach = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - reach)), min(n - 1, int(n / 2 + reach))
    quarters = np.quantile(ordered, (0.25, 0.75)).tolist()
    return {
        "ratio": round(statistics.median(ordered), 4),
        "ratio_iqr": [round(q, 4) for q in quarters],
        "ratio_interval": [round(ordered[low], 4), round(ordered[high], 4)],
        "pairs": n,
    }


def own_blocks(service: ShardService, number: int, routes: Any, spec: JobSpec) -> Shard:
    """Have the service adopt its blocks; return its shard."""
    shard = service._shard(header_for(spec, number))[1]
    adopt(shard, number, changes_of(routes), ClosedSet())
    return shard


def header_for(spec: JobSpec, number: int) -> Header:
    return Header(
        protocol=PROTOCOL, job=spec.job_bytes, run=RUN, sender=9, target=incarnation_of(number), generation=1, term=1
    )


def measure_handler(
    spec: JobSpec, routes: Any, requests: list[PushRequest], *, rounds: int, most_seconds: float
) -> dict[str, Any]:
    """Push ``requests``, all for shard 0 of ``routes``, to a shard with marks and to one without, in turns."""
    services = [make_service(spec, 0, marks=marks) for marks in (True, False)]
    shard = own_blocks(services[0], 0, routes, spec)
    own_blocks(services[1], 0, routes, spec)
    for request in requests:
        request.header.CopyFrom(header_for(spec, 0))
    pairs = Pairs()
    closing: list[float] = []
    count = 0

    def timed(service: ShardService) -> float:
        request = requests[count % len(requests)]
        begun = time.perf_counter()
        reply = service.push(request)
        spent = time.perf_counter() - begun
        assert isinstance(reply, PushReply), "there are no copies"
        # A push that was skipped would be cheap.
        assert not reply.skipped, "every group comes once"
        return spent

    ends = time.monotonic() + most_seconds
    for number in range(-8, 2 * rounds):
        split, group = divmod(count, GROUPS_PER_SPLIT)
        request = requests[count % len(requests)]
        request.split, request.group = split, group
        seconds = {}
        for marks in (True, False) if number % 2 == 0 else (False, True):
            seconds[marks] = timed(services[0 if marks else 1])
        if number >= 0:
            pairs.with_marks.append(seconds[True])
            pairs.without.append(seconds[False])
        count += 1
        if group == GROUPS_PER_SPLIT - 1:
            begun = time.perf_counter()
            shard.close_splits(ClosedSet(split + 1))
            closing.append(time.perf_counter() - begun)
        if number >= 7 and number % 2 == 1 and time.monotonic() > ends:
            break
    found = spread(pairs.ratios())
    return {
        "handler_us_with": _us(pairs.with_marks),
        "handler_us_without": _us(pairs.without),
        **{f"handler_{name}": value for name, value in found.items()},
        "handler_close_us": _us(closing) if closing else None,
        "handler_parts_us": _parts(shard, spec, requests[0], 20 if rounds < 100 else 400),
    }


def _us(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e6, 2)


def _parts(shard: Shard, spec: JobSpec, request: PushRequest, times: int) -> dict[str, float]:
    """Return the microseconds of what a push with marks does and one without does not, each part alone."""
    identity = Identity(spec.job_bytes, RUN, 0, incarnation_of(0))
    layout, marks, sequence = shard.layout, Marks(shard.layout.blocks), np.zeros(shard.layout.blocks, np.int64)
    numbers = [read_keys(layout, part.keys).numbers for part in request.tables]
    dense = [read_dense_numbers(layout, part.blocks) for part in request.dense]
    everything = np.concatenate([*numbers, *dense])
    singles = [number for each in dense for number in each.tolist()]
    marks.open(0)

    def look_up() -> None:
        # Of a split that nobody has pushed to, nor ever will.
        shard._todo(shard.closed.floor + SPLIT_WINDOW - 1, 0, everything, shard.owned[everything])

    def record() -> None:
        for each in [*numbers, *singles]:
            marks.record(0, 0, each)

    def count_sequence() -> None:
        for each in numbers:
            sequence[each] += 1
        for one in singles:
            sequence[one] += 1

    parts: dict[str, Callable[[], None]] = {
        "header": lambda: identity.check(request.header),
        "repeated_blocks": lambda: refuse_repeated(everything),
        "closed_and_missing": look_up,
        "record": record,
        "sequence": count_sequence,
    }
    found = {}
    for name, part in parts.items():
        seconds = []
        for _ in range(times):
            begun = time.perf_counter()
            part()
            seconds.append(time.perf_counter() - begun)
        found[name] = _us(seconds)
    return found


def measure_memory(spec: JobSpec, routes: Any, request: PushRequest, open_splits: int) -> dict[str, Any]:
    """Return the bytes of marks once ``open_splits`` splits are open, and of the closed set at its largest."""
    service = make_service(spec, 0, marks=True)
    shard = own_blocks(service, 0, routes, spec)
    request.group = 0
    for split in range(open_splits):
        request.split = split
        shard.push(request)
    blocks = shard.layout.blocks
    # Every second split of the window closed: nothing merges into the floor, and the bitmap is as long as it gets.
    scattered = ClosedSet(0, range(1, SPLIT_WINDOW, 2))
    full = ClosedSet(0, range(1, SPLIT_WINDOW))
    return {
        "marks_bytes": shard.stats()["marks_bytes"],
        "marks_bytes_formula": blocks * open_splits * MARK_BYTES,
        # What the interpreter allocates for them, heads of arrays and the dict included.
        "marks_bytes_allocated": _allocated(blocks, open_splits),
        "open_splits": open_splits,
        "blocks": blocks,
        "owned_blocks": int(shard.owned.sum()),
        "closed_set_bytes": {"in_order": _size(ClosedSet(open_splits)), "half": _size(scattered), "most": _size(full)},
        "closed_set_wire_bytes": {
            "in_order": ClosedSet(open_splits).pack().ByteSize(),
            "half": scattered.pack().ByteSize(),
            "most": full.pack().ByteSize(),
        },
    }


def _allocated(blocks: int, open_splits: int) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        marks = Marks(blocks)
        for split in range(open_splits):
            marks.open(split)
        after = tracemalloc.get_traced_memory()[0]
        assert marks.nbytes, "they are held until here"
        return after - before
    finally:
        tracemalloc.stop()


def _size(closed: ClosedSet) -> int:
    return sys.getsizeof(closed.above) + sum(sys.getsizeof(s) for s in closed.above) + sys.getsizeof(closed.floor)


def blocks_of(layout: Layout) -> dict[str, int]:
    """Return how the blocks of a job are shared out between its tables and dense parameters."""
    return {**{t.name: t.blocks for t in layout.tables}, "dense": len(layout.dense_blocks)}
