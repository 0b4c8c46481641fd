# SPDX-License-Identifier: Apache-2.0
"""The compute signature: what a worker's sums depend on besides its data, which mode sync holds equal (SEMANTICS section 5).

Invariant: two processes with equal signatures and equal threads of matrix products give equal sums to the bit. Any thread.
"""

import json
import platform
from importlib.metadata import version

from oarlock import __version__
from oarlock.client.processors import loaded_blas


def compute_signature() -> str:
    """Return this process's signature: a JSON object of texts by the name of the part."""
    blas = loaded_blas()
    return json.dumps(
        {
            "architecture": platform.machine(),
            "blas": blas.name,
            "blas_kernels": blas.kernels,
            "numba": version("numba"),
            "numpy": version("numpy"),
            "c_library": " ".join(platform.libc_ver()) or "unknown",
            "oarlock": __version__,
        }
    )
