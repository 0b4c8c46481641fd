# SPDX-License-Identifier: Apache-2.0
"""What a table and a dense parameter are: the specs that job files, messages and manifests carry as JSON.

Invariant: a spec that exists is valid; its JSON form gives back an equal spec. Specs are immutable and free of arrays.
"""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from oarlock.embedding.optimizer_spec import OptimizerSpec as OptimizerSpec
from oarlock.embedding.policy import DTYPES
from oarlock.embedding.policy import Admission as Admission
from oarlock.embedding.policy import CacheSpec as CacheSpec
from oarlock.embedding.policy import Eviction as Eviction
from oarlock.embedding.policy import Guard as Guard
from oarlock.proto.errors import InvalidArgument

MAX_DIM = 65536
MAX_BLOCKS = 1 << 20
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")

INITIALIZERS = ("zeros", "constant", "uniform", "normal")


def check_name(kind: str, name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{kind} name {name!r}: use 1 to 128 letters, digits, '_', '-' or '.', not starting with a digit"
        )


def _finite(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgument(f"{owner}.{name} = {value!r}: give a finite number")


@dataclass(frozen=True)
class Initializer:
    """First values: ``zeros``, ``constant`` (mean), ``uniform`` (mean - scale, mean + scale) or ``normal`` (mean, scale)."""

    kind: str = "normal"
    mean: float = 0.0
    scale: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in INITIALIZERS:
            raise InvalidArgument(f"initializer {self.kind!r}: choose one of {', '.join(INITIALIZERS)}")
        _finite("initializer", "mean", self.mean)
        _finite("initializer", "scale", self.scale)
        if self.scale < 0:
            raise InvalidArgument(f"initializer.scale = {self.scale}: give a number >= 0")


@dataclass(frozen=True)
class Part:
    """A run of ``width`` columns of a row that has its own optimizer and initializer."""

    width: int
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    initializer: Initializer = field(default_factory=Initializer)

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or not 1 <= self.width <= MAX_DIM:
            raise InvalidArgument(f"part.width = {self.width!r}: give an integer from 1 to {MAX_DIM}")


@dataclass(frozen=True)
class TableSpec:
    """A named set of rows: ``dim`` weights per key, cut into ``blocks`` (a power of two) hash ranges.

    ``dtype``: how weights are stored (``embedding/precision.py``); they come and go as float32. ``parts``: columns with
    optimizers of their own, in place of ``optimizer`` and ``initializer``. ``absent``: what a key without a row reads as,
    its ``first`` value or ``zeros``. ``usage``: keep occurrences and tick of the last update of each row, also where no
    policy needs them. ``memory_bytes``: beyond so many bytes of rows a shard spills cold ones to a file, 0 = never.
    ``expand_score``: a row begins with its first part alone and gets the others when (shows - clicks) * nonclick +
    clicks * click reaches this, 0 = rows are whole from the start. ``cache``: workers keep rows of the table, and each row
    counts its updates, so that they can tell how old theirs are; None = they keep none.
    """

    name: str
    dim: int
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    initializer: Initializer = field(default_factory=Initializer)
    blocks: int = 64
    dtype: str = "float32"
    parts: tuple[Part, ...] = ()
    absent: str = "first"
    usage: bool = False
    admission: Admission = field(default_factory=Admission)
    eviction: Eviction = field(default_factory=Eviction)
    guard: Guard = field(default_factory=Guard)
    memory_bytes: int = 0
    expand_score: float = 0.0
    cache: CacheSpec | None = None

    def __post_init__(self) -> None:
        check_name("table", self.name)
        object.__setattr__(self, "parts", tuple(self.parts))
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim <= MAX_DIM:
            raise InvalidArgument(f"table {self.name}: dim = {self.dim!r}: give an integer from 1 to {MAX_DIM}")
        if (
            isinstance(self.blocks, bool)
            or not isinstance(self.blocks, int)
            or not 1 <= self.blocks <= MAX_BLOCKS
            or self.blocks & (self.blocks - 1)
        ):
            raise InvalidArgument(
                f"table {self.name}: blocks = {self.blocks!r}: give a power of two from 1 to {MAX_BLOCKS}"
            )
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"table {self.name}: dtype = {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.absent not in ("first", "zeros"):
            raise InvalidArgument(f"table {self.name}: absent = {self.absent!r}: choose first or zeros")
        if not isinstance(self.usage, bool):
            raise InvalidArgument(f"table {self.name}: usage = {self.usage!r}: give true or false")
        if isinstance(self.memory_bytes, bool) or not isinstance(self.memory_bytes, int) or self.memory_bytes < 0:
            raise InvalidArgument(f"table {self.name}: memory_bytes = {self.memory_bytes!r}: give an integer >= 0")
        _finite(f"table {self.name}", "expand_score", self.expand_score)
        if self.cache is not None and not isinstance(self.cache, CacheSpec):
            raise InvalidArgument(f"table {self.name}: cache = {self.cache!r}: give a CacheSpec, or None")
        self._check_parts()
        self._check_combinations()

    def _check_parts(self) -> None:
        if not self.parts:
            return
        if self.optimizer != OptimizerSpec() or self.initializer != Initializer():
            raise InvalidArgument(
                f"table {self.name}: parts and optimizer or initializer are both set: each part has its own"
            )
        if sum(part.width for part in self.parts) != self.dim:
            raise InvalidArgument(
                f"table {self.name}: the parts are {sum(part.width for part in self.parts)} wide in all, dim = {self.dim}"
            )

    def _check_combinations(self) -> None:
        both = [
            (self.memory_bytes, "memory_bytes", self.guard.undo, "guard.undo"),
            (self.memory_bytes, "memory_bytes", self.eviction.max_bytes, "eviction.max_bytes"),
            (self.expand_score, "expand_score", self.memory_bytes, "memory_bytes"),
            (self.expand_score, "expand_score", self.guard.undo, "guard.undo"),
            (self.expand_score, "expand_score", self.eviction.max_bytes, "eviction.max_bytes"),
            (self.expand_score, "expand_score", self.eviction.norm, "eviction.norm"),
        ]
        for one, name, other, second in both:
            if one and other:
                raise InvalidArgument(f"table {self.name}: {name} and {second} do not go together: choose one of them")
        if self.expand_score < 0 or (self.expand_score and len(self.parts) < 2):
            raise InvalidArgument(
                f"table {self.name}: expand_score = {self.expand_score} needs two parts or more, and > 0"
            )

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Return the parts of a row, the only one of an ordinary table included."""
        return self.parts or (Part(self.dim, self.optimizer, self.initializer),)


@dataclass(frozen=True)
class DenseSpec:
    """A dense parameter: float32 of ``shape``, cut in row-major order into blocks of ``slice`` values."""

    name: str
    shape: tuple[int, ...]
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    initializer: Initializer = field(default_factory=lambda: Initializer("zeros"))
    slice: int = 65536

    def __post_init__(self) -> None:
        check_name("dense parameter", self.name)
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.shape):
            raise InvalidArgument(f"dense parameter {self.name}: shape = {self.shape}: give integers >= 1")
        if self.size > 1 << 31:
            raise InvalidArgument(f"dense parameter {self.name}: {self.size} values are over the limit of 2^31")
        if isinstance(self.slice, bool) or not isinstance(self.slice, int) or self.slice < 1:
            raise InvalidArgument(f"dense parameter {self.name}: slice = {self.slice!r}: give an integer >= 1")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.slice)


def to_json(spec: TableSpec | DenseSpec) -> dict[str, Any]:
    """Return the spec as JSON-ready values."""
    out = asdict(spec)
    if isinstance(spec, DenseSpec):
        out["shape"] = list(spec.shape)
    else:
        out["parts"] = list(out["parts"])
    return out


def _build(kind: type, values: object, owner: str) -> Any:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{owner}: expected an object, got {type(values).__name__}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InvalidArgument(f"{owner}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidArgument(f"{owner}: {error}") from None


NESTED = {
    "optimizer": OptimizerSpec,
    "initializer": Initializer,
    "admission": Admission,
    "eviction": Eviction,
    "guard": Guard,
    "cache": CacheSpec,
}


def _nested(values: object, owner: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{owner}: expected an object, got {type(values).__name__}")
    out = dict(values)
    for name, kind in NESTED.items():
        if name in out and not (name == "cache" and out[name] is None):
            out[name] = _build(kind, out[name], f"{owner}.{name}")
    if "parts" in out:
        if not isinstance(out["parts"], list | tuple):
            raise InvalidArgument(f"{owner}.parts: expected a list, got {type(out['parts']).__name__}")
        out["parts"] = tuple(
            _build(Part, _nested(part, f"{owner}.parts[{i}]"), f"{owner}.parts[{i}]")
            for i, part in enumerate(out["parts"])
        )
    return out


def table_from_json(values: object) -> TableSpec:
    """Return the TableSpec of its JSON form; InvalidArgument names what does not fit."""
    spec: TableSpec = _build(TableSpec, _nested(values, "table"), "table")
    return spec


def dense_from_json(values: object) -> DenseSpec:
    """Return the DenseSpec of its JSON form; InvalidArgument names what does not fit."""
    out = _nested(values, "dense parameter")
    if isinstance(out.get("shape"), list):
        out["shape"] = tuple(out["shape"])
    spec: DenseSpec = _build(DenseSpec, out, "dense parameter")
    return spec
