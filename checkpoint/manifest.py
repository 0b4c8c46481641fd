# SPDX-License-Identifier: Apache-2.0
"""The manifest: everything that a committed cut says about itself, as one JSON file with a checksum.

Invariant: a Manifest that exists is whole: it names every block of every spec exactly once, under distinct plain file
names, and decoding what it encodes returns an equal one. A file that differs in one bit from what ``encode`` wrote is
refused. Immutable; from any thread.
"""

import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Self

from oarlock.checkpoint.entry import BlockEntry as BlockEntry
from oarlock.checkpoint.entry import Link
from oarlock.checkpoint.format import (
    CHAINS,
    MANIFEST,
    check_count,
    check_format,
    cut_folder,
    format_text,
    unreadable,
)
from oarlock.embedding.spec import DenseSpec, TableSpec, dense_from_json, table_from_json
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, SpecMismatch

_JOB = re.compile(r"[0-9a-f]{32}")
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class ClosedSet:
    """The finished splits: all below ``floor``, and those listed in ``above``. Equal sets are equal objects."""

    floor: int = 0
    above: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        floor = check_count("closed.floor", self.floor)
        above = sorted(split for split in {check_count("closed.above", n) for n in self.above} if split >= floor)
        done = 0
        while done < len(above) and above[done] == floor:
            floor, done = floor + 1, done + 1
        object.__setattr__(self, "floor", floor)
        object.__setattr__(self, "above", tuple(above[done:]))

    def __contains__(self, split: int) -> bool:
        return split < self.floor or split in self.above


@dataclass(frozen=True)
class Manifest:
    """One cut of a job.

    ``tables`` and ``dense`` are specs as ``embedding.spec.to_json`` gives them; ``config``, ``metrics`` and ``best``
    are JSON objects (in the latter two a number that is not finite becomes null); ``files`` is the job's list of data
    files; ``created`` is UTC as ISO 8601. Marks are in the block files.
    """

    job: str
    run: int
    cut: int
    created: str
    seed: int
    tables: tuple[dict[str, Any], ...]
    dense: tuple[dict[str, Any], ...]
    recipe: str
    config: dict[str, Any]
    files: tuple[Any, ...]
    closed: ClosedSet
    open_splits: tuple[int, ...]
    epoch: int
    step: int
    metrics: dict[str, Any]
    best: dict[str, Any]
    blocks: tuple[BlockEntry, ...]
    format_version: str = field(default_factory=format_text)

    def __post_init__(self) -> None:
        version = check_format(self.format_version, MANIFEST)
        if not isinstance(self.job, str) or not _JOB.fullmatch(self.job):
            raise InvalidArgument(f"job {self.job!r}: give 32 small hex digits")
        for name in ("run", "cut", "epoch", "step"):
            check_count(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"seed = {self.seed!r}: give an integer from 0 to 2^64 - 1")
        if not isinstance(self.recipe, str):
            raise InvalidArgument(f"recipe = {self.recipe!r}: give a string")
        _check_time(self.created)
        for name in ("config", "metrics", "best"):
            value = _plain(name, getattr(self, name), nan_is_null=name != "config")
            if not isinstance(value, dict):
                raise InvalidArgument(f"{name}: give an object, not {type(value).__name__}")
            object.__setattr__(self, name, value)
        for name in ("tables", "dense", "files"):
            object.__setattr__(self, name, tuple(_plain(name, list(getattr(self, name)), nan_is_null=False)))
        opened = tuple(sorted({check_count("open_splits", split) for split in self.open_splits}))
        if both := [split for split in opened if split in self.closed]:
            raise InvalidArgument(f"split {both[0]} is in open_splits and in closed")
        object.__setattr__(self, "open_splits", opened)
        own = cut_folder(self.cut)
        known = (entry if entry.folder else replace(entry, folder=own) for entry in self.blocks)
        blocks = tuple(sorted(known, key=lambda entry: (entry.kind, entry.name, entry.block)))
        object.__setattr__(self, "blocks", blocks)
        _check_blocks(self.table_specs(), self.dense_specs(), blocks)
        _check_chains(self.cut, version, blocks)

    def table_specs(self) -> dict[str, TableSpec]:
        """Return the tables' specs by name."""
        return dict(self._specs[0])

    def dense_specs(self) -> dict[str, DenseSpec]:
        """Return the dense parameters' specs by name."""
        return dict(self._specs[1])

    @cached_property
    def _specs(self) -> tuple[dict[str, TableSpec], dict[str, DenseSpec]]:
        tables = _by_name("table", [table_from_json(values) for values in self.tables])
        return tables, _by_name("dense parameter", [dense_from_json(values) for values in self.dense])

    def encode(self) -> bytes:
        """Return the file's bytes: ASCII JSON, one field a line, lists of objects one object a line."""
        document: dict[str, Any] = {"format_version": self.format_version}
        document |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in document}
        document["closed"] = {"floor": self.closed.floor, "above": self.closed.above}
        document["blocks"] = [_entry_fields(entry, cut_folder(self.cut)) for entry in self.blocks]
        document[_CHECKSUM] = _checksum(document)
        return _render(document)

    @classmethod
    def decode(cls, data: bytes, *, file: str = MANIFEST) -> Self:
        """Return the Manifest that a file's bytes hold; CorruptCheckpoint or VersionMismatch name ``file``."""
        document = _document(data, file)
        version = check_format(document.get("format_version"), file)
        known = {f.name for f in fields(cls)}
        problems = [f"the field {name!r} is unknown" for name in sorted(document.keys() - known)]
        problems += [f"the field {name!r} is missing" for name in sorted(known - document.keys())]
        if problems:
            raise unreadable(file, version, problems[0])
        try:
            document["closed"] = _object("closed", ClosedSet, document["closed"])
            document["blocks"] = tuple(_object("a block", BlockEntry, entry) for entry in document["blocks"])
            return cls(**document)
        except (InvalidArgument, TypeError) as error:
            raise unreadable(file, version, str(error)) from None


def _document(data: bytes, file: str) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("ascii"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file}: truncated or altered: {error}", file=file) from None
    if not isinstance(document, dict):
        raise CorruptCheckpoint(f"{file}: altered: no JSON object", file=file)
    checksum = document.pop(_CHECKSUM, None)
    if checksum is None or checksum != _checksum(document):
        raise CorruptCheckpoint(f"{file}: altered: its checksum is missing or does not fit", file=file)
    # Some changes leave the values as they are ("1e-8" and "1E-8"); nothing but the bytes as written is accepted.
    if _render({**document, _CHECKSUM: checksum}) != data:
        raise CorruptCheckpoint(f"{file}: altered: not in the form in which manifests are written", file=file)
    return document


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(_compact(document).encode()).hexdigest()


def _render(document: dict[str, Any]) -> bytes:
    lines = []
    for name, value in document.items():
        if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            text = "[\n" + ",\n".join(_compact(item) for item in value) + "\n]"
        else:
            text = _compact(value)
        lines.append(f"{json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON value")


def _entry_fields(entry: BlockEntry, own: str) -> dict[str, Any]:
    """Return an entry's fields; one at its default is left out, as whoever does not know it has it."""
    values = {name: value for name, value in asdict(entry).items() if value != _DEFAULTS[name]}
    if entry.folder == own:
        values.pop("folder")
    if entry.base:
        values["base"] = [{n: v for n, v in link.items() if v != _DEFAULTS[n]} for link in values["base"]]
    return values


_DEFAULTS = {f.name: f.default for f in (*fields(Link), *fields(BlockEntry))}


def _object(owner: str, kind: type, values: object) -> Any:
    known = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING or kind is ClosedSet}
    if not isinstance(values, dict) or not needed <= values.keys() <= known:
        found = f"the fields {', '.join(sorted(values))}" if isinstance(values, dict) else type(values).__name__
        raise InvalidArgument(f"{owner} has {found}: expected {', '.join(f.name for f in fields(kind))}")
    return kind(**values)


def _plain(name: str, value: Any, nan_is_null: bool) -> Any:
    """Return ``value`` as JSON gives it back: a deep copy without tuples."""
    try:
        return json.loads(json.dumps(_finite(value) if nan_is_null else value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} has no JSON form: {error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _check_time(created: object) -> None:
    try:
        offset = datetime.fromisoformat(created).utcoffset() if isinstance(created, str) else None
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise InvalidArgument(f"created = {created!r}: give UTC as ISO 8601, such as 2026-01-31T12:00:00Z")


def _by_name(kind: str, specs: list[Any]) -> dict[str, Any]:
    out = {spec.name: spec for spec in specs}
    if len(out) != len(specs):
        raise SpecMismatch(f"two specs of one {kind}: {', '.join(spec.name for spec in specs)}")
    return out


def _check_blocks(tables: dict[str, TableSpec], dense: dict[str, DenseSpec], blocks: tuple[BlockEntry, ...]) -> None:
    specs: dict[tuple[str, str], TableSpec | DenseSpec] = {("rows", name): spec for name, spec in tables.items()}
    specs |= {("dense", name): spec for name, spec in dense.items()}
    expected = dict.fromkeys(specs, 0)
    names: set[str] = set()
    for entry in blocks:  # sorted, so the blocks of one spec count up from 0
        spec = specs.get((entry.kind, entry.name))
        if spec is None or entry.block >= spec.blocks:
            raise SpecMismatch(f"{entry.where}: the specs have no such block", name=entry.name, block=entry.block)
        due = expected[entry.kind, entry.name]
        if entry.block != due:
            twice = "twice" if entry.block < due else f"but not block {due}"
            raise SpecMismatch(f"{entry.where} is named, {twice}", name=entry.name, block=min(entry.block, due))
        expected[entry.kind, entry.name] = due + 1
        if isinstance(spec, DenseSpec) and entry.rows != min(spec.slice, spec.size - spec.slice * entry.block):
            raise SpecMismatch(f"{entry.where}: {entry.rows} values are not its slice", name=entry.name)
        for link in entry.links:
            for file in link.files:
                if file.path in names:
                    raise SpecMismatch(f"{entry.where}: another block has the file {file.path}", name=entry.name)
                names.add(file.path)
    for key, count in expected.items():
        if count != specs[key].blocks:
            kind = "table" if key[0] == "rows" else "dense parameter"
            raise SpecMismatch(f"{kind} {key[1]}: block {count} is not named", name=key[1], block=count)


def _check_chains(cut: int, version: tuple[int, int], blocks: tuple[BlockEntry, ...]) -> None:
    for entry in blocks:
        if entry.links[-1].number > cut:
            raise InvalidArgument(f"{entry.where}: it is in {entry.folder}, which is newer than cut {cut}")
        if version < CHAINS and (entry.base or entry.folder != cut_folder(cut)):
            raise InvalidArgument(
                f"{entry.where}: files of other cuts came with format {format_text(CHAINS)}, the manifest says "
                f"{format_text(version)}"
            )
