# SPDX-License-Identifier: Apache-2.0
"""Tensors of a file in the safetensors format, as views of its bytes (``export/safetensors_file.py`` says how they lie).

Invariant: every view is within the bytes, of the dtype and shape that the header says; CorruptCheckpoint says what does not fit.
"""

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.errors import CorruptCheckpoint

_TYPES = {"U64": "<u8", "F32": "<f4", "U8": "u1", "I64": "<i8"}
MAX_HEADER_BYTES = 1 << 20


def read_tensors(data: Any, file: str) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file's bytes, by name."""
    whole = np.frombuffer(data, np.uint8)
    length = int(whole[:8].view("<u8")[0]) if len(whole) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(whole) - 8):
        raise corrupt(file, "its header is not as long as it says")
    try:
        header = json.loads(bytes(whole[8 : 8 + length]))
        found = {name: _tensor(whole[8 + length :], each) for name, each in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise corrupt(file, f"its header is damaged: {error}") from None
    return found


def _tensor(body: NDArray[np.uint8], told: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(_TYPES[told["dtype"]])
    begin, end = (int(n) for n in told["data_offsets"])
    shape = [int(n) for n in told["shape"]]
    if min([0, *shape]) < 0 or not 0 <= begin <= end <= len(body) or end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError("a tensor does not lie in it")
    return body[begin:end].view(dtype).reshape(shape)


def corrupt(file: str, problem: str) -> CorruptCheckpoint:
    """Return the error that says what is wrong with a file."""
    return CorruptCheckpoint(f"{file}: {problem}", file=file)
