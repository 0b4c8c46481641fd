# SPDX-License-Identifier: Apache-2.0
"""Operations as bytes: what is no operation of this job is refused by name and changes nothing, however it is broken."""

from dataclasses import replace

import numpy as np
import pytest
import rig
from copies_rig import Copies, spec_of

from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack
from oarlock.proto.errors import Malformed, OutOfMemory, PSError, UnknownTable
from oarlock.proto.shard_pb2 import Operation as Message
from oarlock.ps.images import image_of
from oarlock.ps.operations import (
    Operation,
    Pushed,
    apply,
    decode,
    encode,
    nbytes,
    pieces,
)
from oarlock.ps.request import STEP_LIMIT, Keys, RowPush


@pytest.fixture(scope="module")
def told():
    """One operation of each kind, from a shard of each mode that needs it, by (kind, staged)."""
    found = {}
    for mode in ("async", "sync"):
        copies = Copies(spec_of(mode=mode, ranks=2 * (mode == "sync")), 3, members=1)
        copies.copy(1.0)
        for _ in range(12):
            if mode == "sync":
                copies.train_step(2)
            else:
                for act in (copies.push, copies.sweep, copies.undo):
                    act()
        if mode == "sync":
            next(copies.stage(2))
        copies.copy(1.0)
        for operation in record(copies):
            found[type(operation.does).__name__, mode] = (copies, operation)
        dense = copies.layout.dense_base
        found["Image of dense values", mode] = copies, image(copies, dense)
    yield found
    for kind, mode in KINDS:
        found[kind, mode][0].close()


def record(copies):
    """Do some more, and return what was told of it."""
    seen = []
    copies.queue = seen
    for _ in range(30):
        if copies.owner.staged is None:
            for act in (copies.push, copies.push, copies.sweep, copies.undo):
                act()
        elif not seen:
            copies.train_step(2)
    seen.append(image(copies, 1))
    return seen


def image(copies, number):
    return Operation(
        np.array([number], np.int32), np.array([copies.owner.operations(number)]), image_of(copies.owner, number)
    )


def message_of(told, kind, mode):
    copies, operation = told[kind, mode]
    message = encode(copies.layout, operation, np.ones(len(operation.numbers), np.int64), None)
    return copies.layout, Message.FromString(message.SerializeToString())


KINDS = [
    *((kind, "async") for kind in ("Pushed", "Swept", "Undone", "Image", "Image of dense values")),
    *((kind, "sync") for kind in ("Pushed", "Stepped", "Image", "Image of dense values")),
]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_what_arrives_is_what_was_sent(told, kind, mode):
    layout, message = message_of(told, kind, mode)
    operation, generations = decode(layout, message)
    assert generations.tolist() == [1] * len(operation.numbers)
    again = encode(layout, operation, generations, None)
    assert again.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)
    sent = told[kind, mode][1]
    assert nbytes(operation) == nbytes(sent) > 0


def test_rows_age_as_their_owner_says(told):
    """From the tick that came, and not from the step: a push may be of a worker that knows an old one."""
    layout, message = message_of(told, "Pushed", "async")
    operation, generations = decode(layout, message)
    later = Operation(operation.numbers, operation.sequences, replace(operation.does, tick=12345))
    again, _ = decode(layout, encode(layout, later, generations, None))
    assert (again.does.step, again.does.tick) == (operation.does.step, 12345)
    message.tick = STEP_LIMIT
    with pytest.raises(Malformed, match="tick"):
        decode(layout, message)
    message.tick = 0


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_broken_bytes_are_refused_or_are_an_operation(told, kind, mode, rng):
    layout, message = message_of(told, kind, mode)
    data = message.SerializeToString()
    refused, member = 0, told[kind, mode][0].members[0]
    for _ in range(300):
        broken = bytearray(data)
        if rng.random() < 0.3:
            broken = broken[: rng.integers(len(broken))]
        else:
            # Sizes, kinds and numbers are mostly at the front of what they are of.
            for _ in range(int(rng.integers(1, 4))):
                broken[int(len(broken) * rng.random() ** 2)] = rng.integers(256)
        try:
            found = Message.FromString(bytes(broken))
        except Exception:
            continue
        try:
            operation, _ = decode(layout, found)
            assert operation.numbers.max() < layout.blocks
            # Whatever it makes of copies then, it is no more than another error.
            with member.push_lock:
                apply(member, operation)
        except PSError:
            refused += 1
    assert refused > 0


def array(dtype, *values):
    return pack(np.array(values, dtype))


def tampered(kind, mode, change, error, text):
    return pytest.param(kind, mode, change, error, text, id=text)


TAMPERED = [
    tampered("Stepped", "sync", lambda m: m.blocks.Clear(), Malformed, "an operation of 0 blocks"),
    tampered("Stepped", "sync", lambda m: m.blocks.CopyFrom(array(np.int32, -1)), Malformed, "give some of 0 to"),
    tampered("Stepped", "sync", lambda m: m.blocks.CopyFrom(array(np.int32, 999)), Malformed, "give some of 0 to 18"),
    tampered(
        "Stepped", "sync", lambda m: m.blocks.CopyFrom(array(np.int32, 1, 2, 1)), Malformed, "a block comes twice"
    ),
    tampered(
        "Stepped", "sync", lambda m: m.blocks.CopyFrom(array(np.uint64, 1)), Malformed, "dtype uint64, wanted int32"
    ),
    tampered("Stepped", "sync", lambda m: m.generations.Clear(), Malformed, "generations of an operation: 0 of them"),
    tampered("Stepped", "sync", lambda m: m.sequences.Clear(), Malformed, "sequences of an operation: 0 of them"),
    tampered("Image", "async", lambda m: m.sequences.CopyFrom(array(np.uint64, 1 << 63)), Malformed, "is beyond"),
    tampered("Stepped", "sync", lambda m: m.ClearField("applied"), Malformed, "does nothing this shard knows of"),
    tampered("Stepped", "sync", lambda m: setattr(m.applied, "step", 0), Malformed, "there is no such step"),
    tampered("Stepped", "sync", lambda m: setattr(m.applied, "samples", 1 << 40), Malformed, "there is no such step"),
    tampered("Pushed", "async", lambda m: m.push.tables.pop(), Malformed, "with parts for"),
    tampered("Pushed", "async", lambda m: m.push.tables.append(m.push.tables[0]), Malformed, "with parts for"),
    tampered("Pushed", "async", lambda m: setattr(m.push, "group", 1 << 31), Malformed, "there is no such push"),
    tampered("Pushed", "async", lambda m: setattr(m.push, "split", 1 << 63), Malformed, "there is no such push"),
    tampered("Pushed", "async", lambda m: setattr(m.push.tables[0].keys, "table", 77), UnknownTable, "names table 77"),
    tampered(
        "Pushed",
        "async",
        lambda m: m.push.tables[0].keys.keys.CopyFrom(
            pack(np.arange(m.push.tables[0].keys.keys.shape[0], dtype=np.uint64))
        ),
        Malformed,
        "does not hash to the block",
    ),
    tampered("Pushed", "sync", lambda m: setattr(m.push, "rank", 5000), Malformed, "rank 5000: there is no such push"),
    tampered("Swept", "async", lambda m: m.swept.Clear(), Malformed, "a sweep that did nothing"),
    tampered("Swept", "async", lambda m: m.blocks.CopyFrom(array(np.int32, 15)), Malformed, "has no rows to sweep"),
    tampered(
        "Swept", "async", lambda m: m.swept.gone.CopyFrom(array(np.uint64, *range(40))), Malformed, "does not hash"
    ),
    tampered("Undone", "async", lambda m: setattr(m.undone, "steps", 0), Malformed, "0 updates undone"),
    tampered("Undone", "async", lambda m: setattr(m.undone.keys, "table", 1), Malformed, "does not hash|outside"),
    tampered(
        "Image", "async", lambda m: m.blocks.CopyFrom(array(np.int32, 15)), Malformed, "weights of block 15: dtype"
    ),
    tampered("Image", "async", lambda m: setattr(m.image, "left", 1 << 63), Malformed, "is no version of a row"),
    tampered(
        "Image", "async", lambda m: setattr(m.image, "step", 1 << 63), Malformed, "step 9223372036854775808 is beyond"
    ),
    tampered("Image", "async", lambda m: m.image.splits.CopyFrom(array(np.uint64, 1, 1)), Malformed, "or one twice"),
    tampered(
        "Image", "async", lambda m: m.image.groups.CopyFrom(array(np.uint64, 1, 1, 1, 1, 9)), Malformed, "with 5 groups"
    ),
    tampered(
        "Image", "async", lambda m: m.image.staged.add(rank=1), Malformed, "a staged part of rank 0 is of another block"
    ),
    tampered(
        "Image", "async", lambda m: setattr(m.image.closed, "bitmap", bytes(1 << 20)), Malformed, "a closed set reaches"
    ),
    tampered(
        "Image of dense values", "async", lambda m: m.image.others.Clear(), Malformed, "lines of weights and 0 of state"
    ),
]


@pytest.mark.parametrize(("kind", "mode", "change", "error", "text"), TAMPERED)
def test_a_tampered_operation_is_refused_by_name(told, kind, mode, change, error, text):
    layout, message = message_of(told, kind, mode)
    if kind == "Stepped":
        for field in (message.blocks, message.generations, message.sequences):
            field.CopyFrom(array(np.int32 if field is message.blocks else np.uint64, 1))
    change(message)
    with pytest.raises(error, match=text):
        decode(layout, message, window=1024)


def test_parts_are_those_of_some_blocks(told):
    copies, operation = told["Pushed", "async"]
    for _ in range(20):
        chosen = copies.rng.random(len(operation.numbers)) < 0.4
        some = operation.only(chosen)
        if some is None:
            assert not chosen.any()
            continue
        assert some.numbers.tolist() == some.does.numbers.tolist() == operation.numbers[chosen].tolist()
        assert decode(copies.layout, encode(copies.layout, some, np.zeros(len(some.numbers), np.int64), None))
    assert operation.only(np.ones(len(operation.numbers), np.bool_)) is operation
    _, undone = told["Undone", "async"]
    first = undone.only(np.arange(len(undone.numbers)) == 0)
    assert first.does.keys.numbers.tolist() == undone.numbers[:1].tolist()


def test_pieces_are_the_whole_cut_between_blocks(told):
    _, operation = told["Pushed", "async"]
    assert pieces(operation, 1 << 30) == [operation]
    cut = pieces(operation, nbytes(operation) // 3)
    assert len(cut) > 2
    assert np.concatenate([piece.numbers for piece in cut]).tolist() == operation.numbers.tolist()
    assert all(piece.numbers.tolist() == piece.does.numbers.tolist() for piece in cut)
    assert {len(piece.numbers) for piece in pieces(operation, 0)} == {1}


def test_what_is_too_large_for_a_message_is_named():
    layout = rig.Layout((TableSpec("big", 64, blocks=1),), ())
    n = MAX_MESSAGE_BYTES // 4 // 64
    keys = Keys(0, np.arange(n, dtype=np.uint64), *np.array([[0], [n], [0]], np.int32))
    rows = RowPush(keys, np.zeros((n, 64), np.float32), 0.1, np.empty(0, np.uint32), np.empty(0, np.float32))
    operation = Operation(np.array([0], np.int32), np.array([1]), Pushed(0, 0, 1, (rows,), ()))
    with pytest.raises(OutOfMemory, match=r"block 0 of big is \d+ bytes \(Pushed\).*give big more blocks"):
        encode(layout, operation, np.array([1]), [])
