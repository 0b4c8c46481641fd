# SPDX-License-Identifier: Apache-2.0
"""Codecs: float32[n, dim] as fewer bytes on their way between worker and shard, and back (docs/compression.md).

Invariant: a payload is n rows of ``row_bytes`` each, so its size is known before it is made, and a row can be taken out of
it; or, where zstd is on and made it shorter, one zstd frame of exactly these rows. Nothing in it says which codec it is of:
both sides know that, as they know n. So any bytes of the right length are rows, but for those of topk, whose columns are
checked, and a shorter payload is unpacked into no more room than its rows take. Objects without state; any thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.compress_rows import TOPK, decode_rows, encode_rows, row_bytes
from oarlock.embedding.initial import origin
from oarlock.embedding.pointer import address_of, check_output, kernel_array
from oarlock.embedding.precision import PRECISIONS
from oarlock.embedding.refusal import limit_bits
from oarlock.embedding.spec import MAX_DIM
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory

CODECS = ("none", *PRECISIONS[1:], "topk")  # name of code n; a number never changes its meaning
ROUNDINGS = ("nearest", "stochastic")
MAX_ZSTD = 19
_LONGEST = 1 << 40  # bytes of a payload; far beyond a message, far below where sizes leave an int64

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True)
class Compression:
    """How the rows of a table travel in one direction.

    ``codec`` one of CODECS; ``k`` columns of each row under topk, 0 elsewhere; ``rounding`` one of ROUNDINGS (none and topk
    do not round); ``zstd`` the level at which the result is compressed once more, 0 = not.
    """

    codec: str = "none"
    k: int = 0
    rounding: str = "nearest"
    zstd: int = 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise InvalidArgument(f"compression.codec = {self.codec!r}: choose one of {', '.join(CODECS)}")
        low, high = (1, MAX_DIM) if self.codec == "topk" else (0, 0)
        self._check("k", self.k, low, high)
        if self.rounding not in ROUNDINGS:
            raise InvalidArgument(f"compression.rounding = {self.rounding!r}: choose one of {', '.join(ROUNDINGS)}")
        if self.rounding == "stochastic" and self.codec in ("none", "topk"):
            raise InvalidArgument(f"compression.codec = {self.codec!r} does not round: leave rounding at 'nearest'")
        self._check("zstd", self.zstd, 0, MAX_ZSTD)

    def _check(self, name: str, value: object, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            wanted = f"an integer from {low} to {high}" if high else f"0, it means nothing for {self.codec!r}"
            raise InvalidArgument(f"compression.{name} = {value!r}: give {wanted}")


class Draw(NamedTuple):
    """What stochastic rounding is a function of: keys uint64[n], ``start`` from draw_start(), and the step."""

    keys: NDArray[np.uint64]
    start: np.uint64
    step: int


def draw_start(seed: int, table: str, direction: str) -> np.uint64:
    """Return what tells the rounding of a job, table and direction ("push", "pull") from that of all others."""
    return origin(seed, f"compress/{direction}/{table}")


class RowCodec:
    """One compression for rows of ``dim`` columns.

    ``limit``: values of this magnitude and above, infinities and NaN are to be refused where they arrive, and arrive as not
    finite (float16, bfloat16, int8) or as they are (none, topk). For gradients, the table's guard; infinity for weights.
    """

    def __init__(self, compression: Compression, dim: int, limit: float = float("inf")) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MAX_DIM:
            raise InvalidArgument(f"dim = {dim!r}: give an integer from 1 to {MAX_DIM}")
        if compression.k > dim:
            raise InvalidArgument(f"compression.k = {compression.k}: rows have {dim} columns; give at most so many")
        if not limit > 0:
            raise InvalidArgument(f"limit = {limit!r}: give a number above 0")
        self.compression = compression
        self.dim = dim
        self.code = TOPK if compression.codec == "topk" else CODECS.index(compression.codec)
        self.limit = limit_bits(limit)
        self.row_bytes = row_bytes(self.code, dim, compression.k)

    def size(self, n: int) -> int:
        """Return how many bytes n rows take: exactly, or with zstd at most."""
        if n < 0:
            raise InvalidArgument(f"{n} rows: give 0 or more")
        if n * self.row_bytes > _LONGEST:
            raise OutOfMemory(f"{n} rows of {self.row_bytes} bytes are over the limit of {_LONGEST} bytes")
        return n * self.row_bytes

    def encode(self, values: NDArray[np.float32], out: NDArray[np.uint8], draw: Draw | None = None) -> int:
        """Write values: float32[n, dim] to the front of ``out``: uint8[size(n) or more]; return how many bytes it took.

        ``draw`` is wanted for stochastic rounding only.
        """
        values = self._checked(values)
        n = len(values)
        keys, draw = self.drawn(draw, n)

        def fill(rows: int) -> None:
            encode_rows(
                rows,
                self.row_bytes,
                self.code,
                self.dim,
                self.compression.k,
                address_of(values),
                n,
                self.limit,
                address_of(keys) if len(keys) else 0,
                np.uint64(draw.start),
                draw.step,
            )

        return self.write(n, out, fill)

    def decode(self, data: Buffer, out: NDArray[np.float32]) -> None:
        """Write the rows of a payload to out: float32[n, dim], all of it; Malformed if ``data`` is not n rows."""
        check_output("out", out)
        target = self._checked(out)
        n = len(target)
        rows = self.rows(data, n)
        found = decode_rows(
            address_of(rows), self.row_bytes, self.code, self.dim, self.compression.k, address_of(target), n
        )
        if found != n:
            raise Malformed(
                f"compressed row {found}: its columns are not {self.compression.k} of {self.dim}, ascending"
            )

    def rows(self, data: Buffer, n: int) -> NDArray[np.uint8]:
        """Return uint8[n, row_bytes]: the n rows that a payload holds, to be read only; not looked at one by one."""
        size = self.size(n)
        given = np.frombuffer(data, np.uint8)
        if len(given) < size and self.compression.zstd:
            given = _unpack(given, size)
        if len(given) != size:
            raise Malformed(f"{len(given)} bytes of compressed rows: {n} rows of {self.row_bytes} bytes were to come")
        if size and address_of(given) % 4:
            given = given.copy()
        return kernel_array("rows", given.reshape(n, self.row_bytes), np.uint8, 2)

    def seal(self, rows: NDArray[np.uint8], out: NDArray[np.uint8]) -> int:
        """Write rows: uint8[n, row_bytes], as ``rows`` gave them, as a payload; return how many bytes it took."""
        rows = kernel_array("rows", rows, np.uint8, 2)
        if rows.shape[1] != self.row_bytes:
            raise InvalidArgument(f"rows of {rows.shape[1]} bytes: this codec makes rows of {self.row_bytes}")
        _check_room(out, self.size(len(rows)))
        flat = rows.reshape(-1)
        packed = self._packed(flat)
        out[: len(packed)] = packed
        return len(packed)

    def write(self, n: int, out: NDArray[np.uint8], fill: Callable[[int], Any]) -> int:
        """Have ``fill(address)`` write n rows, straight to ``out`` where that can be; return the payload's bytes."""
        size = self.size(n)
        _check_room(out, size)
        if size == 0:
            return 0
        if not self.compression.zstd and address_of(out) % 4 == 0:
            fill(address_of(out))
            return size
        rows: NDArray[np.uint8] = np.empty(size, np.uint8)
        fill(address_of(rows))
        packed = self._packed(rows)
        out[: len(packed)] = packed
        return len(packed)

    def drawn(self, draw: Draw | None, n: int) -> tuple[NDArray[np.uint64], Draw]:
        """Return the keys that rounding goes by, none if it goes to nearest, and a draw to take start and step from."""
        if self.compression.rounding == "nearest":
            return np.empty(0, np.uint64), Draw(np.empty(0, np.uint64), np.uint64(0), 0)
        if draw is None:
            raise InvalidArgument("rounding is stochastic: give the keys, the start and the step that it is drawn from")
        keys = kernel_array("keys", draw.keys, np.uint64)
        if len(keys) != n:
            raise InvalidArgument(f"{len(keys)} keys for {n} rows: give one each")
        if not 0 <= draw.step < 1 << 63:
            raise InvalidArgument(f"step {draw.step}: give a number from 0 to below 2^63")
        return keys, Draw(keys, draw.start, int(draw.step))

    def _packed(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _pack(rows, self.compression.zstd) if self.compression.zstd and len(rows) else rows

    def _checked(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        values = kernel_array("values", values, np.float32, 2)
        if values.shape[1] != self.dim:
            raise Malformed(f"values of {values.shape[1]} columns, wanted {self.dim}")
        return values


def _check_room(out: NDArray[np.uint8], size: int) -> None:
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.ndim != 1:
        raise InvalidArgument("out must be an array of uint8 with 1 dimension")
    check_output("out", out)
    if len(out) < size:
        raise InvalidArgument(f"out has {len(out)} bytes: give the {size} that size() says")


def _pack(rows: NDArray[np.uint8], level: int) -> NDArray[np.uint8]:
    """Return a zstd frame of the rows, or the rows where that is not shorter."""
    import pyarrow  # here, because few processes need it and it takes a tenth of a second

    frame = pyarrow.Codec("zstd", compression_level=level).compress(rows.data)
    return np.frombuffer(frame, np.uint8) if frame.size < len(rows) else rows


def _unpack(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the ``size`` bytes that a zstd frame holds; Malformed if it holds more, fewer, or is none."""
    import pyarrow

    try:
        found = pyarrow.Codec("zstd").decompress(frame.data, decompressed_size=size)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Malformed(f"{len(frame)} bytes are no zstd frame of {size} bytes: {error}") from None
    return np.frombuffer(found, np.uint8)
