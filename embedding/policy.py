# SPDX-License-Identifier: Apache-2.0
"""Which keys get a row and which rows go again: a table's policies, as job files and manifests carry them.

Invariant: a policy that exists is valid. Ticks are the steps that pushes carry. Immutable, JSON-ready.
"""

import math
from dataclasses import dataclass
from typing import Any

from oarlock.proto.errors import InvalidArgument

DTYPES = ("float32", "float16", "bfloat16", "int8")  # in the order of embedding/precision.py's codes
ADMISSIONS = ("always", "count", "sketch", "probability", "score")
ORDERS = ("recent", "frequent")
CACHE_POLICIES = ("lru", "lfu")


def _check(owner: str, name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    fits = isinstance(value, int) if whole else isinstance(value, int | float)
    if isinstance(value, bool) or not fits or not math.isfinite(value) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise InvalidArgument(f"{owner}.{name} = {value!r}: give {kind} from {low:g} to {high:g}")


@dataclass(frozen=True)
class Admission:
    """When an absent key gets a row (``embedding/admission.py`` has the table of kinds).

    ``occurrences``: n of count and sketch. ``capacity``: occurrences that one of the sketch's ``windows`` counts, for
    all of a table's blocks together. ``probability``: of kind probability. ``nonclick``, ``click``: weights of a score;
    the defaults are those of PaddlePaddle's CTR accessor.
    """

    kind: str = "always"
    occurrences: int = 1
    probability: float = 1.0
    capacity: int = 10_000_000
    windows: int = 4
    nonclick: float = 0.1
    click: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ADMISSIONS:
            raise InvalidArgument(f"admission.kind = {self.kind!r}: choose one of {', '.join(ADMISSIONS)}")
        most = 65535 if self.kind == "sketch" else (1 << 30) - 1
        _check("admission", "occurrences", self.occurrences, 1, most, whole=True)
        _check("admission", "probability", self.probability, 0, 1)
        _check("admission", "capacity", self.capacity, 1, 1 << 36, whole=True)
        _check("admission", "windows", self.windows, 2, 64, whole=True)
        _check("admission", "nonclick", self.nonclick, 0, 1e6)
        _check("admission", "click", self.click, 0, 1e6)


@dataclass(frozen=True)
class Eviction:
    """Which rows a sweep takes away; 0 = this rule is off. A row goes when any rule says so.

    ``age``: ticks since its last update. ``occurrences``: fewer than so many. ``norm``: L2 norm of its weights below.
    ``score``: (shows - clicks) * nonclick + clicks * click below, after shows and clicks were multiplied by ``decay``,
    once a sweep. ``max_bytes``: memory of all of the table's rows, on whatever shards; a block that would grow beyond its part,
    max_bytes / blocks, lets rows go, the least recently (or least frequently) updated first, a tenth of it at a time.
    """

    age: int = 0
    occurrences: int = 0
    norm: float = 0.0
    score: float = 0.0
    decay: float = 0.98
    max_bytes: int = 0
    order: str = "recent"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InvalidArgument(f"eviction.order = {self.order!r}: choose one of {', '.join(ORDERS)}")
        _check("eviction", "age", self.age, 0, (1 << 31) - 1, whole=True)
        _check("eviction", "occurrences", self.occurrences, 0, (1 << 31) - 1, whole=True)
        _check("eviction", "norm", self.norm, 0, 1e30)
        _check("eviction", "score", self.score, 0, 1e9)
        _check("eviction", "decay", self.decay, 0, 1)
        _check("eviction", "max_bytes", self.max_bytes, 0, 1 << 50, whole=True)

    @property
    def sweeps(self) -> bool:
        """Tell whether there is anything for a sweep to look for."""
        return bool(self.age or self.occurrences or self.norm or self.score)


@dataclass(frozen=True)
class Guard:
    """What keeps bad gradients out and lets a change be taken back.

    ``limit``: a gradient with a value of this size or above is refused, like one with NaN or an infinity; its square must
    not make an accumulator infinite. ``sample``: refused keys that are remembered. ``undo``: old values kept of each row.
    """

    limit: float = 1e15
    sample: int = 64
    undo: int = 0

    def __post_init__(self) -> None:
        _check("guard", "limit", self.limit, 1e-30, 1e15)
        _check("guard", "sample", self.sample, 0, 1 << 20, whole=True)
        _check("guard", "undo", self.undo, 0, 1024, whole=True)


@dataclass(frozen=True)
class CacheSpec:
    """The cache of a table's rows on each worker (docs/cache.md), after HET (Miao et al., VLDB 2022).

    ``rows``: how many rows of the table a worker keeps. ``bound``: updates of a row that a kept one may lack; beyond that
    it is pulled again. ``policy``: who goes when it is full, the least recently (lru) or least frequently (lfu) used.
    ``adaptive``: each worker finds a bound of its own, from 0 to ``bound``, by what staleness costs and saves.
    """

    rows: int
    bound: int = 0
    policy: str = "lru"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.policy not in CACHE_POLICIES:
            raise InvalidArgument(f"cache.policy = {self.policy!r}: choose one of {', '.join(CACHE_POLICIES)}")
        _check("cache", "rows", self.rows, 1, 1 << 30, whole=True)
        _check("cache", "bound", self.bound, 0, 1 << 30, whole=True)
        if not isinstance(self.adaptive, bool):
            raise InvalidArgument(f"cache.adaptive = {self.adaptive!r}: give true or false")
