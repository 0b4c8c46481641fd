# SPDX-License-Identifier: Apache-2.0
"""The keys that left a block since the cut before, as an Arrow IPC file beside the increment: its tombstones.

Invariant: as of ``checkpoint/block_file.py``; keys ascend, each once, and a block that no key has left has no such file. A key
may have left and come back: then it is here and in the increment, which counts. Pure functions, from any thread.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.format import GONE, unreadable
from oarlock.checkpoint.frame import Identity, describe, joined, open_frame, pack_frame, refuse_names, refuse_nulls
from oarlock.checkpoint.waiting_file import refuse_other
from oarlock.proto.errors import InvalidArgument

_KEYS = pa.schema([pa.field("key", pa.uint64(), nullable=False)])


def encode_gone(image: BlockImage, gone: NDArray[np.uint64], *, after: int, compress: str | None = None) -> pa.Buffer:
    """Return the file of the increment ``image``. ``gone: uint64[g]`` in any order, a key at most once."""
    keys = np.sort(gone)
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise InvalidArgument(f"{image.where}: key {keys[twice[0]]} has left twice", name=image.name, block=image.block)
    identity = Identity(GONE, image.name, image.block, image.seq, image.marks)
    return joined(pack_frame(identity, _KEYS, [keys], after=after, compress=compress))


def decode_gone(data: Any, image: BlockImage, *, file: str = "tombstones", after: int | None) -> NDArray[np.uint64]:
    """Return the keys that a file's bytes hold, which must be of the increment ``image``; errors name ``file``."""
    version, identity, batch, found = open_frame(data, file, (GONE,))
    refuse_other(file, identity, found, image, after)
    try:
        refuse_nulls(batch)
        refuse_names(batch.schema.names, _KEYS.names, [])
        if not batch.schema.remove_metadata().equals(_KEYS):
            raise InvalidArgument(f"columns are {describe(batch.schema)}: expected {describe(_KEYS)}")
        keys: NDArray[np.uint64] = batch.column(0).to_numpy(zero_copy_only=True)
        wrong = np.flatnonzero(keys[1:] <= keys[:-1])
        if len(keys) == 0 or len(wrong):
            raise InvalidArgument(f"key {keys[wrong[0] + 1]} is out of order" if len(wrong) else "it is empty")
    except (InvalidArgument, ValueError) as error:
        raise unreadable(file, version, str(error)) from None
    return keys
