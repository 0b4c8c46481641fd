# SPDX-License-Identifier: Apache-2.0
"""Warm-up of a shard: what takes its time once, and holds the interpreter lock meanwhile, happens before it joins a job.

Kernels are compiled, or loaded from the cache; and Arrow writes and reads a block of a checkpoint, for which it loads pandas
(a quarter of a second, in which else the first cut of a job would let all pushes wait).
"""

import numpy as np

from oarlock.checkpoint.block_file import BlockImage, decode, encode
from oarlock.embedding import warmup


def warm_up() -> None:
    """Have everything that a shard needs compiled and loaded."""
    warmup.warm_up()
    one = np.zeros((1, 1), np.float32)
    decode(encode(BlockImage("rows", "a", 0, 0, {}, np.zeros(1, np.uint64), one, one)))
