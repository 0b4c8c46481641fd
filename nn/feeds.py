# SPDX-License-Identifier: Apache-2.0
"""What a step is fed: checked before anything is computed, then handed to the kernels as they want it.

Invariant: arrays that a feed holds have the dtype and shape of the graph and one memory layout (C order, aligned,
writable), because each other layout would be a second signature of every kernel; what has it is used without a copy,
the rest is copied to a buffer that is kept. What is fed is only read. Owned by one Program and its thread.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from oarlock.nn.graph import DenseInput, Lookup
from oarlock.nn.kernels import count_bad_labels
from oarlock.nn.row_kernels import count_outside
from oarlock.proto.errors import InvalidArgument, Malformed

Array = np.ndarray[Any, Any]


class GrowingBuffer:
    """Memory for arrays of changing length: grows by at least half, never shrinks."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data: Array = np.empty(0, dtype)

    def take(self, shape: tuple[int, ...]) -> Array:
        """Return an array of ``shape`` with any contents; it is valid until the next call."""
        size = int(np.prod(shape))
        if size > len(self._data):
            self._data = np.empty(max(size, len(self._data) * 3 // 2), self._data.dtype)
        return self._data[:size].reshape(shape)

    def plain(self, array: Array) -> Array:
        """Return ``array`` if its layout is the one that kernels are compiled for, else a copy in this buffer."""
        flags = array.flags
        if flags.c_contiguous and flags.writeable and flags.aligned:
            return array
        out = self.take(array.shape)
        np.copyto(out, array)
        return out


def _array(name: str, what: str, value: object, dtype: type[np.generic]) -> Array:
    if not isinstance(value, np.ndarray):
        raise Malformed(f"feed {name}: {what} is a {type(value).__name__}; give a numpy array of {dtype.__name__}")
    if value.dtype != dtype:
        raise Malformed(f"feed {name}: {what} has dtype {value.dtype}; convert it with astype(numpy.{dtype.__name__})")
    return value


class LookupFeed:
    """Unique rows, where each sample finds its own, and the gradient of the rows."""

    def __init__(self, spec: Lookup) -> None:
        self.spec = spec
        self.rows: Array = np.empty((0, spec.dim), np.float32)
        self.inverse: Array = np.empty((0, spec.fields), np.int32)
        self.gradient: Array = np.empty((0, spec.dim), np.float32)
        self._rows = GrowingBuffer(np.float32)
        self._inverse = GrowingBuffer(np.int32)
        self._gradient = GrowingBuffer(np.float32)

    def take(self, value: object, batch: int) -> None:
        """Check and keep (rows: float32[u, dim], inverse: int32[batch] or int32[batch, fields])."""
        spec = self.spec
        if not isinstance(value, tuple) or len(value) != 2:
            raise Malformed(f"feed {spec.name}: give a tuple (rows, inverse), got {type(value).__name__}")
        rows = _array(spec.name, "rows", value[0], np.float32)
        inverse = _array(spec.name, "inverse", value[1], np.int32)
        if rows.ndim != 2 or rows.shape[1] != spec.dim:
            raise Malformed(f"feed {spec.name}: rows have shape {rows.shape}; table {spec.table} needs (n, {spec.dim})")
        if inverse.shape != (batch, spec.fields) and not (spec.fields == 1 and inverse.shape == (batch,)):
            wanted = f"({batch},)" if spec.fields == 1 else f"({batch}, {spec.fields})"
            raise Malformed(f"feed {spec.name}: inverse has shape {inverse.shape}; this batch needs {wanted}")
        inverse = self._inverse.plain(inverse).reshape(batch, spec.fields)
        bad = count_outside(inverse, rows.shape[0])
        if bad:
            where = int(np.argmax((inverse < 0).ravel() | (inverse >= rows.shape[0]).ravel()))
            raise Malformed(
                f"feed {spec.name}: {bad} values of inverse do not point into the {rows.shape[0]} rows of this feed,"
                f" the first at position {where}: {inverse.flat[where]}; give positions of rows, counted from 0"
            )
        self.rows = self._rows.plain(rows)
        self.inverse = inverse

    def make_gradient(self) -> None:
        """Size the gradient to the rows that were taken."""
        self.gradient = self._gradient.take(self.rows.shape)


class DenseFeed:
    """Values that a dense input shows."""

    def __init__(self, spec: DenseInput) -> None:
        self.spec = spec
        self.values: Array = np.empty((0, spec.width), np.float32)
        self._values = GrowingBuffer(np.float32)

    def take(self, value: object, batch: int) -> None:
        """Check and keep float32[batch, width]."""
        values = _array(self.spec.name, "the value", value, np.float32)
        if values.shape != (batch, self.spec.width):
            raise Malformed(
                f"feed {self.spec.name}: shape {values.shape}; this batch needs ({batch}, {self.spec.width})"
            )
        self.values = self._values.plain(values)


class LabelFeed:
    """Labels, and the sum of the losses against them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: Array = np.empty(0, np.float32)
        self.total: Array = np.zeros(1, np.float64)
        self._values = GrowingBuffer(np.float32)

    def take(self, value: object, batch: int) -> None:
        """Check and keep float32[batch] in [0, 1]."""
        values = _array(self.name, "the label", value, np.float32)
        if values.shape != (batch,):
            raise Malformed(f"feed {self.name}: shape {values.shape}; this batch needs ({batch},)")
        values = self._values.plain(values)
        bad = count_bad_labels(values)
        if bad:
            where = int(np.argmin((values >= 0) & (values <= 1)))
            raise Malformed(
                f"feed {self.name}: {bad} labels are not in [0, 1], the first at position {where}: {values[where]};"
                " drop or mend these samples"
            )
        self.values = values


def check_names(feeds: object, needed: set[str], known: set[str]) -> None:
    """Raise InvalidArgument unless ``feeds`` is a mapping that has all of ``needed`` and nothing outside ``known``."""
    if not isinstance(feeds, Mapping):
        raise InvalidArgument(f"feeds is a {type(feeds).__name__}; give a dict from the names of the model's feeds")
    missing = sorted(needed - feeds.keys())
    if missing:
        raise InvalidArgument(f"feed {missing[0]} is missing; this model needs {', '.join(sorted(needed))}")
    unknown = sorted(map(str, feeds.keys() - known))
    if unknown:
        raise InvalidArgument(f"feed {unknown[0]} is not part of this model; it knows {', '.join(sorted(known))}")
