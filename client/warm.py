# SPDX-License-Identifier: Apache-2.0
"""Warm start: which tables and dense parameters of a checkpoint a new job's ones begin with, and what goes together.

    path        the cut
    tables      table of this job -> table of the checkpoint
    dense       the same of dense parameters
    dimension   what to do where a table's dim is another one: "refuse" it, "truncate" it, or "pad" it with first values

Invariant: what ``matched`` lets pass can be converted row by row, whatever the rows are. Pure functions over specs.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument, NotFound, SpecMismatch

DIMENSIONS = ("refuse", "truncate", "pad")
MAX_PATH = 4096


@dataclass(frozen=True)
class WarmStart:
    """What a new job begins with besides first values. Without a ``path`` that is nothing."""

    path: str = ""
    tables: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    dimension: str = "refuse"

    def __bool__(self) -> bool:
        return bool(self.path)


def read_warm_start(values: object, owner: str) -> WarmStart:
    """Return the WarmStart of ``[warm_start]`` in a job file; InvalidArgument, in the name of ``owner``, unless it is one."""
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{owner}: warm_start = {values!r}: give a table with path, tables and dense")
    known = [f.name for f in fields(WarmStart)]
    for name in values:
        if name not in known:
            raise InvalidArgument(f"{owner}: warm_start: unknown field {name!r}{_near(str(name), known)}")
    path, dimension = values.get("path", ""), values.get("dimension", "refuse")
    if not isinstance(path, str) or "\0" in path or len(path) > MAX_PATH:
        raise InvalidArgument(f"{owner}: warm_start.path: give the path or URL of a checkpoint")
    if dimension not in DIMENSIONS:
        raise InvalidArgument(f"{owner}: warm_start.dimension = {dimension!r}: choose one of {', '.join(DIMENSIONS)}")
    names = {}
    for name in ("tables", "dense"):
        found = values.get(name, {})
        if not isinstance(found, Mapping) or not all(isinstance(n, str) for pair in found.items() for n in pair):
            raise InvalidArgument(
                f'{owner}: warm_start.{name}: give a table of names, such as {{item = "film"}}: its own, and that over there'
            )
        names[name] = dict(found)
    if values and not path:
        raise InvalidArgument(f"{owner}: warm_start needs a path: a job's name, a folder of checkpoints or a URL")
    return WarmStart(path, names["tables"], names["dense"], dimension)


def to_values(warm: WarmStart) -> dict[str, Any]:
    """Return the JSON form, empty for none."""
    return asdict(warm) if warm else {}


def chosen(
    warm: WarmStart,
    tables: Mapping[str, TableSpec],
    dense: Mapping[str, DenseSpec],
    old_tables: Mapping[str, TableSpec],
    old_dense: Mapping[str, DenseSpec],
) -> WarmStart:
    """Return ``warm`` with all names said: where none was, those that both have. Raises unless each goes with its origin."""
    said = {"tables": dict(warm.tables), "dense": dict(warm.dense)}
    if not warm.tables and not warm.dense:
        said = {
            "tables": {n: n for n in tables if n in old_tables},
            "dense": {n: n for n in dense if n in old_dense and dense[n].shape == old_dense[n].shape},
        }
        if not said["tables"] and not said["dense"]:
            raise NotFound(
                f"warm start: the checkpoint {warm.path} has {_list([*old_tables, *old_dense])}, the job "
                f"{_list([*tables, *dense])}: none of one name; say which becomes which"
            )
    found = WarmStart(warm.path, said["tables"], said["dense"], warm.dimension)
    matched(found, tables, dense, old_tables, old_dense)
    return found


def matched(
    warm: WarmStart,
    tables: Mapping[str, TableSpec],
    dense: Mapping[str, DenseSpec],
    old_tables: Mapping[str, TableSpec],
    old_dense: Mapping[str, DenseSpec],
) -> None:
    """Raise NotFound or SpecMismatch, with the near name, unless all that is chosen is there and can be converted."""
    for name, old in warm.tables.items():
        mine, its = _found("table", name, tables, old, old_tables, warm.path)
        wrong = _wrong_dim(mine.dim, its.dim, warm.dimension)
        if wrong:
            raise SpecMismatch(
                f"warm start: table {name} has dim {mine.dim}, {old} in the checkpoint {its.dim}: {wrong}", table=name
            )
    for name, old in warm.dense.items():
        own, that = _found("dense parameter", name, dense, old, old_dense, warm.path)
        if own.shape != that.shape:
            raise SpecMismatch(
                f"warm start: dense parameter {name} has shape {own.shape}, {old} in the checkpoint {that.shape}: a dense "
                "parameter is taken over as it is; leave it out",
                table=name,
            )


def _wrong_dim(mine: int, its: int, dimension: str) -> str:
    if mine == its or (mine < its and dimension == "truncate") or (mine > its and dimension == "pad"):
        return ""
    how = "truncate" if mine < its else "pad"
    what = "its first columns" if mine < its else "the missing columns as of a new row"
    return f'give dimension = "{how}" to take {what}, with optimizer states as of new rows, or leave the table out'


def _found(
    kind: str, name: str, mine: Mapping[str, Any], old: str, its: Mapping[str, Any], path: str
) -> tuple[Any, Any]:
    if name not in mine:
        raise NotFound(f"warm start: the job has no {kind} {name!r}{_near(name, list(mine))}")
    if old not in its:
        raise NotFound(f"warm start: the checkpoint {path} has no {kind} {old!r}{_near(old, list(its))}")
    return mine[name], its[old]


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" There are: {_list(known)}"


def _list(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"
