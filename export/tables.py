# SPDX-License-Identifier: Apache-2.0
"""Rows of a checkpoint's tables as files that other programs read: Parquet, Arrow's own format, safetensors.

    key, weights                      of every row, block by block, keys ascending within a block
    state, counters                   beside them, if asked for: what training needs to go on

Invariant: each file of the checkpoint had the manifest's checksum before a row of it was written, and what is made has its name
only when all of it is there; a file or folder that is there already is never changed. One block is in memory at a time. One
thread.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock import __version__
from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.entry import BlockEntry
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.client.rows import RowsPart
from oarlock.embedding.lookup import counter_names
from oarlock.embedding.spec import TableSpec, to_json
from oarlock.export.publish import refuse_existing
from oarlock.export.rows_file import RowsFile
from oarlock.export.safetensors_file import SafetensorsFile
from oarlock.proto.errors import InvalidArgument, UnknownTable

FORMATS = ("parquet", "arrow", "safetensors")
# Rows are handed on in parts of about so many bytes.
PART_BYTES = 8 << 20

# Told of rows that are written, and of all.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Exported:
    """A file that was made."""

    table: str
    path: Path
    rows: int
    bytes: int


def chosen_tables(manifest: Manifest, names: Sequence[str]) -> list[TableSpec]:
    """Return the specs of the tables that are named, all if none is; UnknownTable says which there are."""
    specs = manifest.table_specs()
    for name in names:
        if name not in specs:
            have = ", ".join(specs) or "none"
            raise UnknownTable(f"this checkpoint has no table {name[:200]!r}; its tables are: {have}", table=name[:200])
    return [spec for spec in specs.values() if not names or spec.name in names]


def export_tables(
    store: Reading,
    manifest: Manifest,
    specs: Sequence[TableSpec],
    to: Path,
    format: str,
    *,
    whole: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Exported]:
    """Write the rows of tables: to the file ``to`` if it ends as the format's files do, else to a folder, a file for each table.

    ``whole``: optimizer state and counters as well. CorruptCheckpoint names a file that is not as it was written.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if not specs:
        raise InvalidArgument("this checkpoint has no tables")
    refuse_existing(to)
    work = _Work(store, manifest, whole, progress, specs)
    if to.suffix == f".{format}":
        if len(specs) > 1:
            raise InvalidArgument(
                f"{to} is one file, and there are {len(specs)} tables ({', '.join(s.name for s in specs)}): choose one with "
                "--table, or give a folder"
            )
        return [work.write(specs[0], to, format)]
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    partial.mkdir()
    try:
        made = [work.write(spec, partial / f"{spec.name}.{format}", format) for spec in specs]
        # Onto an empty folder that came meanwhile it goes, onto one with anything in it not.
        os.rename(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [Exported(one.table, to / one.path.name, one.rows, one.bytes) for one in made]


class _Work:
    """One export: what is read, and how far it is."""

    def __init__(
        self, store: Reading, manifest: Manifest, whole: bool, progress: Progress, specs: Sequence[TableSpec]
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._whole = whole
        self._progress = progress
        self._entries: dict[str, list[BlockEntry]] = {spec.name: [] for spec in specs}
        for entry in manifest.blocks:
            if entry.kind == "rows" and entry.name in self._entries:
                self._entries[entry.name].append(entry)
        store.check_sizes(manifest, [entry for entries in self._entries.values() for entry in entries])
        self._bytes = sum(entry.total_bytes for entries in self._entries.values() for entry in entries)
        self._done = 0

    def write(self, spec: TableSpec, path: Path, format: str) -> Exported:
        if format == "safetensors":
            rows = self._write_tensors(spec, path)
        else:
            with RowsFile(path, spec, self._facts(spec), whole=self._whole) as file:
                for part in self._parts(spec):
                    file.write(part)
            rows = file.rows
        return Exported(spec.name, path, rows, path.stat().st_size)

    def _facts(self, spec: TableSpec) -> dict[str, Any]:
        manifest = self._manifest
        facts = {"job": manifest.job, "run": manifest.run, "cut": manifest.cut, "seed": manifest.seed}
        return {**facts, "table": to_json(spec), "oarlock": __version__}

    def _parts(self, spec: TableSpec) -> Iterator[RowsPart]:
        for entry in self._entries[spec.name]:
            image = self._store.load_block(self._manifest, entry)
            width = 8 + 4 * (image.weights.shape[1] + image.state.shape[1] + image.counters.shape[1])
            rows = max(1, PART_BYTES // width)
            for begin in range(0, len(image.keys), rows):
                run = slice(begin, begin + rows)
                yield RowsPart(image.keys[run], image.weights[run], image.state[run], image.counters[run])
            self._done += entry.total_bytes
            self._progress(self._done, self._bytes)

    def _write_tensors(self, spec: TableSpec, path: Path) -> int:
        rows, state = 0, 0
        for entry in self._entries[spec.name]:
            # What the rows of a chain come to is known when it was merged.
            image = self._store.load_block(self._manifest, entry) if entry.base or self._whole else None
            rows += entry.rows if image is None else len(image.keys)
            state = state if image is None or not len(image.keys) else image.state.shape[1]
        tensors: dict[str, tuple[Any, tuple[int, ...]]] = {
            "keys": (np.uint64, (rows,)),
            "weights": (np.float32, (rows, spec.dim)),
        }
        counters = counter_names(spec) if self._whole else []
        if self._whole:
            tensors["state"] = (np.float32, (rows, state))
            tensors |= {name: (_counter_type(name), (rows,)) for name in counters}
        with SafetensorsFile(path, tensors, {"oarlock": json.dumps(self._facts(spec))}) as file:
            for part in self._parts(spec):
                file.write("keys", part.keys)
                file.write("weights", part.weights)
                if self._whole:
                    file.write("state", part.state)
                for position, name in enumerate(counters):
                    file.write(name, np.ascontiguousarray(part.counters[:, position]).view(_counter_type(name)))
        return rows


def _counter_type(name: str) -> Any:
    return np.float32 if name in ("shows", "clicks") else np.uint32


def dense_values(store: Reading, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Return the dense parameters of a checkpoint, in their shapes."""
    slices: dict[str, list[NDArray[np.float32]]] = {name: [] for name in manifest.dense_specs()}
    entries = [entry for entry in manifest.blocks if entry.kind == "dense"]
    store.check_sizes(manifest, entries)
    for entry in entries:  # those of a parameter ascend by block
        image: BlockImage = store.load_block(manifest, entry)
        slices[entry.name].append(image.weights.reshape(-1))
    specs = manifest.dense_specs()
    return {name: np.concatenate(parts).reshape(specs[name].shape) for name, parts in slices.items()}
