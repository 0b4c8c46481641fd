# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious twins of the codecs of ``embedding/compress.py``, in plain Python and numpy, from docs/compression.md.

Loaded by conftest under the name ``compress_reference``. No state.
"""

import math
from collections import OrderedDict
from fractions import Fraction

import embedding_reference as reference
import numpy as np

F32 = np.float32
LARGEST = {"float16": 65504.0, "bfloat16": float(np.uint32(0x7F7F0000).view(F32))}


def row_bytes(codec, dim, k=0):
    columns = k if dim <= 256 else 2 * k
    return {
        "none": 4 * dim,
        "float16": -(-dim // 2) * 4,
        "bfloat16": -(-dim // 2) * 4,
        "int8": -(-dim // 4) * 4 + 4,
        "topk": 4 * k + -(-columns // 4) * 4,
    }[codec]


def refused(values, limit):
    """Return bool[...]: NaN, infinite, or of a magnitude that is not below the limit."""
    return ~(np.abs(values) < F32(limit))


def draw(start, step, key, column):
    seed = reference.mix64(reference.mix64((key ^ start) + reference.GOLDEN & reference.WORD) ^ step)
    both = reference.mix64(seed + reference.GOLDEN * (column // 2 + 1) & reference.WORD)
    return both >> 32 * (column % 2) & 0xFFFFFFFF


def round16(value, codec, drawn):
    """Return a finite value rounded to 16 bits, to the nearest or as 32 random bits say, as a float."""
    size = abs(float(value))
    digits, bottom = (10, -14) if codec == "float16" else (7, -126)
    exponent = math.frexp(size)[1] - 1 if size else bottom
    step = Fraction(2) ** (max(exponent, bottom) - digits)
    exact = Fraction(size) / step
    kept = round(exact) if drawn is None else math.floor(exact + Fraction(drawn, 1 << 32))
    return math.copysign(min(float(kept * step), LARGEST[codec]), value)


def bits16(rounded, codec):
    if codec == "float16":
        return int(np.float16(rounded).view(np.uint16))
    return int(F32(rounded).view(np.uint32)) >> 16


def encode16(row, codec, limit, drawn):
    infinite, quiet = (0x7C00, 0x7E00) if codec == "float16" else (0x7F80, 0x7FC0)
    out = []
    for column, value in enumerate(row):
        if refused(value, limit):
            sign = 0x8000 if np.signbit(value) else 0
            out.append(sign | (quiet if np.isnan(value) else infinite))
        else:
            out.append(bits16(round16(value, codec, drawn(column)), codec))
    return np.array(out + [0] * (len(out) % 2), np.uint16).tobytes()


def encode8(row, limit, drawn):
    dim, padding = len(row), -len(row) % 4
    if refused(row, limit).any():
        return bytes(dim + padding) + np.array([0x7FC00000], np.uint32).tobytes()
    largest = np.abs(row).max()
    if largest == 0:
        return bytes(dim + padding + 4)
    top = np.nextafter(F32(float(np.finfo(F32).max) / 127), F32(0))
    scale = min(max(largest / F32(127), F32(2.0**-126)), top)
    q = []
    for column, value in enumerate(row):
        size = min(np.abs(value) / scale, F32(127))
        if drawn(column) is None:
            whole = int(np.rint(size))
        else:
            whole = (int(size * F32(1 << 23)) + (drawn(column) >> 9)) >> 23
        q.append(-whole if value < 0 else whole)
    return np.array(q + [0] * padding, np.int8).tobytes() + scale.tobytes()


def encode_topk(row, k):
    sizes = (row.view(np.uint32) & 0x7FFFFFFF).tolist()
    kept = sorted(sorted(range(len(row)), key=lambda c: (-sizes[c], c))[:k])
    columns = np.array(kept, np.uint8 if len(row) <= 256 else np.uint16).tobytes()
    return row[kept].tobytes() + columns + bytes(-len(columns) % 4)


def encode(compression, limit, values, keys=None, start=0, step=0):
    """Return the payload's bytes before zstd."""
    out = []
    for i, row in enumerate(values):

        def drawn(column, i=i):
            if compression.rounding == "nearest":
                return None
            return draw(int(start), step, int(keys[i]), column)

        if compression.codec == "none":
            out.append(row.tobytes())
        elif compression.codec == "topk":
            out.append(encode_topk(row, compression.k))
        elif compression.codec == "int8":
            out.append(encode8(row, limit, drawn))
        else:
            out.append(encode16(row, compression.codec, limit, drawn))
    return b"".join(out)


def decode(compression, data, n, dim):
    """Return float32[n, dim]; ValueError where the columns of a topk row are not ascending within the row."""
    rows = np.frombuffer(data, np.uint8).reshape(n, -1)
    if compression.codec == "none":
        return rows.view(F32)
    if compression.codec == "float16":
        with np.errstate(invalid="ignore"):
            return rows.view(np.float16)[:, :dim].astype(F32)
    if compression.codec == "bfloat16":
        return (rows.view(np.uint16)[:, :dim].astype(np.uint32) << 16).view(F32)
    if compression.codec == "int8":
        with np.errstate(all="ignore"):
            return rows[:, :dim].view(np.int8).astype(F32) * np.ascontiguousarray(rows[:, -4:]).view(F32)
    k = compression.k
    out = np.zeros((n, dim), F32)
    for i, row in enumerate(rows):
        columns = row[4 * k :].view(np.uint8 if dim <= 256 else np.uint16)[:k].astype(int)
        if (np.diff(columns) <= 0).any() or columns[-1] >= dim:
            raise ValueError(f"row {i}")
        out[i, columns] = row[: 4 * k].view(F32)
    return out


class Residuals:
    """The twin of embedding/compress_residuals.py: an ordered dict from key to what is kept, oldest first."""

    def __init__(self, compression, dim, room, limit):
        self.compression, self.dim, self.room, self.limit = compression, dim, room, limit
        self.kept = OrderedDict()
        self.lost = []  # what was kept for keys that gave way or were dropped
        self.counts = {"lost": 0, "dropped": 0, "refused": 0}

    def encode(self, keys, gradients, start=0, step=0):
        out = []
        for key, gradient in zip(keys.tolist(), gradients, strict=True):
            one = np.array([key], np.uint64)
            if refused(gradient, self.limit).any():
                self.counts["refused"] += 1
                out.append(encode(self.compression, self.limit, gradient[None], one, start, step))
                continue
            if key not in self.kept and len(self.kept) == self.room:
                self.lost.append(self.kept.popitem(last=False))
                self.counts["lost"] += 1
            before = self.kept.pop(key, None)
            total = gradient if before is None else gradient + before
            if refused(total, self.limit).any():
                self.lost.append((key, before))
                self.counts["dropped"] += 1
                total = gradient
            out.append(encode(self.compression, self.limit, total[None], one, start, step))
            self.kept[key] = total - decode(self.compression, out[-1], 1, self.dim)[0]
        return b"".join(out)
