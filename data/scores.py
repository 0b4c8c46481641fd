# SPDX-License-Identifier: Apache-2.0
"""Scores: what an evaluation found, as how often each score came with each label; exact AUC, logloss and more of it.

Invariant: everything that is kept is an integer, so merging is exact: the metrics are the same to the bit however the samples
were cut into splits and in whatever order these came. One thread.

A score is a probability, float32 in [0, 1]. A label in [0, 1] is a sample that is positive with that weight: it counts as
``label`` of label 1 and ``1 - label`` of label 0, in units of 2^-24 (labels that float32 holds more finely are rounded).

Bytes, little-endian: ``SCOR``, version: uint16, bits: uint8 (weights are in units of 2^-bits: 0, or 24 if labels are
fractions), width0 and width1: uint8 (bytes of a weight, 1, 2, 4 or 8, as few as will do), 3 zero bytes, m: uint32; then
scores: float32[m], distinct and ascending, weights of label 0: uint[m] and of label 1: uint[m].
"""

import math
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import InvalidArgument, Malformed

METRICS = ("auc", "logloss", "accuracy", "calibration")
# Logarithms are taken of probabilities in [CLIP, 1 - CLIP]: one sample that was surely wrong costs 16.1, not infinity.
CLIP = 1e-7
# What one split's bytes may hold: a million samples or more.
MAX_BYTES = 8 << 20
# Weights stay below 2^58, so that sums of them and their limbs stay within 64 bits.
MAX_SAMPLES = 1 << 34

_MAGIC, _VERSION, _BITS = b"SCOR", 1, 24
_HEADER = struct.Struct("<4sHBBB3xI")
_ONE = np.uint64(1 << _BITS)
# Bit pattern of 1.0: those of the floats from 0.0 to it ascend as the values do.
_MOST = np.uint32(0x3F800000)
# So many samples wait before they are sorted into the others.
_PENDING = 1 << 20
_LIMB, _LIMBS, _RUN = 20, 3, 1 << 22
_HALF = np.uint64(32)

Bits = NDArray[np.uint32]
Weights = NDArray[np.uint64]


class Scores:
    """How often each score came with label 0 and with label 1."""

    def __init__(self) -> None:
        self._bits: Bits = np.empty(0, np.uint32)
        self._zeros: Weights = np.empty(0, np.uint64)
        self._ones: Weights = np.empty(0, np.uint64)
        self._pending: list[tuple[Bits, Weights]] = []
        self._waiting = 0
        self.samples = 0

    def add(self, score: NDArray[np.float32], label: NDArray[np.float32]) -> None:
        """Count samples: ``score: float32[n]``, probabilities, and ``label: float32[n]`` in [0, 1]; both are copied."""
        for name, values in (("score", score), ("label", label)):
            if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.ndim != 1:
                found = (
                    f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
                )
                raise InvalidArgument(f"{name}s to evaluate: found {found}, expected float32[n]")
        if len(score) != len(label):
            raise InvalidArgument(f"{len(score)} scores came with {len(label)} labels: give one label per score")
        _check_unit(score, "score", "give probabilities, as Model(score=sigmoid(logit)) does")
        _check_unit(label, "label", "give 0, 1 or a fraction")
        if self.samples + len(score) > MAX_SAMPLES:
            raise InvalidArgument(f"more than {MAX_SAMPLES} samples in one evaluation")
        # A negative zero becomes the zero that it equals.
        ones = np.rint(label * np.float32(_ONE)).astype(np.uint64)
        self._pending.append(((score + np.float32(0)).view(np.uint32), ones))
        self._waiting += len(score)
        self.samples += len(score)
        if self._waiting > max(_PENDING, len(self._bits)):
            self._settle()

    def _settle(self) -> None:
        """Sort in what waits."""
        if self._pending:
            bits = np.concatenate([b for b, _ in self._pending])
            ones = np.concatenate([o for _, o in self._pending])
            self._pending, self._waiting = [], 0
            self._gather([(self._bits, self._zeros, self._ones), (bits, _ONE - ones, ones)])

    def _gather(self, parts: Sequence[tuple[Bits, Weights, Weights]]) -> None:
        bits, zeros, ones = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if len(bits):
            # Score and position in one number: sorting those is several times faster than argsort.
            packed = bits.astype(np.uint64) << _HALF | np.arange(len(bits), dtype=np.uint64)
            packed.sort()
            order, bits = packed.astype(np.uint32), (packed >> _HALF).astype(np.uint32)
            starts = np.flatnonzero(np.concatenate([[True], bits[1:] != bits[:-1]]))
            zeros, ones = (np.add.reduceat(weights[order], starts) for weights in (zeros, ones))
            bits = bits[starts]
        self._bits, self._zeros, self._ones = bits, zeros, ones

    @staticmethod
    def merge(parts: "Sequence[Scores]") -> "Scores":
        """Return the scores of all parts together."""
        merged = Scores()
        merged.samples = sum(part.samples for part in parts)
        if merged.samples > MAX_SAMPLES:
            raise InvalidArgument(f"more than {MAX_SAMPLES} samples in one evaluation")
        for part in parts:
            part._settle()
        if parts:
            merged._gather([(part._bits, part._zeros, part._ones) for part in parts])
        return merged

    def to_bytes(self) -> bytes:
        """Return the bytes that stand for it; InvalidArgument if they are more than ``MAX_BYTES``."""
        self._settle()
        whole = not ((self._zeros | self._ones) % _ONE).any()
        shift = np.uint64(_BITS if whole else 0)
        weights = [w >> shift for w in (self._zeros, self._ones)]
        widths = [_width(w) for w in weights]
        size = _HEADER.size + (4 + sum(widths)) * len(self._bits)
        _check_size(size)
        header = _HEADER.pack(_MAGIC, _VERSION, 0 if whole else _BITS, *widths, len(self._bits))
        columns = [w.astype(f"<u{width}").tobytes() for w, width in zip(weights, widths, strict=True)]
        return b"".join([header, self._bits.astype("<u4").tobytes(), *columns])

    @staticmethod
    def from_bytes(data: bytes) -> "Scores":
        """Return what ``to_bytes`` wrote; Malformed for anything else."""
        _check_size(len(data))
        if len(data) < _HEADER.size:
            raise _malformed(f"{len(data)} bytes are less than a header")
        magic, version, bits, width0, width1, count = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise _malformed(f"they begin with {data[:6].hex()}: not with SCOR and version {_VERSION}")
        if bits not in (0, _BITS) or not {width0, width1} <= {1, 2, 4, 8} or any(data[9:12]):
            raise _malformed(f"a header with {bits} bits and weights of {width0} and {width1} bytes")
        if len(data) != _HEADER.size + (4 + width0 + width1) * count:
            raise _malformed(f"{count} scores do not make {len(data)} bytes")
        made, at = Scores(), _HEADER.size
        made._bits = np.frombuffer(data, "<u4", count, at).astype(np.uint32)
        if count and (made._bits[-1] > _MOST or (made._bits[1:] <= made._bits[:-1]).any()):
            raise _malformed("the scores are not distinct, ascending and in [0, 1]")
        zeros = np.frombuffer(data, f"<u{width0}", count, at + 4 * count).astype(np.uint64)
        ones = np.frombuffer(data, f"<u{width1}", count, at + (4 + width0) * count).astype(np.uint64)
        unit = 1 << bits
        # As floating-point numbers first: as integers they may add up to more than there is room for.
        if float(zeros.sum(dtype=np.float64) + ones.sum(dtype=np.float64)) > 1.5 * MAX_SAMPLES * unit:
            raise _malformed(f"weights of more than {MAX_SAMPLES} samples")
        totals = zeros + ones
        if (totals == 0).any() or (totals % np.uint64(unit)).any():
            raise _malformed("the weights of a score are no number of samples")
        if (width0, width1) != (_width(zeros), _width(ones)) or (bits and not ((zeros | ones) % _ONE).any()):
            raise _malformed("the weights are wider than they need to be")
        made.samples = int(totals.sum()) // unit
        if made.samples > MAX_SAMPLES:
            raise _malformed(f"weights of more than {MAX_SAMPLES} samples")
        shift = np.uint64(_BITS - bits)
        made._zeros, made._ones = zeros << shift, ones << shift
        return made

    def metrics(self) -> dict[str, float | None]:
        """Return the metrics by name; None for one that these labels leave without a meaning.

        ``auc``: chance that a positive is scored above a negative, ties counting half (Fawcett 2006, section 7); None
        without both classes. ``logloss``: mean of -y ln p - (1 - y) ln(1 - p), p clipped to [``CLIP``, 1 - ``CLIP``].
        ``accuracy``: share of samples whose label the score tells, above 0.5 meaning 1. ``calibration``: mean score over
        mean label; None without a positive. Without samples all are None.
        """
        self._settle()
        if not self.samples:
            return dict.fromkeys(METRICS)
        zeros, ones = int(self._zeros.sum()), int(self._ones.sum())
        all_weights = zeros + ones
        score = self._bits.view(np.float32).astype(np.float64)
        p = np.clip(score, CLIP, 1 - CLIP)
        loss = -(self._ones * np.log(p) + self._zeros * np.log1p(-p)).sum()
        above = score > 0.5
        right = int(self._ones[above].sum()) + int(self._zeros[~above].sum())
        expected = float((score * (self._zeros + self._ones)).sum())
        auc: float | None = None
        if zeros and ones:
            # Twice the weight of negatives below each score, its own counting once: all in integers.
            below = np.uint64(2) * np.cumsum(self._zeros, dtype=np.uint64) - self._zeros
            auc = _dot(self._ones, below) / (2 * zeros * ones)
        return {
            "auc": auc,
            "logloss": float(loss) / all_weights,
            "accuracy": right / all_weights,
            "calibration": expected / ones if ones else None,
        }


def merit(name: str, value: float | None) -> float:
    """Return how good a metric's value is: the higher the better, whatever the metric; no value is worse than any."""
    if value is None or math.isnan(value):
        return -math.inf
    if name == "logloss":
        return -value
    if name == "calibration":
        return -abs(math.log(value)) if 0 < value < math.inf else -math.inf
    return value


def _dot(a: Weights, b: Weights) -> int:
    """Return the sum of products of numbers below 2^60, exactly: limb by limb, in runs whose sums fit into 64 bits."""
    mask = np.uint64((1 << _LIMB) - 1)
    total = 0
    for first in range(0, len(a), _RUN):
        parts = [
            [(column[first : first + _RUN] >> np.uint64(_LIMB * i)) & mask for i in range(_LIMBS)] for column in (a, b)
        ]
        for i, left in enumerate(parts[0]):
            for j, right in enumerate(parts[1]):
                total += int((left * right).sum()) << (_LIMB * (i + j))
    return total


def _width(weights: Weights) -> int:
    most = int(weights.max(initial=0))
    return next(width for width in (1, 2, 4, 8) if most < 1 << (8 * width))


def _check_unit(values: NDArray[np.float32], name: str, what: str) -> None:
    good = (values >= 0) & (values <= 1)
    if not good.all():
        at = int(np.argmin(good))
        if np.isnan(values[at]):
            what = "the model diverged, lower its learning rates" if name == "score" else what
        raise InvalidArgument(f"{name} {at} to evaluate is {values[at]}, not in [0, 1]: {what}")


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise InvalidArgument(
            f"the scores of an evaluation split are {size} bytes, more than {MAX_BYTES}: make evaluation splits smaller "
            "(evaluation_rows_per_split of the recipe's plan)"
        )


def _malformed(what: str) -> Malformed:
    return Malformed(f"bytes that are no scores: {what}")
