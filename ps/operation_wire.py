# SPDX-License-Identifier: Apache-2.0
"""Operations as messages (proto/shard.proto): what an owner writes, and what a member believes of it.

Invariant: ``decode`` returns what ``encode`` was given, values to the bit, or raises a PSError by name. What it returns agrees
with the layout: blocks are the job's, each named once, keys are of their blocks and named once, lengths fit together. Whether the
copies here are such that they can take it is ``apply``'s to check. Pure; any thread.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.client.closed import MAX_SPLIT, ClosedSet
from oarlock.client.job import MAX_RANKS
from oarlock.client.layout import Layout
from oarlock.embedding import check
from oarlock.embedding.dense_block import DenseBlock
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.live import LiveBlock
from oarlock.embedding.pointer import kernel_array
from oarlock.proto import shard_pb2 as pb
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, pack, unpack
from oarlock.proto.errors import Malformed, OutOfMemory
from oarlock.ps.does import Does, Image, Operation, Pushed, Stepped, Swept, Undone, nbytes
from oarlock.ps.rank_marks import STEP_MARK
from oarlock.ps.request import (
    STEP_LIMIT,
    DensePush,
    Keys,
    RowPush,
    read_dense,
    read_keys,
    read_rows,
    read_step,
    refuse_parts,
    refuse_unpacked,
)

# Of a job's closed set, if who reads does not say.
WIDEST_WINDOW = 1 << 24
# float32 holds the samples of a rank's step exactly.
MOST_SAMPLES = MAX_RANKS << 24
MOST_UNDONE = 65535
# What is left of a message for all that is not arrays.
ENVELOPE_BYTES = 1 << 20

Parts = Sequence[Part]


def encode(
    layout: Layout, operation: Operation, generations: NDArray[np.int64], beside: list[Part] | None
) -> pb.Operation:
    """Return an operation as a message, with large arrays put ``beside`` it (None: in itself).

    ``generations`` int64[m]: of the records of its blocks. OutOfMemory if it is more than a message may hold.
    """
    does = operation.does
    if nbytes(operation) > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        name, block = layout.name(int(operation.numbers[0]))
        raise OutOfMemory(
            f"what is told of block {block} of {name} is {nbytes(operation)} bytes ({type(does).__name__}), over the limit of "
            f"{MAX_MESSAGE_BYTES} bytes in one message: give {name} more blocks",
            block=int(operation.numbers[0]),
        )
    message = pb.Operation(
        blocks=pack(operation.numbers, beside),
        generations=pack(generations.astype(np.uint64), beside),
        sequences=pack(operation.sequences.astype(np.uint64), beside),
    )
    if isinstance(does, Pushed):
        message.push.CopyFrom(_push(does, beside))
        message.tick = does.tick
    elif isinstance(does, Swept):
        message.swept.CopyFrom(pb.SweptRows(gone=pack(does.gone, beside), decayed=pack(does.decayed, beside)))
    elif isinstance(does, Undone):
        message.undone.CopyFrom(pb.UndoneRows(keys=_keys(does.keys, beside), steps=does.steps))
    elif isinstance(does, Stepped):
        message.applied.CopyFrom(pb.AppliedStep(step=does.step, samples=does.samples))
    else:
        message.image.CopyFrom(_image(does, beside))
    return message


def _keys(keys: Keys, beside: list[Part] | None) -> pb.TableKeys:
    return pb.TableKeys(
        table=keys.table,
        keys=pack(keys.keys, beside),
        blocks=pack(keys.blocks, beside),
        counts=pack(keys.counts, beside),
    )


def _push(pushed: Pushed, beside: list[Part] | None) -> pb.PushRequest:
    # Its step counts the groups of before it, as a worker's does.
    message = pb.PushRequest(split=pushed.split, group=pushed.group, step=pushed.step - 1, rank=pushed.rank + 1)
    for part in pushed.rows:
        made = message.tables.add(keys=_keys(part.keys, beside), gradients=pack(part.gradients, beside), rate=part.rate)
        for name, array in (("occurrences", part.occurrences), ("clicks", part.clicks)):
            if len(array):
                getattr(made, name).CopyFrom(pack(array, beside))
    for each in pushed.dense:
        message.dense.add(blocks=pack(each.numbers, beside), gradients=pack(each.gradients, beside), rate=each.rate)
    return message


def _image(image: Image, beside: list[Part] | None) -> pb.BlockImage:
    marks, content = image.marks, image.content
    message = pb.BlockImage(
        splits=pack(np.array(list(marks), np.uint64), beside),
        groups=pack(np.array(list(marks.values()), np.uint64), beside),
        closed=image.closed.pack(),
        staged=[_push(pushed, beside) for pushed in image.staged],
        step=image.step,
    )
    if isinstance(content, DenseBlock):
        message.records.CopyFrom(pack(content.weights[None], beside))
        message.others.CopyFrom(pack(content.state[None], beside))
    else:
        message.records.CopyFrom(pack(content.records, beside))
        message.others.CopyFrom(pack(content.others, beside))
        message.waiting.CopyFrom(pack(content.waiting, beside))
        message.waited.CopyFrom(pack(content.waited, beside))
        message.sketch.CopyFrom(pack(np.frombuffer(content.sketch, np.uint8), beside))
        message.left = content.left
    return message


def decode(
    layout: Layout, message: pb.Operation, parts: Parts = (), *, window: int = WIDEST_WINDOW
) -> tuple[Operation, NDArray[np.int64]]:
    """Return an operation and int64[m]: the generations of its blocks' records, as their owner knows them.

    ``window``: how far above its floor a closed set of the job reaches (``JobSpec.closed_window``).
    """
    numbers = unpack(message.blocks, np.int32, "blocks of an operation", parts=parts)
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= layout.blocks:
        raise Malformed(f"an operation of {len(numbers)} blocks: give some of 0 to {layout.blocks - 1}")
    ordered = np.sort(numbers)
    if (ordered[1:] == ordered[:-1]).any():
        raise Malformed("a block comes twice in an operation")
    generations = _counts(message.generations, "generations of an operation", len(numbers), parts)
    sequences = _counts(message.sequences, "sequences of an operation", len(numbers), parts)
    does: Does
    kind = message.WhichOneof("does")
    if kind == "push":
        does = replace(_read_push(layout, message.push, parts), tick=_read_tick(message))
        _agree(numbers, does.numbers)
    elif kind == "swept":
        does = _read_swept(layout, message.swept, numbers, parts)
    elif kind == "undone":
        does = _read_undone(layout, message.undone, parts)
        _agree(numbers, does.keys.numbers)
    elif kind == "applied":
        does = Stepped(message.applied.step, message.applied.samples)
        if not 0 < does.step < STEP_LIMIT or does.samples > MOST_SAMPLES:
            raise Malformed(f"step {does.step} with {does.samples} samples: there is no such step")
    elif kind == "image":
        _one(numbers)
        does = _read_image(layout, message.image, int(numbers[0]), int(sequences[0]), parts, window)
    else:
        raise Malformed("an operation that does nothing this shard knows of")
    return Operation(numbers, sequences, does), generations


def _counts(message: Any, what: str, wanted: int, parts: Parts) -> NDArray[np.int64]:
    found = unpack(message, np.uint64, what, parts=parts)
    if len(found) != wanted:
        raise Malformed(f"{what}: {len(found)} of them for {wanted} blocks")
    if len(found) and found.max() >= STEP_LIMIT:
        raise Malformed(f"{what}: {int(found.max())} is beyond {STEP_LIMIT}")
    return found.astype(np.int64)


def _agree(numbers: NDArray[np.int32], found: NDArray[np.int32]) -> None:
    if not np.array_equal(numbers, found):
        raise Malformed(f"an operation of {len(numbers)} blocks with parts for {len(found)}, or for others")


def _one(numbers: NDArray[np.int32]) -> None:
    if len(numbers) != 1:
        raise Malformed(f"an operation of one block names {len(numbers)}")


def _check_keys(layout: Layout, keys: Keys) -> Keys:
    """Raise Malformed unless all keys are of the blocks that they came for, and none comes twice."""
    spec = layout.tables[keys.table]
    fault = np.zeros(1, np.int64)
    places = np.zeros(2 << len(keys.keys).bit_length(), np.int32)
    bits = spec.blocks.bit_length() - 1
    own = kernel_array("keys", keys.keys, np.uint64)
    blocks, counts = (kernel_array("blocks", array, np.int32) for array in (keys.blocks, keys.counts))
    if check.check_keys(table_salt(spec.name), bits, own, blocks, counts, places, fault) != check.FINE:
        raise Malformed(
            f"table {spec.name}: key {int(keys.keys[fault[0]])} does not hash to the block it is told of, or comes twice"
        )
    return keys


def _read_push(layout: Layout, message: pb.PushRequest, parts: Parts) -> Pushed:
    refuse_parts(layout, len(message.tables) + len(message.dense))
    refuse_unpacked(message)
    if message.group >= 1 << 31 or message.split > MAX_SPLIT or message.rank > MAX_RANKS:
        raise Malformed(f"group {message.group} of split {message.split}, rank {message.rank}: there is no such push")
    rows: list[RowPush] = [read_rows(layout, part, parts) for part in message.tables]
    dense: list[DensePush] = [read_dense(layout, part, parts) for part in message.dense]
    for part in rows:
        _check_keys(layout, part.keys)
    step = read_step(message.step)
    return Pushed(message.split, message.group, step, tuple(rows), tuple(dense), message.rank - 1)


def _read_tick(message: pb.Operation) -> int:
    if message.tick >= STEP_LIMIT:
        raise Malformed(f"tick {message.tick} is beyond {STEP_LIMIT}")
    return message.tick


def _read_swept(layout: Layout, message: pb.SweptRows, numbers: NDArray[np.int32], parts: Parts) -> Swept:
    _one(numbers)
    number = int(numbers[0])
    if number >= layout.dense_base:
        raise Malformed(f"block {number} is dense, and has no rows to sweep")
    name, block = layout.name(number)
    gone = unpack(message.gone, np.uint64, "keys that left", parts=parts)
    decayed = unpack(message.decayed, np.uint64, "keys that decayed", parts=parts)
    keys = np.concatenate([gone, decayed])
    if not len(keys):
        raise Malformed(f"block {number}: a sweep that did nothing is no operation")
    groups = np.array([[block], [len(keys)]], np.int32)
    whole = Keys(layout.table_index[name], keys, groups[0], groups[1], numbers)
    _check_keys(layout, whole)
    return Swept(gone, decayed)


def _read_undone(layout: Layout, message: pb.UndoneRows, parts: Parts) -> Undone:
    keys = _check_keys(layout, read_keys(layout, message.keys, parts))
    spec = layout.tables[keys.table]
    if not spec.guard.undo or not 1 <= message.steps <= MOST_UNDONE:
        raise Malformed(f"table {spec.name}: {message.steps} updates undone: it keeps {spec.guard.undo} old values")
    return Undone(keys, message.steps)


def _read_image(layout: Layout, message: pb.BlockImage, number: int, sequence: int, parts: Parts, window: int) -> Image:
    content: LiveBlock | DenseBlock
    if number >= layout.dense_base:
        length = layout.dense_blocks[number - layout.dense_base].length
        weights = unpack(message.records, np.float32, f"weights of block {number}", dims=2, columns=length, parts=parts)
        state = unpack(message.others, np.float32, f"state of block {number}", dims=2, parts=parts)
        if len(weights) != 1 or len(state) != 1:
            raise Malformed(
                f"block {number}: {len(weights)} lines of weights and {len(state)} of state: give one of each"
            )
        content = DenseBlock(weights[0], state[0])
    else:
        if message.left >= STEP_LIMIT:
            raise Malformed(f"block {number}: left = {message.left} is no version of a row")
        content = LiveBlock(
            unpack(message.records, np.uint8, f"records of block {number}", dims=2, parts=parts),
            unpack(message.waiting, np.uint64, f"waiting keys of block {number}", parts=parts),
            unpack(message.waited, np.uint32, f"counts of block {number}", parts=parts),
            unpack(message.sketch, np.uint8, f"sketch of block {number}", parts=parts).tobytes(),
            message.left,
            sequence,
            unpack(message.others, np.uint8, f"other records of block {number}", dims=2, parts=parts),
        )
    staged = []
    if len(message.staged) > MAX_RANKS:
        raise Malformed(f"block {number}: parts of {len(message.staged)} ranks")
    for part in message.staged:
        staged.append(_read_push(layout, part, parts))
        if staged[-1].numbers.tolist() != [number] or staged[-1].rank < 0:
            raise Malformed(f"block {number}: a staged part of rank {staged[-1].rank} is of another block")
    closed = ClosedSet.unpack(message.closed, window)
    if message.step >= STEP_LIMIT:
        raise Malformed(f"block {number}: step {message.step} is beyond {STEP_LIMIT}")
    return Image(number, sequence, content, _read_marks(message, number, parts), closed, tuple(staged), message.step)


def _read_marks(message: pb.BlockImage, number: int, parts: Parts) -> dict[int, int]:
    splits = unpack(message.splits, np.uint64, f"splits of block {number}", parts=parts)
    groups = unpack(message.groups, np.uint64, f"groups of block {number}", parts=parts)
    if len(splits) != len(groups) or len(np.unique(splits)) != len(splits):
        raise Malformed(f"block {number}: {len(splits)} splits with {len(groups)} groups, or one twice")
    if len(splits) and (splits.max() > STEP_MARK or groups.max() >= STEP_LIMIT):
        raise Malformed(f"block {number}: a mark of split {int(splits.max())}, group {int(groups.max())}")
    return dict(zip(splits.tolist(), groups.tolist(), strict=True))
