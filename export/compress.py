# SPDX-License-Identifier: Apache-2.0
"""Tables of a checkpoint made smaller for serving: what `oarlock compress` does, and what it costs.

    int8     a byte a weight, a float32 scale a row
    int4     half a byte a weight, a float32 scale a row
    pq       product quantisation: a row is cut into parts, each the nearest of 256 vectors that k-means found; a byte a part
    prune    only the rows that say most: those farthest from what their key would read as without a row

Invariant: what is written is whole under its name or not there (``serving/compressed.py`` reads it); the checkpoint is read
under its checksums and not changed. A table is in memory as it is packed, with one block of float32 beside it. One thread.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.embedding.frozen import FrozenBlock, FrozenTable, stored_code
from oarlock.embedding.packed import (
    FORMS,
    INT4,
    PQ,
    pack_int4,
    pack_int8,
    pack_pq,
    part_starts,
    row_bytes,
)
from oarlock.embedding.precision import INT8
from oarlock.embedding.spec import TableSpec
from oarlock.export.codebook import train_codebook
from oarlock.export.publish import refuse_existing
from oarlock.export.safetensors_file import SafetensorsFile
from oarlock.export.tables import Progress, chosen_tables
from oarlock.proto.errors import InvalidArgument
from oarlock.serving.compressed import COMPRESSED, FORMAT, SOURCE, TABLES, VERSION, Compressed, TableForm, checksum_of

METHODS = ("int8", "int4", "pq", "prune")
NONE = "none"
# Rows that a codebook is made from.
SAMPLE_ROWS = 65_536


@dataclass(frozen=True)
class Method:
    """What is done to a table. ``parts``: bytes of a row under pq, 0: a quarter of the dim; ``keep``: the share of rows that
    prune leaves.
    """

    name: str
    parts: int = 0
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in (*METHODS, NONE):
            raise InvalidArgument(f"method {self.name!r}: choose one of {', '.join(METHODS)}")
        if not 0 < self.keep <= 1:
            raise InvalidArgument(f"keep = {self.keep}: give a share from above 0 to 1")
        if self.parts < 0:
            raise InvalidArgument(f"parts = {self.parts}: give an integer from 1 to the dim of the table")


def compress(
    store: Reading,
    manifest: Manifest,
    methods: Mapping[str, Method],
    to: Path,
    *,
    progress: Progress = lambda done, total: None,
) -> Compressed:
    """Write the folder ``to``: each table of ``methods`` compressed so, other ones as they are. Return what was written."""
    chosen_tables(manifest, list(methods))
    refuse_existing(to)
    specs = manifest.table_specs()
    for name, method in methods.items():
        if method.name == "pq":
            part_starts(specs[name].dim, _parts(method, specs[name]))
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    (partial / TABLES).mkdir(parents=True)
    try:
        work = _Work(store, manifest, progress)
        tables = {name: work.write(spec, methods.get(name, Method(NONE)), partial) for name, spec in specs.items()}
        (partial / SOURCE).write_bytes(manifest.encode())
        _copy_dense(store, manifest, partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        document: dict[str, Any] = {
            "format": FORMAT,
            "format_version": ".".join(map(str, VERSION)),
            "tables": {name: {**asdict(form), "block_rows": list(form.block_rows)} for name, form in tables.items()},
            "files": {path.relative_to(partial).as_posix(): _told(path) for path in files},
        }
        text = json.dumps({**document, "checksum": checksum_of(document)}, indent=1)
        (partial / COMPRESSED).write_text(text, encoding="ascii")
        # Folders too: their names of the files.
        for path in [*partial.rglob("*"), partial]:
            _make_durable(path)
        os.rename(partial, to)
        _make_durable(to.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Compressed(to)


def _told(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_dense(store: Reading, manifest: Manifest, folder: Path) -> None:
    """Write the dense parameters' files again, the same bytes under the same names."""
    for entry in manifest.blocks:
        if entry.kind == "dense":
            store.load_block(manifest, entry)  # under its checksum
            for file in entry.links[-1].files:
                target = folder / file.path
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(bytes(store.files.read_file(file.path)))


def _parts(method: Method, spec: TableSpec) -> int:
    return method.parts or max(1, spec.dim // 4)


class _Work:
    """One compression: what is read, and how far it is."""

    def __init__(self, store: Reading, manifest: Manifest, progress: Progress) -> None:
        self._store = store
        self._manifest = manifest
        self._progress = progress
        entries = [entry for entry in manifest.blocks if entry.kind == "rows"]
        store.check_sizes(manifest, entries)
        self._total = sum(entry.total_bytes for entry in entries)
        self._done = 0

    def _images(self, spec: TableSpec, *, last: bool = True) -> Iterator[BlockImage]:
        for entry in self._manifest.blocks:
            if entry.kind == "rows" and entry.name == spec.name:
                yield self._store.load_block(self._manifest, entry)
                if last:
                    self._done += entry.total_bytes
                    self._progress(self._done, self._total)

    def write(self, spec: TableSpec, method: Method, folder: Path) -> TableForm:
        """Write a table's file; return how it is kept."""
        code = {"int8": INT8, "int4": INT4, "pq": PQ}.get(method.name, stored_code(spec))
        parts = _parts(method, spec) if code == PQ else 0
        codebook = train_codebook(self._sample(spec), parts) if code == PQ else None
        least = self._least(spec, method.keep) if method.name == "prune" else None
        keys, rows, counts = [], [], []
        for image in self._images(spec):
            own, weights, state = image.keys, image.weights, image.state
            if least is not None:
                kept = _change(spec, self._manifest.seed, own, weights) >= least
                own, weights, state = own[kept], weights[kept], state[kept]
            keys.append(own.copy())
            counts.append(len(own))
            if code == PQ and codebook is not None:
                rows.append(pack_pq(weights, codebook, parts))
            elif method.name in ("int8", "int4"):
                rows.append(pack_int8(weights) if code == INT8 else pack_int4(weights))
            else:
                rows.append(FrozenBlock(spec, own, weights, state).stored.copy())
        n, size = sum(counts), row_bytes(code, spec.dim, parts)
        tensors: dict[str, Any] = {"keys": (np.uint64, (n,)), "rows": (np.uint8, (n, size))}
        if codebook is not None:
            # Before the rows, whose end may lie anywhere.
            tensors = {"keys": tensors["keys"], "codebook": (np.float32, codebook.shape), "rows": tensors["rows"]}
        name = f"{TABLES}/{spec.name}.safetensors"
        with SafetensorsFile(folder / name, tensors, {"form": FORMS[code]}) as file:
            for one, packed in zip(keys, rows, strict=True):
                file.write("keys", one)
                file.write("rows", packed)
            if codebook is not None:
                file.write("codebook", codebook)
        return TableForm(method.name, FORMS[code], name, tuple(counts), parts)

    def _sample(self, spec: TableSpec) -> NDArray[np.float32]:
        """Return rows of all blocks, as many of each as it has a share of all."""
        total = sum(len(image.keys) for image in self._images(spec, last=False))
        rng = np.random.default_rng(0)
        found = [np.empty((0, spec.dim), np.float32)]
        for image in self._images(spec, last=False):
            n = len(image.keys)
            take = n if total <= SAMPLE_ROWS else min(n, n * SAMPLE_ROWS // total + 1)
            found.append(image.weights[rng.permutation(n)[:take]])
        return np.concatenate(found)

    def _least(self, spec: TableSpec, keep: float) -> np.float32:
        """Return the change that the rows have at least which are the share ``keep`` of all."""
        found = [_change(spec, self._manifest.seed, i.keys, i.weights) for i in self._images(spec, last=False)]
        changes = np.sort(np.concatenate(found))
        return np.float32(changes[len(changes) - max(1, round(keep * len(changes)))]) if len(changes) else np.float32(0)


def _change(spec: TableSpec, seed: int, keys: NDArray[np.uint64], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how far each row is from what its key reads as without a row: float32[n]."""
    none = np.empty(0, np.uint64), np.empty((0, spec.dim), np.float32), np.empty((0, 1), np.float32)
    bare = FrozenTable(spec, [FrozenBlock(spec, *none) for _ in range(spec.blocks)], seed=seed)
    first = np.empty_like(weights)
    bare.lookup(keys, first)
    change: NDArray[np.float32] = np.sqrt(np.square(weights - first).sum(axis=1))
    return change


@dataclass(frozen=True)
class Cost:
    """Of a table as it is served: bytes of its rows and of all, and microseconds of a look-up of 1,000 of its keys."""

    rows: int
    row_bytes: int
    bytes: int
    lookup_us: float


def cost(table: FrozenTable, *, turns: int = 15) -> Cost:
    """Measure a table; the median of some look-ups."""
    rng = np.random.default_rng(0)
    have = [block.keys for block in table.blocks if block.rows]
    some = np.concatenate(have) if have else np.zeros(1, np.uint64)
    times = []
    for _ in range(turns):
        keys = rng.choice(some, 1000)
        out = np.empty((1000, table.spec.dim), np.float32)
        begun = time.perf_counter()
        table.lookup(keys, out)
        times.append(time.perf_counter() - begun)
    return Cost(table.rows, table.row_bytes, table.nbytes, float(np.median(times)) * 1e6)
