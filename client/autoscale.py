# SPDX-License-Identifier: Apache-2.0
"""Autoscale: the rules by which a job's numbers of servers and workers follow its load, table ``[autoscale]`` of a job file.

Invariant: an Autoscale that exists is one by which can be scaled. Immutable; any thread. The launcher reads it, the job's spec
carries it, the coordinator goes by it.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from oarlock.proto.errors import InvalidArgument

MOST_MEMBERS = 4096
MOST_BYTES = 1 << 60


@dataclass(frozen=True)
class Autoscale:
    """Limits, bounds and patience. With ``servers_most`` (or ``workers_most``) 0 their number is left alone.

    ``server_bytes``: rows, dense values and marks that a server may have, 0: as its system allows its process. ``dry_run``: what
    would be done is told, and not done.
    """

    servers_least: int = 1
    servers_most: int = 0
    workers_least: int = 1
    workers_most: int = 0
    server_bytes: int = 0
    memory_share: float = 0.7
    busy_share: float = 0.7
    waiting_pushes: float = 4.0
    spare_share: float = 0.7
    gain_share: float = 0.3
    looks: int = 3
    look_seconds: float = 20.0
    cool_down_seconds: float = 120.0
    stale_seconds: float = 15.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        for least, most in (("servers_least", "servers_most"), ("workers_least", "workers_most")):
            fewest, largest = getattr(self, least), getattr(self, most)
            if not 1 <= fewest <= MOST_MEMBERS:
                raise _wrong(least, fewest, f"an integer from 1 to {MOST_MEMBERS}")
            if largest and not fewest <= largest <= MOST_MEMBERS:
                raise _wrong(most, largest, f"0 (left alone), or an integer from {least} = {fewest} to {MOST_MEMBERS}")
        if not 0 <= self.server_bytes <= MOST_BYTES:
            raise _wrong(
                "server_bytes", self.server_bytes, f"0 (as the system allows), or an integer up to {MOST_BYTES}"
            )
        for name in ("memory_share", "busy_share", "spare_share", "gain_share"):
            if not 0 < getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "a number between 0 and 1")
        if not 0 < self.waiting_pushes <= 1 << 20:
            raise _wrong("waiting_pushes", self.waiting_pushes, f"a number above 0, at most {1 << 20}")
        if not 1 <= self.looks <= 1000:
            raise _wrong("looks", self.looks, "an integer from 1 to 1000")
        for name in ("look_seconds", "cool_down_seconds", "stale_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise _wrong(name, getattr(self, name), "a number above 0, at most 86400")

    def __bool__(self) -> bool:
        return bool(self.servers_most or self.workers_most)


def read_autoscale(values: object, owner: str) -> Autoscale:
    """Return the Autoscale of ``[autoscale]`` in a job file; InvalidArgument, in the name of ``owner``, unless it is one.

    An empty table is an Autoscale that leaves everything alone.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{owner}: autoscale = {values!r}: give a table with servers_most or workers_most")
    kinds = {f.name: f.type for f in fields(Autoscale)}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument(f"{owner}: autoscale: unknown field {name!r}{hint} Known: {', '.join(kinds)}")
        if not _is(kinds[name], value):
            raise InvalidArgument(f"{owner}: autoscale.{name} = {value!r}: give {_KINDS[kinds[name]]}")
    try:
        given: dict[str, Any] = {name: float(v) if kinds[name] is float else v for name, v in values.items()}
        found = Autoscale(**given)
    except InvalidArgument as error:
        raise InvalidArgument(f"{owner}: {error}") from None
    # Said to be 0, both are left alone: so a job that goes on may end it.
    if values and not found and not {"servers_most", "workers_most"} & set(values):
        raise InvalidArgument(f"{owner}: autoscale scales nothing: give servers_most, workers_most or both")
    return found


def to_values(autoscale: Autoscale) -> dict[str, Any]:
    """Return the JSON form, empty for one that leaves everything alone."""
    return asdict(autoscale) if autoscale else {}


def check_autoscale(autoscale: Autoscale, replicas: int) -> None:
    """Raise InvalidArgument for a limit that leaves no room for the copies of a block."""
    if 0 < autoscale.servers_most <= replicas:
        raise InvalidArgument(
            f"autoscale.servers_most = {autoscale.servers_most} and replicas = {replicas} contradict each other: each copy of a "
            f"block is on another server; give servers_most = {replicas + 1} or more"
        )


_KINDS: dict[Any, str] = {int: "an integer", float: "a finite number", bool: "true or false"}


def _is(kind: Any, value: object) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if isinstance(value, int):
        # One that no float comes near is no number of anything here.
        return abs(value) <= MOST_BYTES
    return kind is float and isinstance(value, float) and math.isfinite(value)


def _wrong(name: str, value: object, wanted: str) -> InvalidArgument:
    return InvalidArgument(f"autoscale.{name} = {value}: give {wanted}")
