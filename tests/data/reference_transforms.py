# SPDX-License-Identifier: Apache-2.0
"""Plain Python twins of the kernels of tabular data: slow, obvious, one row at a time."""

import hashlib
import math

MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def at_least_16(h: int) -> int:
    return h + 16 if h < 16 else h


def hash_value(value: str | int | bytes | None) -> int:
    if value is None:
        return 0
    octets = value if isinstance(value, bytes) else str(value).encode()
    h = mix64(len(octets))
    for i in range(0, len(octets), 8):
        h = mix64(h ^ int.from_bytes(octets[i : i + 8], "little"))
    return at_least_16(h)


def cross(codes: list[int]) -> int:
    h = mix64(len(codes))
    for code in codes:
        h = at_least_16(mix64(h ^ code))
    return h


def fold(code: int, buckets: int) -> int:
    return 16 + (mix64(code) * buckets >> 64) if code else 0


def bucket(value: float, bounds: list[float]) -> int:
    return 0 if math.isnan(value) else 16 + sum(bound <= value for bound in bounds)


def key(field: str, code: int) -> int:
    salt = int.from_bytes(hashlib.sha256(b"field " + field.encode()).digest()[:8], "little")
    return mix64(code ^ salt)


def signed_log(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)
