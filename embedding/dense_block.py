# SPDX-License-Identifier: Apache-2.0
"""A dense block's content as plain arrays. No state, any thread."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class DenseBlock(NamedTuple):
    """A dense block's content: weights: float32[length], state: float32[state columns of that length]."""

    weights: NDArray[np.float32]
    state: NDArray[np.float32]
