# SPDX-License-Identifier: Apache-2.0
"""The one decorator of all kernels, and where their machine code is kept.

Invariant: the cache folder is named after a digest of every kernel source, of numba's and LLVM's versions and of the
CPU, because numba itself does not see that a callee in another module has changed.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding
import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

KERNEL_PACKAGES = ("embedding", "nn", "data")


def source_digest(root: Path) -> str:
    """Return a digest of all sources that can hold a kernel, under the package folder ``root``."""
    digest = hashlib.sha256()
    for package in KERNEL_PACKAGES:
        for path in sorted((root / package).glob("**/*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        llvmlite.binding.get_host_cpu_name(),
        llvmlite.binding.get_host_cpu_features().flatten(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


@cache
def kernel_folder() -> Path:
    """Return the folder of this install's compiled kernels, made if need be.

    It lies under ``$XDG_CACHE_HOME`` (default ``~/.cache``); where that cannot be written, under the temporary folder.
    """
    name = Path("oarlock") / "kernels" / source_digest(Path(__file__).resolve().parent.parent)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for base in (Path(home), Path(tempfile.gettempdir()) / f"oarlock-{os.getuid()}"):
        folder = base / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError(f"no folder can be written for compiled kernels: tried {home} and {tempfile.gettempdir()}")


def jit(function: F) -> F:
    """Compile ``function`` as a kernel: no interpreter lock, cached on disk, IEEE arithmetic without contraction."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(kernel_folder())
    try:
        compiled: F = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled


def compile_callback(function: F, signature: Any) -> Any:
    """Compile ``function`` for callers that know only its address (``embedding/callback.py``), under the same rules."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(kernel_folder())
    try:
        return numba.cfunc(signature, cache=True, fastmath=False, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before
