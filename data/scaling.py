# SPDX-License-Identifier: Apache-2.0
"""Numbers as a model takes them: logarithm, fill, standardisation; and the moments that these are fitted by.

Invariant: made of IEEE float64 operations + - * / in a fixed order and exact powers of two, without the C library, so that
the same values give the same bits on every machine. Kernels hold no state; callable from any thread.

    out = (t - center) / scale,   t = log(x) if logarithmic else x, and t = fill where x is NaN (missing)
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oarlock.embedding.jit import jit

Floats = npt.NDArray[np.float32]

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


@jit
def natural_log(u: float) -> float:
    """Return log(u) of a finite u >= 1: u = m 2^e with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = math.frexp(u)
    if m < _SQRT_HALF:
        m *= 2.0
        e -= 1
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    # The series of atanh: |s| <= 0.172, so the first term that is left out is below 2^-60 of the sum.
    total = 1.0 / 23.0
    for i in range(11):
        total = total * square + 1.0 / (21.0 - 2.0 * i)
    return 2.0 * s * total + e * _LN2


@jit
def signed_log(x: float) -> float:
    """Return sign(x) * log(1 + |x|) of a finite x, exact to float32 also near 0."""
    size = abs(x)
    u = 1.0 + size
    # Near 0 the sum has lost bits of x; log(u) / (u - 1) has not (W. Kahan's way to log1p).
    y = size if u == 1.0 else natural_log(u) * (size / (u - 1.0))
    return -y if x < 0.0 else y


@jit
def _wide(x: np.float32) -> Any:
    return np.float64(x)


@jit
def scale_numbers(
    values: Floats, logarithmic: bool, fill: float, center: float, scale: float, out: Floats, column: int
) -> int:
    """Write values: float32[n] to ``out[:, column]``, NaN as fill; return the first row that is not finite, or -1."""
    bad = -1
    for i in range(values.shape[0]):
        x = _wide(values[i])
        if np.isnan(x):
            t = fill
        elif not np.isfinite(x):
            t = x
        else:
            t = signed_log(x) if logarithmic else x
        y = np.float32((t - center) / scale)
        if bad < 0 and not np.isfinite(y):
            bad = i
        out[i, column] = y
    return bad


@jit
def add_moments(values: Floats, logarithmic: bool, moments: npt.NDArray[np.float64]) -> None:
    """Merge the values that are not NaN into moments: float64[3], their count, mean and sum of squared deviations.

    The merge of two parts is Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm, 1979.
    """
    count = 0.0
    total = 0.0
    for i in range(values.shape[0]):
        x = _wide(values[i])
        if not np.isnan(x):
            count += 1.0
            total += signed_log(x) if logarithmic else x
    if count == 0.0:
        return
    mean = total / count
    squares = 0.0
    for i in range(values.shape[0]):
        x = _wide(values[i])
        if not np.isnan(x):
            d = (signed_log(x) if logarithmic else x) - mean
            squares += d * d
    both = moments[0] + count
    delta = mean - moments[1]
    moments[2] += squares + delta * delta * (moments[0] * count / both)
    moments[1] += delta * (count / both)
    moments[0] = both


class Scaling(NamedTuple):
    """How one number is scaled; ``fill`` stands in for the value after the logarithm."""

    logarithmic: bool
    fill: float
    center: float
    scale: float


def fit_scaling(
    moments: npt.NDArray[np.float64], *, logarithmic: bool, standardise: bool, fill: float | None
) -> Scaling:
    """Return the scaling of a number by its moments; ``fill``: None for the mean."""
    count, mean, squares = (float(moment) for moment in moments)
    deviation = math.sqrt(squares / count) if count else 0.0
    center, scale = (mean, deviation) if standardise else (0.0, 1.0)
    if scale < 1e-12 * max(1.0, abs(mean)) or not math.isfinite(scale):
        # A column of one value says nothing: it becomes 0, and another value later does not explode.
        scale = 1.0
    if fill is None:
        return Scaling(logarithmic, mean, center, scale)
    return Scaling(logarithmic, float(signed_log(float(fill))) if logarithmic else float(fill), center, scale)
