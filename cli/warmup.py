# SPDX-License-Identifier: Apache-2.0
"""`oarlock warmup`: compile every kernel once, so that no process of a job has to."""

import time

from oarlock.embedding.jit import kernel_folder
from oarlock.launch.kernels import compile_or_load


def warmup() -> int:
    """Fill the kernel cache and say where it is."""
    begun = time.monotonic()
    compile_or_load()
    print(f"kernels ready in {time.monotonic() - begun:.1f} s: {kernel_folder()}")
    return 0
