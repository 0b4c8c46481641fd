# SPDX-License-Identifier: Apache-2.0
"""Look-ups on the wire, as clients have them: keys of tables to a request, an answer to rows.

Invariant: an answer that does not fit its question is Malformed, and nothing of it is given out. Pure functions, any thread.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import Part, pack, unpack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import InvalidArgument, Malformed
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.serving_pb2 import LookupRequest, TableFound, TableLookup
from oarlock.proto.serving_pb2 import ModelVersion as VersionMessage

Keys = NDArray[np.uint64] | Sequence[int]


class ModelVersion(NamedTuple):
    """Which state of the model an answer is of. ``seconds_since``: how old it was by the server's clock.

    ``live``: its rows are those of a job that is followed, of one run, but of no one cut.
    """

    run: int
    cut: int
    seconds_since: float
    live: bool = False


class Found(Mapping[str, NDArray[np.float32]]):
    """Rows by table: float32[n, dim] each, in the order of its keys; ``missing``: by table, how many keys have no row.

    What a key without a row reads as is the table's rule, as in training: its first value, or zeros.
    """

    __slots__ = ("_rows", "missing", "version")

    def __init__(self, rows: dict[str, NDArray[np.float32]], missing: dict[str, int], version: ModelVersion) -> None:
        self._rows = rows
        self.missing = missing
        self.version = version

    def __getitem__(self, table: str) -> NDArray[np.float32]:
        return self._rows[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(rows.shape)}" for name, rows in self._rows.items())
        return f"Found({shapes}; {self.version})"


def lookup_request(tables: Mapping[str, Keys], *, job: str = "", version: ModelVersion | None = None) -> Bulk:
    """Return the request for keys of tables, of ``job`` and of a version if they are given; InvalidArgument names a table whose
    keys are none."""
    parts: list[Part] = []
    asked = [TableLookup(table=name, keys=pack(checked_keys(name, keys), parts)) for name, keys in tables.items()]
    request = LookupRequest(protocol=PROTOCOL, tables=asked, job=job)
    if version is not None:
        request.version.CopyFrom(version_message(version))
    return Bulk(request, parts)


def version_message(version: ModelVersion) -> VersionMessage:
    """Return a version that is asked for; InvalidArgument if it cannot be one."""
    try:
        return VersionMessage(run=version.run, cut=version.cut, live=version.live)
    except (AttributeError, TypeError, ValueError):
        raise InvalidArgument(f"{str(version)[:200]} is no version of a model: give that of an answer") from None


def kind_of(version: Any) -> tuple[bool, int, int]:
    """Return (live, run, cut): what answers of one version have in common; the cut of what is followed is 0."""
    return (version.live, version.run, 0 if version.live else version.cut)


def checked_version(found: Found, version: ModelVersion | None) -> Found:
    """Return what was found; Malformed if it is of another version than was asked for."""
    if version is not None and kind_of(found.version) != kind_of(version):
        raise Malformed(f"rows of {found.version} came, and {version} was asked for")
    return found


def checked_keys(name: str, keys: Keys) -> NDArray[np.uint64]:
    """Return keys as uint64[n]; InvalidArgument says whose they are if they are none."""
    if isinstance(keys, np.ndarray):
        if keys.dtype == np.uint64 and keys.ndim == 1:
            return keys
        right = keys.ndim == 1 and keys.dtype.kind in "iu" and not (keys.size and keys.min() < 0)
        found = keys
    else:
        try:
            # Not numpy's own way, by which integers on both sides of 2^63 become floating-point numbers.
            values = [operator.index(key) for key in keys]
        except TypeError:
            values = [-1]
        right = not values or (min(values) >= 0 and max(values) < 1 << 64)
        found = np.array(values if right else [], np.uint64)
    if not right:
        raise InvalidArgument(f"keys of {name}: give integers from 0 to 2^64 - 1, in one dimension")
    return found.astype(np.uint64)


def read_found(tables: Mapping[str, Keys], reply: Any) -> Found:
    """Return what an answer says; Malformed if it is not one to this question."""
    message, parts = opened(reply)
    check_tables(message, len(tables))
    rows, missing = {}, {}
    for (name, keys), found in zip(tables.items(), message.tables, strict=True):
        rows[name], missing[name] = own(read_rows(name, found, len(keys), parts)), found.missing
    return Found(rows, missing, read_version(message.version))


def check_tables(message: Any, asked: int) -> None:
    """Raise Malformed unless an answer has so many tables."""
    if len(message.tables) != asked:
        raise Malformed(f"rows of {len(message.tables)} tables came, {asked} were asked for")


def read_rows(
    name: str, found: TableFound, keys: int, parts: Sequence[Part], *, columns: int | None = None
) -> NDArray[np.float32]:
    """Return the rows of a table: float32[keys, columns]; any number of columns if it is not told."""
    values: NDArray[np.float32] = unpack(
        found.rows, np.float32, f"rows of {name}", dims=2, columns=columns, parts=parts
    )
    if len(values) != keys or found.missing > keys:
        raise Malformed(f"{len(values)} rows of {name} came for {keys} keys, of which {found.missing} have none")
    return values


def read_version(version: Any) -> ModelVersion:
    """Return the version that a message has."""
    return ModelVersion(version.run, version.cut, version.seconds_since, version.live)


def own(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values that their reader may change: where they were received, if that is memory of their own."""
    try:
        values.flags.writeable = True
    except ValueError:
        return values.copy()
    return values
