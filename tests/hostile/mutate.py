# SPDX-License-Identifier: Apache-2.0
"""Mutations of valid messages: of their bytes, of their fields, of the arrays in them, and of the frames that carry them.

Invariant: a pure function of the generator's state, so a seed gives the same inputs again.
Cheap: a long run makes millions.
"""

import random
import struct

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

_F = FieldDescriptor
INTEGERS = (0, 1, 2, 3, 5, 63, 64, 127, 128, 255, 1023, 1024, 1025, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LONG = (*INTEGERS, 1 << 32, (1 << 53) + 1, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e15, 1e38, 1e300, -1e300, 1.7e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "\0",
    "a\0b",
    "/",
    "..",
    "x" * 5000,
    "{}",
    "[]",
    "null",
    '{"a": 1e999}',
    '{"a": NaN}',
    '{"a": "\\ud800"}',
    '{"a":' * 300 + "1" + "}" * 300,
    '{"a":' * 900 + "1" + "}" * 900,
    "[" * 2000,
    '{"a": ' + "9" * 5000 + "}",
    "127.0.0.1:99999",
    "unix:\0",
    "in-process:x",
    "\u202e\n\r\t%s%n",
    "🚣" * 300,
)
BYTES = (b"", b"\0", b"\xff" * 16, b"\0" * 4096, b"\xff" * 128, b"\x80" * 11)
_LONGS = (_F.TYPE_UINT64, _F.TYPE_INT64, _F.TYPE_FIXED64, _F.TYPE_SINT64)


def any_bytes(rng: random.Random) -> bytes:
    """Return bytes that nobody meant as a message."""
    return rng.randbytes(rng.choice((0, 1, 2, 3, 8, 20, 60, 200)))


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` with one to four of its bytes, or stretches of them, changed."""
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(8)
        stretch = out[at : at + rng.choice((1, 2, 4, 8, 30))]
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + len(stretch)]
        elif kind == 4:
            out[at:at] = stretch * rng.choice((1, 2, 50))
        elif kind == 5:
            # A length, or a number, as large as a varint can be, and one byte longer than that.
            out[at : at + 1] = rng.choice((b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff" * 10 + b"\x01"))
        elif kind == 6:
            to = rng.randrange(len(out) + 1)
            out[to : to + len(stretch)] = stretch
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 3, 10)))
    return bytes(out)


def message_of(rng: random.Random, message: object) -> None:
    """Change one to three fields of ``message``, anywhere in it."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        target = _somewhere(rng, message)
        if target.DESCRIPTOR.name == "Array" and rng.random() < 0.7:
            _array(rng, target)
        elif target.DESCRIPTOR.fields:
            _field(rng, target, rng.choice(target.DESCRIPTOR.fields))


def _somewhere(rng, message):
    while rng.random() < 0.75:
        parts = []
        for field, value in message.ListFields():
            if field.type == _F.TYPE_MESSAGE:
                parts.extend(value if field.is_repeated else [value])
        if not parts:
            break
        message = rng.choice(parts)
    return message


def _scalar(rng, field):
    if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
        return rng.choice(NUMBERS)
    if field.type == _F.TYPE_STRING:
        return rng.choice(TEXTS)
    if field.type == _F.TYPE_BYTES:
        return rng.choice(BYTES)
    if field.type == _F.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == _F.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 5, 1 << 20, (1 << 31) - 1, -1))
    return rng.choice(LONG if field.type in _LONGS else INTEGERS)


def _field(rng, message, field):
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        values = getattr(message, field.name)
        kind = rng.randrange(4)
        if field.type == _F.TYPE_MESSAGE:
            if kind == 0 or not values:
                values.add()
            elif kind == 1:
                values.add().CopyFrom(rng.choice(values))
            elif kind == 2:
                del values[rng.randrange(len(values))]
            else:
                rng.choice(values).CopyFrom(rng.choice(values))
        elif kind == 0 and values:
            del values[rng.randrange(len(values)) :]
        elif kind == 1 and values:
            values[rng.randrange(len(values))] = _scalar(rng, field)
        else:
            values.extend([_scalar(rng, field)] * rng.choice((1, 2, 70, 1100)))
    elif field.type == _F.TYPE_MESSAGE:
        others = [f for f in message.DESCRIPTOR.fields if f.message_type is field.message_type and not f.is_repeated]
        getattr(message, field.name).CopyFrom(getattr(message, rng.choice(others).name))
    else:
        try:
            near = getattr(message, field.name) + rng.choice((-1, 1))
            setattr(message, field.name, near if rng.random() < 0.3 else _scalar(rng, field))
        except (TypeError, ValueError):
            setattr(message, field.name, _scalar(rng, field))


# Where the numbers of a frame's head are (docs/wire.md), and what they say falsely.
FRAME_HEAD = 20
_HEAD_FIELDS = {"version": ("<B", 4), "kind": ("<B", 5), "parts": ("<H", 6), "size": ("<I", 8), "length": ("<I", 12)}
FRAME_LIES = ("magic", *_HEAD_FIELDS, "table", "cut", "garbage before", "garbage behind", "another's body")


def frame_of(rng: random.Random, data: bytes, lie: str) -> bytes:
    """Return a whole frame of one part at least, which lies in one way of FRAME_LIES."""
    out = bytearray(data)
    if lie == "magic":
        out[rng.randrange(4)] ^= 1 << rng.randrange(8)
    elif lie in _HEAD_FIELDS:
        form, at = _HEAD_FIELDS[lie]
        (true,) = struct.unpack_from(form, out, at)
        most = (1 << 8 * struct.calcsize(form)) - 1
        said = rng.choice((0, 1, true - 1, true + 1, true * 2, true + 64, 1 << 14, 128 << 20, most - 3, most)) & most
        struct.pack_into(form, out, at, said if said != true else true + 1 & most)
    elif lie == "table":
        parts = struct.unpack_from("<H", out, 6)[0]
        at = FRAME_HEAD + 4 * rng.randrange(parts)
        (true,) = struct.unpack_from("<I", out, at)
        # One part reaches into the next, or beyond all; or it ends too early; or the sum goes round at 2^32.
        said = rng.choice(
            (0, true - 1, true + 1, true + 64, true * 2, len(out), (1 << 32) - 1, (1 << 32) - 64, 1 << 31)
        )
        struct.pack_into("<I", out, at, said if said != true else true + 1)
        if parts > 1 and rng.random() < 0.3:
            # What one has too much another one has too little.
            other = FRAME_HEAD + (at - FRAME_HEAD + 4) % (4 * parts)
            (theirs,) = struct.unpack_from("<I", out, other)
            struct.pack_into("<I", out, other, theirs + true - said & 0xFFFFFFFF)
    elif lie == "cut":
        del out[rng.randrange(1, len(out)) :]
    elif lie == "garbage before":
        out[0:0] = rng.choice((b"\0", b"OARF", b"\xff" * 20, rng.randbytes(40)))
    elif lie == "garbage behind":
        out += rng.choice((b"\0" * 20, b"OARF" + b"\xff" * 16, rng.randbytes(40), data[:19] + b"\0" + data[20:60]))
    else:
        rest = bytearray(out[FRAME_HEAD:])
        rng.shuffle(rest)
        out[FRAME_HEAD:] = rest
    return bytes(out)


_DTYPES = {1: "<u8", 2: "<i4", 3: "<f4", 4: "<u4"}
_ODD = {
    "u": (0, 1, 2, 1 << 31),
    "i": (-1, -(2**31), 2**31 - 1, 0, 1, 4, 11, 12, 16, 17),
    "f": (np.nan, np.inf, -np.inf, 1e15, 9e14, -3e38, 1e-45, 0.0),
}


def _array(rng, message):
    kind = rng.randrange(7)
    if kind == 0:
        message.dtype = rng.choice((0, 1, 2, 3, 4, 5, -1))
    elif kind == 1:
        message.shape.extend([rng.choice(INTEGERS)] * rng.choice((1, 2, 100)))
    elif kind == 2 and message.shape:
        message.shape[rng.randrange(len(message.shape))] = rng.choice(INTEGERS)
    elif kind == 3:
        message.data = message.data[: rng.randrange(len(message.data) + 1)]
    else:
        values = np.frombuffer(message.data[: len(message.data) // 8 * 8], _DTYPES.get(message.dtype, "<u4")).copy()
        if len(values):
            for _ in range(rng.choice((1, 1, 3))):
                at, other = rng.randrange(len(values)), rng.randrange(len(values))
                if kind == 4:
                    values[at] = values[other]
                elif kind == 5:
                    values[[at, other]] = values[[other, at]]
                else:
                    values[at] = rng.choice(_ODD.get(values.dtype.kind, (0,)))
            message.data = values.tobytes() + message.data[values.nbytes :]
