# SPDX-License-Identifier: Apache-2.0
"""What is done to a table to make it smaller, and how that is written: `int8`, `pq:8`, `prune:0.75`, `mixed:0.1:4`.

Invariant: a Method that was made can be done to some table; whether to the one at hand is said before anything of it is
written (`check`). Pure.
"""

from dataclasses import dataclass

from oarlock.embedding.lookup import counter_names
from oarlock.embedding.packed import mixed_values, part_starts
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument

METHODS = ("int8", "int4", "pq", "mixed", "prune")
NONE = "none"
# What says which rows count most: how often each was seen, its score by shows and clicks, how far it is from its first value.
RANKS = ("occurrences", "score", "change")
SHARES = {"mixed": 0.1, "prune": 0.5}
# Of mixed dimensions: a matrix of this many columns and lines is taken apart.
MAX_MIXED_DIM = 4096
# Which fields a method has, in the order in which they are written behind it.
FIELDS = {"pq": ("parts",), "mixed": ("keep", "parts"), "prune": ("keep",)}


@dataclass(frozen=True)
class Method:
    """``parts``: bytes of a row under pq, values of one that is not kept whole under mixed; 0: a quarter of the dim.
    ``keep``: the share of rows that prune leaves, or mixed keeps whole; 0: as SHARES has it. ``by``: of RANKS, what ranks them;
    empty: what the table keeps of it under mixed, change under prune.
    """

    name: str
    parts: int = 0
    keep: float = 0.0
    by: str = ""

    def __post_init__(self) -> None:
        if self.name not in (*METHODS, NONE):
            raise InvalidArgument(f"method {self.name[:100]!r}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.keep <= 1:
            raise InvalidArgument(f"keep = {self.keep}: give a share from above 0 to 1")
        if self.parts < 0:
            raise InvalidArgument(f"parts = {self.parts}: give an integer from 1 to the dim of the table")
        if self.by and self.by not in RANKS:
            raise InvalidArgument(f"by = {self.by[:100]!r}: choose one of {', '.join(RANKS)}")

    @property
    def share(self) -> float:
        """The share of rows that stays, or stays whole."""
        return self.keep or SHARES.get(self.name, 1.0)

    def parts_of(self, spec: TableSpec) -> int:
        """Return how many codes or values a row of a table has, 0 if it has none of them."""
        least = {"pq": 1, "mixed": 2}.get(self.name, 0)
        return (self.parts or max(least, spec.dim // 4)) if least else 0

    def rank_of(self, spec: TableSpec) -> str:
        """Return what ranks the rows of a table; InvalidArgument if it keeps nothing of it."""
        kept = counter_names(spec)
        found = {"occurrences": "occurrences" in kept, "score": "shows" in kept, "change": True}
        if self.by:
            if not found[self.by]:
                raise InvalidArgument(
                    f"table {spec.name} keeps no {self.by} of its rows: rank them by change, how far each is from its first "
                    "value"
                )
            return self.by
        if self.name == "prune":
            return "change"
        for rank in ("occurrences", "score"):
            if found[rank]:
                return rank
        raise InvalidArgument(
            f"table {spec.name} does not keep how often its rows were seen (its spec has neither usage nor an admission or "
            "eviction that counts): rank them by change, how far each is from its first value"
        )

    def check(self, spec: TableSpec) -> None:
        """Raise InvalidArgument if it cannot be done to a table."""
        parts = self.parts_of(spec)
        if self.name == "pq":
            part_starts(spec.dim, parts)
        if self.name == "mixed":
            mixed_values(parts, spec.dim)
            if spec.dim > MAX_MIXED_DIM:
                raise InvalidArgument(f"table {spec.name}: mixed is for a dim of up to {MAX_MIXED_DIM}, not {spec.dim}")
        if self.name in SHARES:
            self.rank_of(spec)


def read_method(text: str, by: str = "") -> Method:
    """Return the method that is written as ``text``; InvalidArgument says how it is to be written."""
    name, *values = text.split(":")
    names = FIELDS.get(name, ())
    if name not in METHODS or len(values) > len(names):
        raise InvalidArgument(
            f"method {text[:100]!r}: write int8, int4, pq:PARTS, mixed:SHARE:VALUES or prune:SHARE; what is behind the name "
            "may be left out"
        )
    fields: dict[str, float] = {}
    for field, value in zip(names, values, strict=False):
        try:
            fields[field] = int(value) if field == "parts" else float(value)
        except ValueError:
            fields[field] = -1
        if not 0 < fields[field] <= (1 if field == "keep" else 1 << 20):
            what = "a share, above 0 and up to 1" if field == "keep" else "an integer from 1 to the dim of the table"
            raise InvalidArgument(f"method {text[:100]!r}: {value[:40]!r} is not {what}")
    return Method(
        name, parts=int(fields.get("parts", 0)), keep=fields.get("keep", 0.0), by=by if name in SHARES else ""
    )
