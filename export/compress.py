# SPDX-License-Identifier: Apache-2.0
"""Tables of a checkpoint made smaller for serving: what `oarlock compress` does, and what it costs.

    int8     a byte a weight, a float32 scale a row
    int4     half a byte a weight, a float32 scale a row
    pq       product quantisation: a row is cut into parts, each the nearest of 256 vectors that k-means found; a byte a part
    mixed    the rows that count most as they are, of the others fewer values, from which a matrix makes what is nearest to them
    prune    only the rows that count most: those farthest from what their key would read as without a row

Invariant: what is written is whole under its name or not there (``serving/compressed.py`` reads it); the checkpoint is read
under its checksums and not changed. A table is in memory as it is packed, with one block of float32 beside it. One thread.
"""

import contextlib
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
from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.checkpoint.transforms_file import read_transforms, write_transforms
from oarlock.embedding.frozen import FrozenBlock, FrozenTable, stored_code
from oarlock.embedding.packed import FORMS, INT4, MIXED, PQ, pack_int4, pack_int8, pack_mixed, pack_pq, row_bytes
from oarlock.embedding.precision import INT8
from oarlock.embedding.spec import TableSpec
from oarlock.export.codebook import train_codebook
from oarlock.export.lines import fit_lines
from oarlock.export.method import NONE, SHARES, Method
from oarlock.export.publish import refuse_existing
from oarlock.export.ranking import chosen, ranks_of
from oarlock.export.safetensors_file import SafetensorsFile
from oarlock.export.tables import Progress, chosen_tables
from oarlock.proto.errors import NotFound
from oarlock.serving.compressed import COMPRESSED, FORMAT, SOURCE, TABLES, VERSION, Compressed, TableForm, checksum_of

# Rows that a codebook is made from.
SAMPLE_ROWS = 65_536
_CODES = {"int8": INT8, "int4": INT4, "pq": PQ, "mixed": MIXED}
_Arrays = tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.float32]]
_Best = NDArray[np.bool_] | None


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
        method.check(specs[name])
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    (partial / TABLES).mkdir(parents=True)
    try:
        work = _Work(store, manifest, progress)
        tables = {name: work.write(spec, methods.get(name, Method(NONE)), partial) for name, spec in specs.items()}
        (partial / SOURCE).write_bytes(manifest.encode())
        _copy_dense(store, manifest, partial)
        _copy_transforms(store, manifest, partial)
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


def _copy_transforms(store: Reading, manifest: Manifest, folder: Path) -> None:
    """Take along what raw rows are turned into inputs with, where the checkpoint has it."""
    with contextlib.suppress(NotFound):
        write_transforms(LocalFiles(folder), read_transforms(store.files, manifest))


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

    def _runs(self, spec: TableSpec, best: _Best, *, last: bool = False) -> Iterator[tuple[_Arrays, NDArray[np.bool_]]]:
        """Go through keys, weights and state of the blocks, each with what ``best`` says of its rows."""
        begin = 0
        for image in self._images(spec, last=last):
            end = begin + len(image.keys)
            yield (
                (image.keys, image.weights, image.state),
                (np.ones(len(image.keys), np.bool_) if best is None else best[begin:end]),
            )
            begin = end

    def _best(self, spec: TableSpec, method: Method) -> _Best:
        """Return which rows, block after block, a method keeps: bool[rows]; None: it does not choose."""
        if method.name not in SHARES:
            return None
        by, seed = method.rank_of(spec), self._manifest.seed
        found = [ranks_of(spec, by, image, seed) for image in self._images(spec, last=False)]
        return chosen(np.concatenate([*found, np.empty(0)]), method.share)

    def write(self, spec: TableSpec, method: Method, folder: Path) -> TableForm:
        """Write a table's file; return how it is kept."""
        code = _CODES.get(method.name, stored_code(spec))
        parts = method.parts_of(spec)
        best = self._best(spec, method)
        # What rows are made of again: all of it stands before the rows.
        codebook = []
        if code == PQ:
            codebook = [train_codebook(self._sample(spec), parts)]
        elif code == MIXED:
            others = (weights[~mine] for (_, weights, _), mine in self._runs(spec, best))
            codebook = [fit_lines(others, spec.dim, parts)]
        keys, rows, counts = [], [], []
        whole = 0
        for (own, weights, state), mine in self._runs(spec, best, last=True):
            if method.name == "prune":
                own, weights, state = own[mine], weights[mine], state[mine]
            keys.append(own.copy())
            counts.append(len(own))
            if code == PQ:
                rows.append(pack_pq(weights, codebook[0], parts))
            elif code == MIXED:
                rows.append(pack_mixed(weights, mine, codebook[0], whole))
                codebook.append(weights[mine])
                whole += len(codebook[-1])
            elif method.name in ("int8", "int4"):
                rows.append(pack_int8(weights) if code == INT8 else pack_int4(weights))
            else:
                rows.append(FrozenBlock(spec, own, weights, state).stored.copy())
        n, size = sum(counts), row_bytes(code, spec.dim, parts)
        tensors: dict[str, Any] = {"keys": (np.uint64, (n,)), "rows": (np.uint8, (n, size))}
        if codebook:
            # Before the rows, whose end may lie anywhere.
            lines = sum(map(len, codebook))
            tensors = {"keys": tensors["keys"], "codebook": (np.float32, (lines, spec.dim)), "rows": tensors["rows"]}
        name = f"{TABLES}/{spec.name}.safetensors"
        with SafetensorsFile(folder / name, tensors, {"form": FORMS[code]}) as file:
            for one, packed in zip(keys, rows, strict=True):
                file.write("keys", one)
                file.write("rows", packed)
            for each in codebook:
                file.write("codebook", each)
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


@dataclass(frozen=True)
class Cost:
    """Of a table as it is served: bytes of a row, of the values of all rows, and of all with keys and index; microseconds of a
    look-up of 1,000 of its keys."""

    rows: int
    row_bytes: int
    values_bytes: int
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
    return Cost(table.rows, table.row_bytes, table.values_bytes, table.nbytes, float(np.median(times)) * 1e6)
