# SPDX-License-Identifier: Apache-2.0
"""How often a checkpoint is made while an epoch is trained, as people write it: ``90s``, ``10m``, ``2h`` or ``5000 steps``."""

import math
import re

from oarlock.client.job import MAX_LEASE_SECONDS
from oarlock.proto.errors import InvalidArgument

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|steps)\s*", re.ASCII)
MOST_STEPS = 1 << 53


def read_every(text: str, name: str = "checkpoint_every") -> tuple[int, float]:
    """Return (steps, seconds), one of which is 0; both for an empty text. InvalidArgument names ``name``."""
    if not text:
        return 0, 0.0
    found = _WRITTEN.fullmatch(text)
    if found is not None:
        amount, unit = found.groups()
        value = float(amount)
        if unit == "steps" and value == math.floor(value) and 1 <= value <= MOST_STEPS:
            return int(value), 0.0
        if unit != "steps" and 0 < value * _UNITS[unit] < MAX_LEASE_SECONDS:
            return 0, value * _UNITS[unit]
    raise InvalidArgument(
        f"{name} = {text[:40]!r}: give a time like '90s', '10m' or '2h', or a number like '5000 steps'"
    )
