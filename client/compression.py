# SPDX-License-Identifier: Apache-2.0
"""How a job says in which form values travel: by table, or for all dense parameters, and by direction.

Invariant: what is spelt here is all that a job may ask for; which of it goes with which mode is checked when the job is made,
by an error that names both settings. Pure functions and values; any thread.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from oarlock.proto.errors import InvalidArgument

# What stands for all dense parameters where tables stand by their names.
DENSE = "dense"
FLOAT32 = "float32"
FORMS = (FLOAT32, "float16", "bfloat16", "int8")
FEEDBACK = "+feedback"
TOPK = "topk:"
# What is kept of a split's gradients outlives a group, which no other mode allows (docs/consistency.md).
_FEEDBACK_MODES = {"rows": ("async", "ssp", "hybrid"), DENSE: ("async", "ssp")}


class Way(NamedTuple):
    """One direction, as it is spelt: a codec of ``embedding/compress.py``, the share of columns under topk, error feedback."""

    codec: str
    share: float = 0.0
    feedback: bool = False

    @property
    def lossless(self) -> bool:
        return self.codec == "none"

    def columns(self, dim: int) -> int:
        """Return how many of ``dim`` columns travel under topk, 0 elsewhere."""
        return max(1, math.ceil(self.share * dim)) if self.share else 0


def read_way(text: object, setting: str) -> Way:
    """Return what a direction is spelt as; InvalidArgument says what can be."""
    if isinstance(text, str):
        if text in FORMS:
            return Way("none" if text == FLOAT32 else text)
        if text.removesuffix(FEEDBACK) in FORMS[1:]:
            return Way(text.removesuffix(FEEDBACK), feedback=True)
        if text.startswith(TOPK):
            try:
                share = float(text.removeprefix(TOPK))
            except ValueError:
                share = math.nan
            if 0 < share <= 1:
                return Way("topk", share, feedback=True)
            raise InvalidArgument(f"{setting} = {text!r}: give the share of the columns that travel, as in 'topk:0.1'")
    near = difflib.get_close_matches(str(text), [*FORMS, *(f + FEEDBACK for f in FORMS[1:]), "topk:0.1"], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidArgument(
        f"{setting} = {text!r}: choose one of {', '.join(FORMS)}, with {FEEDBACK!r} for error feedback, or 'topk:SHARE'{hint}"
    )


@dataclass(frozen=True)
class WireSpec:
    """How the values of one table, or of the dense parameters, travel.

    ``pull``: one of FORMS, rounded to nearest. ``push``: the same, rounded stochastically; or with ``+feedback``, which keeps
    what was left out for the split's next group, or ``topk:SHARE``, always with it: this share of each row's columns, the
    largest ones. ``zstd`` packs what comes of either once more.
    """

    pull: str = FLOAT32
    push: str = FLOAT32
    zstd: bool = False

    def __post_init__(self) -> None:
        found = read_way(self.pull, "compression: pull")
        if found.feedback:
            raise InvalidArgument(
                f"compression: pull = {self.pull!r}: nothing is kept of rows, only of gradients: choose one of {', '.join(FORMS)}"
            )
        read_way(self.push, "compression: push")
        if not isinstance(self.zstd, bool):
            raise InvalidArgument(f"compression: zstd = {self.zstd!r}: give true or false")

    @property
    def pulled(self) -> Way:
        return read_way(self.pull, "pull")

    @property
    def pushed(self) -> Way:
        return read_way(self.push, "push")


def read_compression(values: Mapping[str, Any], owner: str) -> dict[str, WireSpec]:
    """Return what was written of each table; ``owner`` begins the messages."""
    known = [f.name for f in fields(WireSpec)]
    out = {}
    if not isinstance(values, Mapping):
        raise InvalidArgument(
            f"{owner}: compression = {values!r}: give a table for each of the job's tables that it is about"
        )
    for name, given in values.items():
        if isinstance(given, WireSpec):
            out[name] = given
            continue
        if not isinstance(given, Mapping):
            raise InvalidArgument(f"{owner}: compression.{name} = {given!r}: give a table of {', '.join(known)}")
        for setting in given:
            if setting not in known:
                near = difflib.get_close_matches(str(setting), known, 1, 0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidArgument(f"{owner}: compression.{name} has no {setting!r}{hint} Known: {', '.join(known)}")
        try:
            out[name] = WireSpec(**given)
        except InvalidArgument as error:
            raise InvalidArgument(f"{owner}: compression.{name}: {error}") from None
    return out


def check_compression(compression: Mapping[str, WireSpec], tables: tuple[str, ...], mode: str) -> None:
    """Raise InvalidArgument for a name that the job has not, or a form that its mode does not go with."""
    for name, wire in compression.items():
        if name not in (*tables, DENSE):
            near = difflib.get_close_matches(name, [*tables, DENSE], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InvalidArgument(
                f"compression.{name}: the job has no such table{hint} There are: {', '.join((*tables, DENSE))}"
            )
        if wire.pushed.feedback and mode not in _FEEDBACK_MODES[DENSE if name == DENSE else "rows"]:
            raise InvalidArgument(
                f"mode = {mode!r} and compression.{name}.push = {wire.push!r} contradict each other: this mode lets nothing be "
                f"kept from one group to the next; give a form without feedback ({', '.join(FORMS)}), or mode = 'async'"
            )
    if DENSE in tables and DENSE in compression:
        raise InvalidArgument(
            f"compression.{DENSE} and a table named {DENSE!r} contradict each other: the name stands for the dense parameters"
        )


def feedback_of(compression: Mapping[str, WireSpec]) -> bool:
    """Tell whether anything is kept from one group of a split to the next."""
    return any(wire.pushed.feedback for wire in compression.values())
