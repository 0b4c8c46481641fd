# SPDX-License-Identifier: Apache-2.0
"""Packed values: what a codec made of rows or dense blocks, as a message, and back.

Invariant: a message says which codec it is of; how many bytes have to come follows from that and from what is beside it, so
nothing is unpacked into more room than the values take. What was packed is cut by rows or blocks without being decoded.
Any thread.

A dense block is cut into rows of CHUNK values, the last one shorter, each on its own under the codec.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.client.compression import Way
from oarlock.embedding.compress import CODECS, Compression, Draw, RowCodec
from oarlock.proto.arrays import Part, pack, unpack
from oarlock.proto.errors import InvalidArgument, Malformed
from oarlock.proto.shard_pb2 import Codec, Packed

CHUNK = 256  # as many columns as one byte of topk tells apart
NO_LIMIT = float("inf")
_TOPK = CODECS.index("topk")
# Bytes of all codecs come in fours, so this one packs the rows of any.
_ZSTD_LEVEL = 1
_WORDS = RowCodec(Compression(zstd=_ZSTD_LEVEL), dim=1)


@lru_cache(256)
def row_codec(compression: Compression, dim: int, limit: float) -> RowCodec:
    """Return the codec of rows of ``dim`` columns; one object for as long as it is in use."""
    return RowCodec(compression, dim, limit)


class Form(NamedTuple):
    """How values travel: a compression, whether zstd comes after it, and the limit beyond which values are refused.

    ``k`` columns under topk are those of a row, or of CHUNK values of a dense block.
    """

    compression: Compression
    zstd: bool = False
    limit: float = NO_LIMIT

    @property
    def plain(self) -> bool:
        """Whether values travel as float32 arrays, as they do without any of this."""
        return self.compression.codec == "none" and not self.zstd

    @property
    def lossless(self) -> "Form":
        """The same without loss."""
        return Form(Compression(), self.zstd, self.limit)

    def message(self) -> Codec:
        return Codec(codec=CODECS.index(self.compression.codec), k=self.compression.k, zstd=self.zstd)

    def rows(self, dim: int) -> RowCodec:
        return row_codec(self.compression, dim, self.limit)

    def of_width(self, width: int) -> RowCodec:
        """Return the codec of a dense block's row of ``width`` values."""
        compression = self.compression
        if compression.k and width < CHUNK:
            compression = Compression(compression.codec, max(1, -(-compression.k * width // CHUNK)))
        return row_codec(compression, width, self.limit)

    def block_bytes(self, length: int) -> int:
        """Return how many bytes a dense block of ``length`` values takes, before zstd."""
        whole, rest = divmod(length, CHUNK)
        return whole * self.of_width(CHUNK).row_bytes + (self.of_width(rest).row_bytes if rest else 0)


class Encoded(NamedTuple):
    """Values in a form, before zstd: uint8[n, bytes] of rows, or uint8[bytes] of dense blocks."""

    form: Form
    data: NDArray[np.uint8]


def form_of(way: Way, dim: int, *, zstd: bool, limit: float = NO_LIMIT, pushed: bool = False) -> Form:
    """Return the form of one direction of rows of ``dim`` columns.

    Weights are rounded to nearest, and gradients of which the rest is kept; others stochastically, which is right on average.
    """
    drawn = pushed and not way.feedback and way.codec not in ("none", "topk")
    return Form(Compression(way.codec, way.columns(dim), "stochastic" if drawn else "nearest"), zstd, limit)


def read_form(message: Codec, dim: int, what: str, limit: float = NO_LIMIT) -> Form:
    """Return the form that a message names for rows of ``dim`` columns; Malformed if there is no such."""
    if message.codec >= len(CODECS):
        raise Malformed(f"{what}: codec {message.codec}, there are 0 to {len(CODECS) - 1}")
    if not (1 <= message.k <= dim if message.codec == _TOPK else message.k == 0):
        raise Malformed(f"{what}: k = {message.k} under {CODECS[message.codec]} of {dim} columns")
    return Form(Compression(CODECS[message.codec], message.k), message.zstd, limit)


def read_pull_form(message: Codec, dim: int, what: str) -> Form:
    """As read_form, for what a pull asks for: InvalidArgument for topk, which would read most weights as zero."""
    if message.codec == _TOPK:
        raise InvalidArgument(f"{what}: weights do not travel under topk: ask for one of {', '.join(CODECS[:_TOPK])}")
    return read_form(message, dim, what)


def encode_rows(form: Form, values: NDArray[np.float32], draw: Draw | None = None) -> NDArray[np.uint8]:
    """Return uint8[n, bytes]: rows of float32[n, dim], before zstd."""
    codec = form.rows(values.shape[1])
    out: NDArray[np.uint8] = np.empty(codec.size(len(values)), np.uint8)
    codec.encode(values, out, draw)
    return out.reshape(len(values), codec.row_bytes)


def packed(form: Form, encoded: NDArray[np.uint8], values: int, parts: list[Part] | None) -> Packed:
    """Return the message of what was encoded; without zstd the bytes go to ``parts`` as they are."""
    flat = np.ascontiguousarray(encoded).reshape(-1)
    if form.zstd and len(flat):
        out: NDArray[np.uint8] = np.empty(len(flat), np.uint8)
        flat = out[: _WORDS.seal(flat.reshape(-1, 4), out)]
    return Packed(codec=form.message(), payload=pack(flat, parts), values=values)


def opened_bytes(form: Form, message: Packed, size: int, what: str, parts: Sequence[Part]) -> NDArray[np.uint8]:
    """Return the uint8[size] that were encoded; Malformed if others came."""
    given = unpack(message.payload, np.uint8, f"packed {what}", parts=parts)
    if not form.zstd:
        if len(given) != size:
            raise Malformed(f"{what}: {len(given)} packed bytes came, {size} were to come")
        return given
    return _WORDS.rows(given, size // 4).reshape(-1)


def opened_rows(form: Form, message: Packed, n: int, dim: int, what: str, parts: Sequence[Part]) -> NDArray[np.uint8]:
    """Return uint8[n, bytes]: the encoded rows of a message, not decoded."""
    if message.values != n * dim:
        raise Malformed(f"{what}: {message.values} packed values for {n} rows of {dim}")
    codec = form.rows(dim)
    return opened_bytes(form, message, codec.size(n), what, parts).reshape(n, codec.row_bytes)


def decode_rows(form: Form, message: Packed, out: NDArray[np.float32], what: str, parts: Sequence[Part]) -> None:
    """Write a message's rows to ``out``: float32[n, dim], C order."""
    n, dim = out.shape
    form.rows(dim).decode(opened_rows(form, message, n, dim, what, parts).reshape(-1), out)


def encode_dense(
    form: Form, values: NDArray[np.float32], lengths: Sequence[int], draw: Draw | None = None
) -> NDArray[np.uint8]:
    """Return the bytes of dense blocks, one after another, whose ``lengths`` add up to values: float32[n].

    ``draw``: its ``keys`` are the numbers of the blocks' first values in the vector of all; their rows are told apart from there.
    """
    sizes = [form.block_bytes(length) for length in lengths]
    out: NDArray[np.uint8] = np.empty(sum(sizes), np.uint8)
    at = to = 0
    for block, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        whole = length - length % CHUNK
        for begin, end, width in ((0, whole, CHUNK), (whole, length, length - whole)):
            if end > begin:
                codec = form.of_width(width)
                rows = values[at + begin : at + end].reshape(-1, width)
                first = to + (whole // CHUNK * form.of_width(CHUNK).row_bytes if begin else 0)
                if draw is None or codec.compression.rounding == "nearest":
                    codec.encode(rows, out[first : first + codec.size(len(rows))])
                else:
                    start = int(draw.keys[block])
                    keys = np.arange(start + begin, start + end, width, dtype=np.uint64)
                    codec.encode(rows, out[first : first + codec.size(len(rows))], Draw(keys, draw.start, draw.step))
        at, to = at + length, to + size
    return out


def decode_dense(form: Form, data: NDArray[np.uint8], lengths: Sequence[int], out: NDArray[np.float32]) -> None:
    """Write the blocks that encode_dense wrote to ``out``: float32[n]."""
    at = to = 0
    for length in lengths:
        whole = length - length % CHUNK
        for begin, end, width in ((0, whole, CHUNK), (whole, length, length - whole)):
            if end > begin:
                codec = form.of_width(width)
                size = codec.size((end - begin) // width)
                codec.decode(data[to : to + size], out[at + begin : at + end].reshape(-1, width))
                to += size
        at += length


def opened_dense(
    form: Form, message: Packed, lengths: Sequence[int], what: str, parts: Sequence[Part]
) -> NDArray[np.uint8]:
    """Return the bytes of dense blocks of these lengths out of a message, not decoded."""
    if message.values != sum(lengths):
        raise Malformed(f"{message.values} packed {what} came for blocks of {sum(lengths)} values")
    return opened_bytes(form, message, sum(form.block_bytes(length) for length in lengths), what, parts)


def unpack_dense(
    form: Form, message: Packed, lengths: Sequence[int], what: str, parts: Sequence[Part]
) -> NDArray[np.float32]:
    """Return the values of dense blocks of these lengths: float32[sum(lengths)]."""
    data = opened_dense(form, message, lengths, what, parts)
    out: NDArray[np.float32] = np.empty(sum(lengths), np.float32)
    decode_dense(form, data, lengths, out)
    return out
