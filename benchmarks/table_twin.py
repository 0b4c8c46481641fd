# SPDX-License-Identifier: Apache-2.0
"""The C twin of a table: built by the machine's own compiler into a given folder, and called without the interpreter lock.

Invariant: where there is no compiler, or it fails, the TwinCompiler says why instead; nothing else of the benchmark needs it. A
Twin's memory is its own until close(); arrays that it is given are kept alive by the caller.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.table_twin_source import SOURCE

COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-w")
SECONDS = 60.0
EPSILON = 1e-8
OPTIMIZERS = ("rowwise_adagrad", "adagrad")


class Form(NamedTuple):
    """How a twin's index is made: linear probing of 16-byte entries, or buckets of five filled to ``load``."""

    name: str
    linear: bool
    load: float


def columns_of(optimizer: str, dim: int) -> int:
    """Return how many state values a row of the twin has; of an optimizer that it does not know, one."""
    return dim if optimizer == "adagrad" else 1


FORMS = (Form("buckets_0.85", False, 0.85), Form("linear", True, 0.75))
ROOMY = Form("buckets_0.70", False, 0.70)


class TwinCompiler:
    """Compiles the twin for a width when it is first asked for; ``why`` says why it cannot, once that is known."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[int, int], Any] = {}
        self._compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
        self.why = None if self._compiler else f"no C compiler: none of {', '.join(COMPILERS)} is on the path"

    def library(self, dim: int, columns: int) -> Any:
        """Return the twin for rows of ``dim`` weights and ``columns`` state values, None if it cannot be had."""
        if self.why is None and (dim, columns) not in self._made:
            self._compile(dim, columns)
        return None if self.why else self._made[dim, columns]

    def _compile(self, dim: int, columns: int) -> None:
        source, library = self._folder / "twin.c", self._folder / f"twin_{dim}_{columns}.so"
        source.write_text(SOURCE, encoding="utf-8")
        sizes = (f"-DDIM={dim}", f"-DCOLUMNS={columns}")
        command = [str(self._compiler), *FLAGS, *sizes, "-o", str(library), str(source), "-lm"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.why = f"{self._compiler} does not run: {error}"
            return
        if ended.returncode:
            self.why = f"{self._compiler} fails: {ended.stderr.strip()[:200]}"
            return
        self._made[dim, columns] = _declare(ctypes.CDLL(str(library)))


def _declare(library: Any) -> Any:
    address, size, single = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    for name, result, arguments in (
        ("make", address, [ctypes.c_uint64] * 2 + [ctypes.c_uint32, ctypes.c_double]),
        ("free", None, [address]),
        ("bytes", size, [address]),
        ("touch", None, [address]),
        ("build", ctypes.c_int64, [address, address, size]),
        ("slots", None, [address, address, size, address]),
        ("pull", None, [address, address, size, address]),
        ("push", ctypes.c_int64, [address, address, size, address, single, single]),
        ("gather", None, [address, address, size, address]),
    ):
        function = getattr(library, f"twin_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Twin:
    """One C table with room for ``rows`` rows; keys: uint64[n], out and gradients: float32[n, dim], all contiguous."""

    def __init__(self, library: Any, form: Form, *, salt: np.uint64, rows: int) -> None:
        self._library = library
        self.name = form.name
        self._table = library.twin_make(int(salt), rows, int(form.linear), form.load)
        if not self._table:
            raise MemoryError(f"no memory for a twin of {rows} rows")

    @property
    def nbytes(self) -> int:
        return int(self._library.twin_bytes(self._table))

    def build(self, keys: NDArray[np.uint64]) -> int:
        """Enter keys, all rows zero; return how many rows there are, or -1 if there is no room."""
        return int(self._library.twin_build(self._table, keys.ctypes.data, keys.shape[0]))

    def touch(self) -> None:
        """Have memory of its own behind every row that there is room for."""
        self._library.twin_touch(self._table)

    def slots(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """Return the slots of keys, 2^32 - 1 for an absent one."""
        out = np.empty(keys.shape[0], np.uint32)
        self._library.twin_slots(self._table, keys.ctypes.data, keys.shape[0], out.ctypes.data)
        return out

    def pull(self, keys: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
        self._library.twin_pull(self._table, keys.ctypes.data, keys.shape[0], out.ctypes.data)

    def push(self, keys: NDArray[np.uint64], gradients: NDArray[np.float32], rate: float) -> int:
        """Apply a step, create absent rows; return how many rows there are, or -1 if there is no room for them."""
        pushed = self._library.twin_push(
            self._table, keys.ctypes.data, keys.shape[0], gradients.ctypes.data, rate, EPSILON
        )
        return int(pushed)

    def gather(self, slots: NDArray[np.uint32], out: NDArray[np.float32]) -> None:
        """Copy the rows at slots, no keys looked up."""
        self._library.twin_gather(self._table, slots.ctypes.data, slots.shape[0], out.ctypes.data)

    def close(self) -> None:
        if self._table:
            self._library.twin_free(self._table)
            self._table = None
