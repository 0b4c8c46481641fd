# SPDX-License-Identifier: Apache-2.0
"""A frozen table: the rows of a cut, to be looked up and never changed.

Invariant: nothing changes after it was made, so any thread may look up, any number at once. A key that has no row reads as it
does in training: its first value, or zeros, by the table's spec and the job's seed. What a block's rows lie in (a file that is
mapped, or memory of its own) is kept as long as the block; a block may be in several tables, as one that two cuts share is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.frozen_kernels import (
    BLOCK_BITS,
    BLOCK_WORDS,
    BLOCKS,
    CODE,
    CODEBOOK,
    CODES,
    CONSTANTS,
    DIM,
    ENDS,
    ENTRIES,
    KEYS,
    ORIGIN,
    PARTS,
    PLACES,
    ROW_BITS,
    ROW_BYTES,
    ROWS,
    SALT,
    SCRATCH_WORDS,
    STARTS,
    TABLE_WORDS,
    fill_index,
    look_up,
    store_rows,
    touch,
)
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.initial import constants, origin
from oarlock.embedding.packed import FORMS, LINES, MIXED, NO_CODEBOOK, NO_STARTS, PQ, check_mixed, row_bytes
from oarlock.embedding.pointer import address_of, check_output, kernel_array, plain_array
from oarlock.embedding.precision import FLOAT32, INT8, precision_code, weight_bytes
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed

# Of 100 places of an index so many are taken.
LOAD = 70
# A place is found by 32 bits of a key's mix.
MAX_ROWS = 1 << 31


class FrozenBlock:
    """One block's rows: keys: uint64[n], distinct, and weights: float32[n, dim], which must not change any more.

    ``state``: float32[n, s], the optimizer's; of an int8 table its last column is the scale. Rows of a table that stores less
    than float32 are kept as the table stores them, which is exact; others stay where they are. ``packed``: instead of weights,
    rows: uint8[n, bytes of a row] in the form of ``embedding/packed.py``.
    """

    def __init__(
        self,
        spec: TableSpec,
        keys: NDArray[np.uint64],
        weights: NDArray[np.float32],
        state: NDArray[np.float32],
        *,
        packed: NDArray[np.uint8] | None = None,
    ) -> None:
        keys = kernel_array("keys", keys, np.uint64)
        n = len(keys)
        if packed is None:
            weights = kernel_array("weights", weights, np.float32, 2)
            if weights.shape != (n, spec.dim) or len(state) != n:
                raise Malformed(
                    f"table {spec.name}: {n} keys, weights of {list(weights.shape)} and {len(state)} states"
                )
        elif packed.dtype != np.uint8 or packed.ndim != 2 or len(packed) != n or not packed.flags.c_contiguous:
            raise Malformed(f"table {spec.name}: {n} keys, packed rows of {packed.dtype}{list(packed.shape)}")
        if n >= MAX_ROWS:
            raise InvalidArgument(f"table {spec.name}: {n} rows in one block: give it more blocks")
        code = stored_code(spec)
        self._keys = keys
        self._rows: NDArray[np.float32] | NDArray[np.uint8] = weights
        if packed is not None or code != FLOAT32:
            self._rows = packed if packed is not None else stored_rows(spec, weights, state)
        places = n + 1 if n < 4 else n * 100 // LOAD + 1
        self._entries: NDArray[np.uint32] = np.zeros(places, np.uint32)
        self.rows = n
        bits = n.bit_length()
        fill_index(address_of(keys), n, table_salt(spec.name), address_of(self._entries), places, bits)
        self.descriptor: NDArray[np.int64] = np.zeros(BLOCK_WORDS, np.int64)
        self.descriptor[ENTRIES] = address_of(self._entries)
        self.descriptor[PLACES] = places
        self.descriptor[KEYS] = address_of(keys)
        self.descriptor[ROWS] = address_of(self._rows)
        self.descriptor[ROW_BITS] = bits

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The keys of its rows, uint64[n]."""
        return self._keys

    @property
    def stored(self) -> NDArray[np.uint8]:
        """Its rows as they lie, uint8[n, bytes of a row]."""
        return self._rows.view(np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, rows and index."""
        return self._keys.nbytes + self._rows.nbytes + self._entries.nbytes

    def touch(self) -> None:
        """Have all of it in memory: pages of a file that is mapped come when they are first read."""
        for array in (self._keys, self._rows):
            touch(address_of(array), array.nbytes)


class FrozenTable:
    """A table of ``spec`` whose blocks, all of them in order, are ``blocks``. ``seed``: the job's.

    ``code``: in which form of ``embedding/packed.py`` its blocks are packed, if not in the spec's; ``codebook`` and ``starts``:
    of product-quantised or mixed rows.
    """

    def __init__(
        self,
        spec: TableSpec,
        blocks: Sequence[FrozenBlock],
        *,
        seed: int,
        code: int | None = None,
        codebook: NDArray[np.float32] = NO_CODEBOOK,
        starts: NDArray[np.int64] = NO_STARTS,
    ) -> None:
        if len(blocks) != spec.blocks:
            raise InvalidArgument(f"table {spec.name} has {spec.blocks} blocks, {len(blocks)} were given")
        self.spec = spec
        self.blocks = tuple(blocks)
        self.rows = sum(block.rows for block in blocks)
        self.nbytes = sum(block.nbytes for block in blocks)
        code = stored_code(spec) if code is None else code
        size = row_bytes(code, spec.dim, len(starts) - 1)
        if wrong := [block for block in blocks if block.rows and block.stored.shape[1] != size]:
            raise Malformed(f"table {spec.name}: rows of {wrong[0].stored.shape[1]} bytes for {size} as {FORMS[code]}")
        if code == PQ and codebook.shape != (LINES, spec.dim):
            raise Malformed(f"table {spec.name}: a codebook of {list(codebook.shape)} for [{LINES}, {spec.dim}]")
        if code == MIXED:
            values = len(starts) - 1
            if codebook.ndim != 2 or codebook.shape[1] != spec.dim or len(codebook) < values:
                raise Malformed(
                    f"table {spec.name}: lines of {list(codebook.shape)} for {values} values and dim {spec.dim}"
                )
            for block in blocks:
                check_mixed(block.stored, len(codebook) - values)
        self.form = FORMS[code]
        self.row_bytes = size
        self._codebook = kernel_array("codebook", codebook, np.float32, 2)
        if codebook is not NO_CODEBOOK:
            self.nbytes += self._codebook.nbytes
        # Of all rows: values, scales and codes, and those of mixed dimensions that are kept whole.
        self.values_bytes = self.rows * size + (self._codebook.nbytes if code == MIXED else 0)
        self._starts = kernel_array("starts", starts, np.int64)
        self._descriptors = np.stack([block.descriptor for block in blocks])
        self._words = TableWords(spec, seed, self._descriptors)
        self._words.pack(code, size, self._codebook, self._starts)

    def lookup(self, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> int:
        """Write the weights of keys: uint64[n], in any order and repeated at will, to out: float32[n, dim].

        Return how many of them have no row.
        """
        keys = checked_keys(self.spec, keys, out)
        scratch = np.empty(SCRATCH_WORDS, np.int64)
        return int(look_up(self._words.address, address_of(keys), len(keys), address_of(out), address_of(scratch)))

    def touch(self) -> None:
        """Have all of it in memory."""
        for block in self.blocks:
            block.touch()
        touch(address_of(self._codebook), self._codebook.nbytes)


class TableWords:
    """What kernels read of a table of ``spec``, at ``address``; ``descriptors``: int64[blocks, BLOCK_WORDS], kept as long."""

    def __init__(self, spec: TableSpec, seed: int, descriptors: NDArray[np.int64]) -> None:
        parts = spec.all_parts
        if spec.absent == "zeros":
            parts = ()
        elif spec.expand_score:
            # A row without all its parts reads as zeros behind the first one.
            parts = parts[:1]
        self.descriptors = descriptors
        self._ends = np.cumsum([part.width for part in parts], dtype=np.int64)
        self._constants = np.array([constants(part.initializer) for part in parts], np.float64).reshape(-1, 3)
        code = stored_code(spec)
        words: NDArray[np.int64] = np.zeros(TABLE_WORDS, np.int64)
        words[BLOCKS] = address_of(descriptors)
        words[BLOCK_BITS] = spec.blocks.bit_length() - 1
        words.view(np.uint64)[SALT] = table_salt(spec.name)
        words[DIM] = spec.dim
        words[CODE] = code
        words[ROW_BYTES] = weight_bytes(code, spec.dim)
        words.view(np.uint64)[ORIGIN] = origin(seed, spec.name)
        words[PARTS] = len(parts)
        words[ENDS] = address_of(self._ends)
        words[CONSTANTS] = address_of(self._constants)
        self._words = words
        self.address = address_of(words)

    def pack(self, code: int, size: int, codebook: NDArray[np.float32], starts: NDArray[np.int64]) -> None:
        """Say that rows are of another form of ``embedding/packed.py``, of ``size`` bytes; the arrays must be kept as long."""
        self._words[CODE] = code
        self._words[ROW_BYTES] = size
        self._words[CODEBOOK] = address_of(codebook)
        self._words[STARTS] = address_of(starts)
        self._words[CODES] = len(starts) - 1


def checked_keys(spec: TableSpec, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return keys: uint64[n] as kernels read them at an address; Malformed unless ``out`` is float32[n, dim]."""
    keys = plain_array("keys", keys, np.uint64)
    n = len(keys)
    if out.dtype != np.float32 or out.shape != (n, spec.dim):
        raise Malformed(f"table {spec.name}: out is {out.dtype}{list(out.shape)} for {n} rows of {spec.dim}")
    check_output(f"table {spec.name}: out", out)
    return keys


def stored_code(spec: TableSpec) -> int:
    """Return the precision in which a frozen table keeps its rows: its own, where scales can be told from its state."""
    code = precision_code(spec.dtype)
    return FLOAT32 if code == INT8 and spec.expand_score else code


def stored_bytes(spec: TableSpec) -> int:
    """Return how many bytes a row of a frozen table takes."""
    return weight_bytes(stored_code(spec), spec.dim)


def stored_rows(spec: TableSpec, weights: NDArray[np.float32], state: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the rows as a frozen table stores them: uint8[n, bytes of a row], which may be the memory of weights."""
    code = stored_code(spec)
    if code == FLOAT32:
        return np.ascontiguousarray(weights).view(np.uint8).reshape(len(weights), 4 * spec.dim)
    if code == INT8 and not state.shape[1]:
        raise Malformed(f"table {spec.name}: rows of int8 without a scale")
    scales = np.ascontiguousarray(state[:, -1]) if code == INT8 else np.empty(0, np.float32)
    size = weight_bytes(code, spec.dim)
    out = np.empty((len(weights), size), np.uint8)
    store_rows(address_of(weights), address_of(scales), len(weights), spec.dim, code, size, address_of(out))
    return out


def warm_up() -> None:
    """Compile, or load from the cache, the kernels of frozen tables."""
    for dtype in ("float32", "bfloat16"):
        spec = TableSpec("warm_up", 2, blocks=1, dtype=dtype)
        keys = np.arange(3, dtype=np.uint64)
        block = FrozenBlock(spec, keys, np.ones((3, 2), np.float32), np.empty((3, 0), np.float32))
        block.touch()
        FrozenTable(spec, [block], seed=0).lookup(np.arange(5, dtype=np.uint64), np.empty((5, 2), np.float32))
