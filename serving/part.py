# SPDX-License-Identifier: Apache-2.0
"""Which part of a model a process serves: of every table the blocks whose number modulo ``parts`` is ``number``.

Invariant: each block is in one part, and which one depends on its number alone; so the parts of one model have nothing twice
and leave nothing out, whoever made them. Immutable; any thread.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.hashing import table_salt
from oarlock.embedding.partition import find_other
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument

MAX_PARTS = 1024


@dataclass(frozen=True)
class ModelPart:
    """Part ``number`` of ``parts``; as it is made by default, all of a model.

    ``rows`` = False: all of it but its rows, which others are asked for.
    """

    number: int = 0
    parts: int = 1
    rows: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= MAX_PARTS or not 0 <= self.number < self.parts:
            raise InvalidArgument(
                f"part {self.number} of {self.parts}: give I/N with N from 1 to {MAX_PARTS} and I from 0 to below N"
            )

    def __str__(self) -> str:
        return f"part {self.number} of {self.parts}"

    @property
    def whole(self) -> bool:
        """Whether it is all of a model."""
        return self.parts == 1

    def has(self, block: int) -> bool:
        """Tell whether a block of a table is in it."""
        return self.rows and block % self.parts == self.number

    def mask(self, blocks: int) -> NDArray[np.bool_]:
        """Return bool[blocks]: which blocks of a table of so many are in it."""
        found: NDArray[np.bool_] = np.arange(blocks) % self.parts == self.number
        return found & self.rows

    def check(self, spec: TableSpec, keys: NDArray[np.uint64]) -> None:
        """Raise InvalidArgument unless all of keys: uint64[n] are of its blocks of a table."""
        if self.whole:
            return
        at, other = find_other(keys, table_salt(spec.name), spec.blocks, self.parts, self.number)
        if at >= 0:
            raise InvalidArgument(
                f"key {int(keys[at])} of table {spec.name} is in part {other} of {self.parts}, and this process has {self}: "
                "ask one that has it, or give a Client the addresses of all parts",
                part=other,
                parts=self.parts,
            )


WHOLE = ModelPart()
WITHOUT_ROWS = ModelPart(rows=False)


def read_part(text: str) -> ModelPart:
    """Return the part that ``I/N`` means."""
    number, slash, parts = text.partition("/")
    if not slash or not all(each.isascii() and each.isdigit() and len(each) < 10 for each in (number, parts)):
        raise InvalidArgument(f"{text[:80]!r} is no part: give I/N, such as 0/2 and 1/2 for a model in two parts")
    return ModelPart(int(number), int(parts))
