# SPDX-License-Identifier: Apache-2.0
"""`oarlock warmup`: compile every kernel once, so that no process of a job has to."""

import time

from oarlock.embedding.jit import kernel_folder
from oarlock.embedding.warmup import warm_up as warm_up_shard
from oarlock.worker.warmup import warm_up as warm_up_worker


def warmup() -> int:
    """Fill the kernel cache and say where it is."""
    begun = time.monotonic()
    warm_up_shard()
    warm_up_worker()
    print(f"kernels ready in {time.monotonic() - begun:.1f} s: {kernel_folder()}")
    return 0
