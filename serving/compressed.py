# SPDX-License-Identifier: Apache-2.0
"""A compressed checkpoint: the rows of one cut made smaller, for serving alone (`oarlock compress` writes it).

    compressed.json          what is here: format, form and file of each table, size and sha256 of every file, its own checksum
    tables/source.json       the manifest of the cut that it was made of, as it was
    tables/NAME.safetensors  keys: U64[n], rows: U8[n, bytes of a row], block after block; codebook: F32[lines, dim], if any
    cut-000012/dense-...     the dense parameters' files of that cut

Invariant: a folder that is open had a whole ``compressed.json``, and what is read of it has the checksum that stands
there; a format with another first number is refused. It has one cut, and rows of it can be looked up, not trained on. Any thread.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.checkpoint.cuts import split_cut
from oarlock.checkpoint.files import LocalFiles
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.reading import Reading
from oarlock.checkpoint.store import is_url, locate
from oarlock.embedding.frozen import FrozenBlock, FrozenTable
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.packed import FORMS, MIXED, NO_CODEBOOK, NO_STARTS, PQ, mixed_values, part_starts
from oarlock.embedding.pointer import kernel_array
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import CorruptCheckpoint, NotFound, PSError, VersionMismatch
from oarlock.serving.part import WHOLE, ModelPart
from oarlock.serving.tensor_file import corrupt, read_tensors

COMPRESSED, TABLES = "compressed.json", "tables"
SOURCE = f"{TABLES}/source.json"
FORMAT, VERSION = "oarlock-compressed", (1, 1)
_NOTHING = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class TableForm:
    """How a table is kept. ``method``: what was done; ``form``: of ``packed.FORMS``; ``block_rows``: rows of each block;
    ``parts``: of a product-quantised row; values of a mixed one.
    """

    method: str
    form: str
    file: str
    block_rows: tuple[int, ...]
    parts: int = 0

    def __post_init__(self) -> None:
        if any(type(n) is not int or not 0 <= n < 1 << 40 for n in (self.parts, *self.block_rows)):
            raise TypeError("a number of rows or parts is none")


class Compressed(Reading):
    """The compressed checkpoint in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalFiles(folder))
        self.folder = folder

    def cuts(self) -> list[int]:
        """Return the number of the cut that it was made of."""
        return [self.load_manifest().cut]

    def load_manifest(self, cut: int | None = None) -> Manifest:
        """Return the manifest of the cut that it was made of."""
        manifest = Manifest.decode(self.checked(SOURCE), file=SOURCE)
        if cut not in (None, manifest.cut):
            raise NotFound(f"{self.folder} was made of cut {manifest.cut}: there is no cut {cut} in it", cut=cut)
        return manifest

    def is_committed(self, cut: int) -> bool:
        return cut in self.cuts()

    def tables(self) -> dict[str, TableForm]:
        """Return how each table is kept."""
        try:
            told = self.document()["tables"]
            return {name: TableForm(**{**one, "block_rows": tuple(one["block_rows"])}) for name, one in told.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise corrupt(COMPRESSED, f"its tables are damaged: {error}") from None

    def document(self) -> dict[str, Any]:
        """Return ``compressed.json``, whose checksum fits and whose format is known."""
        try:
            found = json.loads((self.folder / COMPRESSED).read_bytes())
            checksum = found.pop("checksum")
            name, version = found["format"], found["format_version"]
        except FileNotFoundError:
            raise corrupt(COMPRESSED, "missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise corrupt(COMPRESSED, f"truncated or altered: {error}") from None
        if name != FORMAT or not isinstance(version, str) or version.split(".")[0] != str(VERSION[0]):
            raise VersionMismatch(
                f"{self.folder / COMPRESSED}: {name} {version}; this Oarlock reads {FORMAT} {VERSION[0]}: compress the cut anew"
            )
        if checksum != checksum_of(found):
            raise corrupt(COMPRESSED, "altered: its checksum does not fit")
        return dict(found)

    def checked(self, name: str, *, trust: bool = False, mapped: bool = False) -> Any:
        """Return the bytes of a file, which are as they were written; ``trust``: as many, at least; ``mapped``: in place."""
        try:
            told = self.document()["files"][name]
            size, digest = told["bytes"], told["sha256"]
        except (KeyError, TypeError):
            raise corrupt(COMPRESSED, f"it does not know {name}") from None
        try:
            data = self.files.map_file(name) if trust or mapped else self.files.read_file(name)
            data = self.files.read_file(name) if data is None else data
        except OSError as error:
            raise corrupt(name, f"cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise corrupt(name, f"it has {len(data)} of {size} bytes")
        if not trust and hashlib.sha256(data).hexdigest() != digest:
            raise corrupt(name, "altered: its checksum does not fit")
        return data

    def open_table(
        self, name: str, spec: TableSpec, seed: int, *, trust: bool = False, part: ModelPart = WHOLE
    ) -> FrozenTable:
        """Return a table to be looked up; blocks of other parts than ``part`` are empty."""
        kept = self.tables().get(name)
        if kept is None or kept.form not in FORMS or len(kept.block_rows) != spec.blocks:
            raise corrupt(COMPRESSED, f"table {name} is not told whole")
        data = read_tensors(self.checked(kept.file, trust=trust, mapped=not part.whole), kept.file)
        try:
            keys, rows = data["keys"], data["rows"]
            if (keys.ndim, rows.ndim) != (1, 2):
                raise corrupt(kept.file, f"its keys are {list(keys.shape)}, its rows {list(rows.shape)}")
            blocks, begin = [], 0
            for number, count in enumerate(kept.block_rows):
                run = slice(begin, begin := begin + count)
                if part.whole:
                    own = (keys[run], rows[run])
                else:
                    # Copied, so that the file's memory goes.
                    run, count = (run, count) if part.has(number) else (slice(0, 0), 0)
                    own = (keys[run].copy(), rows[run].copy())
                _check_block(spec, number, own[0], count)
                blocks.append(FrozenBlock(spec, own[0], _NOTHING, _NOTHING, packed=own[1]))
            if begin != len(keys):
                raise corrupt(kept.file, f"its blocks have {begin} rows, its keys are {len(keys)}")
            code = FORMS.index(kept.form)
            starts = NO_STARTS
            if code in WITH_CODEBOOK:
                starts = part_starts(spec.dim, kept.parts) if code == PQ else mixed_values(kept.parts, spec.dim)
            return FrozenTable(
                spec,
                blocks,
                seed=seed,
                code=code,
                codebook=data["codebook"] if code in WITH_CODEBOOK else NO_CODEBOOK,
                starts=starts,
            )
        except KeyError as error:
            raise corrupt(kept.file, f"it has no {error}") from None
        except PSError as error:
            raise error if isinstance(error, CorruptCheckpoint) else corrupt(kept.file, error.message) from None


WITH_CODEBOOK = (PQ, MIXED)


def _check_block(spec: TableSpec, number: int, keys: Any, count: int) -> None:
    """Raise unless keys are a block's, each once: what an index of them is made by trusts that."""
    if len(keys) != count or keys.dtype != np.uint64 or (keys[1:] <= keys[:-1]).any():
        raise corrupt(spec.name, f"keys of block {number} are not {count}, ascending")
    own = np.empty(count, np.int32)
    blocks_of(kernel_array("keys", keys, np.uint64), table_salt(spec.name), spec.blocks.bit_length() - 1, own)
    if (own != number).any():
        raise corrupt(spec.name, f"keys of another block are in block {number}")


def checksum_of(document: dict[str, Any]) -> str:
    """Return the checksum of ``compressed.json`` without it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def locate_served(path: str) -> tuple[Reading, int | None]:
    """Return what a path or URL means that is to be served, and the cut if it names one: checkpoints, or a compressed one."""
    if not is_url(path):
        folder, cut = (path, None) if Path(path).is_dir() else split_cut(path)
        if (Path(folder) / COMPRESSED).is_file():
            return Compressed(Path(folder)), cut
    return locate(path)
