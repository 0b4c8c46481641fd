# SPDX-License-Identifier: Apache-2.0
"""What the columns of tabular data are and what a model is to see of them: a label, numbers, categorical fields.

Invariant: a Schema that exists is consistent in itself; whether it fits a file is found out when that file is read.
Immutable: callable from any thread. ``data/schema.py`` reads its TOML form, docs/data.md describes it.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from oarlock.data.columns import ColumnSpec
from oarlock.proto.errors import InvalidArgument

FORMATS = ("csv", "tsv", "parquet")
MAX_ITEMS = 4096
MAX_BUCKETS = 1 << 62
# What arrays of a column are named by ends in these (``offsets_of``, ``codes_of``).
RESERVED_ENDINGS = (":offsets", ":codes")


@dataclass(frozen=True)
class Label:
    """The column that is predicted.

    ``positive``: the values that mean 1; without them the column holds numbers in [0, 1]. ``negative``: the values that mean
    0; without them all others do.
    """

    column: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("label.column", self.column)
        if self.negative and not self.positive:
            raise InvalidArgument("label.negative: needs label.positive beside it")
        both = sorted(set(self.positive) & set(self.negative))
        if both:
            raise InvalidArgument(f"label: {both[0]!r} is both positive and negative; take it out of one of them")


@dataclass(frozen=True)
class Number:
    """A number that goes into the model as it is.

    ``fill``: what a missing value becomes; None: the mean. ``log``: sign(x) * log(1 + |x|), before all else.
    ``standardise``: minus the mean, divided by the standard deviation.
    """

    column: str
    fill: float | None = None
    log: bool = False
    standardise: bool = True

    def __post_init__(self) -> None:
        _check_name("numbers.column", self.column)
        if self.fill is not None and not _is_float32(self.fill):
            raise InvalidArgument(f'numbers {self.column}: fill = {self.fill}: give "mean" or a finite number')


@dataclass(frozen=True)
class Vocabulary:
    """The values that have rows of their own: those seen ``min_count`` times or more, the ``max_size`` commonest."""

    min_count: int = 1
    max_size: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("min_count", "max_size"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"vocabulary.{name} = {getattr(self, name)}: give an integer >= 1")


@dataclass(frozen=True)
class Field:
    """A categorical field: a column, a number in buckets, or a cross of ``columns``, with a name of its own.

    Its values are kept by a ``vocabulary``, folded into ``hash`` buckets, or are the keys themselves; a number is cut at the
    bounds ``bucketise``, or at ``quantiles`` - 1 bounds that are fitted so that the buckets are about equally full.
    """

    name: str
    columns: tuple[str, ...]
    vocabulary: Vocabulary | None = None
    hash: int = 0
    bucketise: tuple[float, ...] = ()
    quantiles: int = 0

    def __post_init__(self) -> None:
        _check_name("fields.name", self.name)
        for column in self.columns:
            _check_name(f"fields {self.name}: column", column)
        chosen = [
            name
            for name in ("vocabulary", "hash", "bucketise", "quantiles")
            if getattr(self, name) not in (None, 0, ())
        ]
        if len(chosen) > 1:
            raise InvalidArgument(f"fields {self.name}: {' and '.join(chosen)}: choose one of them")
        if not 0 <= self.hash <= MAX_BUCKETS:
            raise InvalidArgument(f"fields {self.name}: hash = {self.hash}: give a number of buckets, 1 to 2^62")
        if self.quantiles and not 2 <= self.quantiles <= MAX_ITEMS:
            raise InvalidArgument(f"fields {self.name}: quantiles = {self.quantiles}: give 2 to {MAX_ITEMS}")
        if self.bucketise:
            self._check_bounds()
        if not self.columns:
            raise InvalidArgument(f"fields {self.name}: give column = NAME or cross = [NAMES]")
        if self.is_cross:
            if len(set(self.columns)) < len(self.columns):
                raise InvalidArgument(f"fields {self.name}: cross = {list(self.columns)}: a column is named twice")
            if chosen and chosen != ["hash"]:
                raise InvalidArgument(f"fields {self.name}: {chosen[0]} does not go with cross; use hash or neither")

    @property
    def is_cross(self) -> bool:
        return len(self.columns) > 1

    @property
    def is_number(self) -> bool:
        """Tell whether the column is read as a number and cut into buckets."""
        return bool(self.bucketise or self.quantiles)

    def _check_bounds(self) -> None:
        given = f"fields {self.name}: bucketise = {list(self.bucketise[:8])}"
        if len(self.bucketise) > MAX_ITEMS:
            raise InvalidArgument(
                f"fields {self.name}: bucketise has {len(self.bucketise)} bounds, at most {MAX_ITEMS}"
            )
        if not all(_is_float32(bound) for bound in self.bucketise):
            raise InvalidArgument(f"{given}: give finite numbers")
        # Values are float32: two bounds that round to the same one have no value between them.
        if (np.diff(np.array(self.bucketise, np.float32)) <= 0).any():
            raise InvalidArgument(f"{given}: give the bounds in ascending order, as float32 distinct")


@dataclass(frozen=True)
class Schema:
    """A whole schema. ``columns``: names for text without a header line; ``missing``: values that mean that there is none.

    ``trim``: spaces around every value of a text file are cut off.
    """

    format: str
    label: Label
    numbers: tuple[Number, ...] = ()
    fields: tuple[Field, ...] = ()
    columns: tuple[str, ...] = ()
    missing: tuple[str, ...] = ("",)
    trim: bool = True
    kinds: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            hint = _near(str(self.format), FORMATS)
            raise InvalidArgument(f"format = {self.format!r}: choose one of {', '.join(FORMATS)}{hint}")
        if not self.fields:
            raise InvalidArgument("fields: a schema needs at least one [[fields]]")
        for items in ("numbers", "fields", "missing", "columns"):
            if len(getattr(self, items)) > MAX_ITEMS:
                raise InvalidArgument(f"{items}: {len(getattr(self, items))} of them, at most {MAX_ITEMS}")
        _check_once("columns", self.columns)
        _check_once("numbers: column", (number.column for number in self.numbers))
        _check_once("fields: name", (one.name for one in self.fields), "; give one of them another name = ...")
        object.__setattr__(self, "kinds", self._find_kinds())
        used = {number.column for number in self.numbers} | {c for one in self.fields for c in one.columns}
        if self.label.column in used:
            raise InvalidArgument(
                f"column {self.label.column!r} is the label and also a number or field: a model must not see its label"
            )
        if self.columns:
            if self.format == "parquet":
                raise InvalidArgument("columns: Parquet files name their own columns; leave it out")
            check_known("columns", self.kinds, self.columns)

    @property
    def specs(self) -> tuple[ColumnSpec, ...]:
        """Return the columns to read; one that is both a number and a category appears once for each."""
        return tuple(ColumnSpec(name, kind) for name, kinds in self.kinds.items() for kind in kinds)

    def buckets_of(self, column: str) -> int | None:
        """Return the position of the field that has ``column`` in buckets under its own name: in a cross it counts so."""
        for i, one in enumerate(self.fields):
            if one.name == column and one.is_number:
                return i
        return None

    def _find_kinds(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, dict[str, None]] = {}

        def add(column: str, kind: str) -> None:
            found.setdefault(column, {})[kind] = None

        add(self.label.column, "category" if self.label.positive else "label")
        for number in self.numbers:
            add(number.column, "number")
        for one in self.fields:
            for column in one.columns:
                bucket = self.buckets_of(column) if one.is_cross else None
                if bucket is not None:
                    add(self.fields[bucket].columns[0], "number")
                else:
                    add(column, "number" if one.is_number else "category")
        return {column: tuple(kinds) for column, kinds in found.items()}


def check_known(owner: str, wanted: Iterable[str], there: Iterable[str]) -> None:
    """Raise unless every wanted column is there; the error names a near one."""
    there = list(there)
    for column in wanted:
        if column not in there:
            listed = ", ".join(there[:40]) + (", ..." if len(there) > 40 else "")
            hint = _near(column, there)
            raise InvalidArgument(f"{owner}: no column {column!r} as the schema has it{hint}. There are: {listed}")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_name(owner: str, name: str) -> None:
    if not name or len(name) > 256 or "\0" in name:
        raise InvalidArgument(f"{owner} = {name[:40]!r}: give a name of 1 to 256 characters")
    if name.endswith(RESERVED_ENDINGS):
        raise InvalidArgument(
            f"{owner} = {name!r}: names that end in {' or '.join(RESERVED_ENDINGS)} are taken; rename it"
        )


def _check_once(owner: str, names: Iterable[str], advice: str = "") -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidArgument(f"{owner} {name!r} appears twice{advice}")
        seen.add(name)


def _is_float32(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= float(np.finfo(np.float32).max)
