# SPDX-License-Identifier: Apache-2.0
"""What a block knows of keys without a row, as an Arrow IPC file beside the block's own: counts of keys, or a sketch.

Invariant: as of ``checkpoint/block_file.py``, whose images both files make up; a block that knows nothing of such keys has
no such file. Pure functions, from any thread.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.format import WAITING, unreadable
from oarlock.checkpoint.frame import Identity, describe, joined, open_frame, pack_frame, refuse_names, refuse_nulls
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument

_COUNTS = pa.schema([pa.field("key", pa.uint64(), nullable=False), pa.field("count", pa.uint32(), nullable=False)])
_SKETCH = pa.schema([pa.field("sketch", pa.uint8(), nullable=False)])


def knows_waiting(image: BlockImage) -> bool:
    """Tell whether the block has such a file."""
    return len(image.waiting) > 0 or len(image.sketch) > 0


def encode_waiting(image: BlockImage, *, after: int | None = None, compress: str | None = None) -> pa.Buffer:
    """Return the file: keys in ascending order; InvalidArgument names a key that is there twice or was never counted."""
    identity = Identity(WAITING, image.name, image.block, image.seq, image.marks)
    if len(image.sketch):
        sketch = np.frombuffer(image.sketch, np.uint8)
        return joined(pack_frame(identity, _SKETCH, [sketch], after=after, compress=compress))
    order = np.argsort(image.waiting)
    keys, counts = image.waiting[order], image.waited[order]
    problem = _first_problem(image, keys, counts)
    if problem:
        raise InvalidArgument(f"{image.where}: {problem}", name=image.name, block=image.block)
    return joined(pack_frame(identity, _COUNTS, [keys, counts], after=after, compress=compress))


def decode_waiting(data: Any, image: BlockImage, *, file: str = "waiting file", after: int | None = None) -> BlockImage:
    """Return ``image`` with what the file's bytes hold, which must be of the same block and instant; errors name ``file``."""
    version, identity, batch, found = open_frame(data, file, (WAITING,))
    refuse_other(file, identity, found, image, after)
    try:
        refuse_nulls(batch)
        schema = _SKETCH if "sketch" in batch.schema.names else _COUNTS
        refuse_names(batch.schema.names, schema.names, [])
        if not batch.schema.remove_metadata().equals(schema):
            raise InvalidArgument(
                f"columns are {describe(batch.schema)}: expected {describe(_COUNTS)}; or {describe(_SKETCH)}"
            )
        if batch.num_rows == 0:
            raise InvalidArgument("it is empty")
    except (InvalidArgument, ValueError) as error:
        raise unreadable(file, version, str(error)) from None
    values = [column.to_numpy(zero_copy_only=True) for column in batch.columns]
    if schema is _SKETCH:
        return replace(image, sketch=values[0].tobytes())
    problem = _first_problem(image, *values)
    if problem:
        raise CorruptCheckpoint(f"{file}: {image.where}: {problem}", file=file, name=image.name, block=image.block)
    return replace(image, waiting=values[0], waited=values[1])


def refuse_other(file: str, identity: Identity, found: int | None, image: BlockImage, after: int | None) -> None:
    """Raise CorruptCheckpoint unless a file beside the block's own is of the same block, instant and link."""
    if identity[1:] != (image.name, image.block, image.seq, image.marks) or found != after:
        raise CorruptCheckpoint(
            f"{file}: it is of table {identity.name}, block {identity.block} after {identity.seq} operations, "
            f"not of {image.where} after {image.seq}",
            file=file,
        )


def _first_problem(image: BlockImage, keys: Any, counts: Any) -> str | None:
    wrong = np.flatnonzero(keys[1:] <= keys[:-1])
    if len(wrong):
        at = int(wrong[0])
        return f"waiting key {keys[at + 1]} {'is there twice' if keys[at] == keys[at + 1] else 'is out of order'}"
    never = np.flatnonzero(counts == 0)
    if len(never):
        return f"waiting key {keys[never[0]]} came 0 times"
    both = np.intersect1d(keys, image.keys, assume_unique=True)
    return f"key {both[0]} has a row, and waits for one" if len(both) else None
