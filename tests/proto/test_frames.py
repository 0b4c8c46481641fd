# SPDX-License-Identifier: Apache-2.0
"""Frames as bytes: their layout, what comes back of them, and what is refused before it is believed."""

import contextlib
import fcntl
import gc
import os
import socket
import struct
import termios
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from oarlock.proto import frames
from oarlock.proto.arrays import MAX_MESSAGE_BYTES
from oarlock.proto.errors import Malformed, OutOfMemory, PSError
from oarlock.proto.frames import BESIDE, HELLO, MAX_PARTS, PULL, PUSH, REPLY, Closed, Receiver, encode, send

HEAD = struct.Struct("<4sBBHIII")

# A push with two parts of 4 and 66 bytes: head; lengths; message; then each part from a multiple of 64 bytes on.
GOLDEN = (
    "4f415246 01 83 0200 03000000 c200000000000000"
    "04000000 42000000 616263" + "00" * 53 + "01020304" + "00" * 60 + "".join(f"{n:02x}" for n in range(66))
)


@pytest.fixture
def pair():
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(30)
    yield ends
    for end in ends:
        end.close()


@contextlib.contextmanager
def sending(connection, data, *, ends=True):
    """Send bytes beside the body, which reads them or does not."""

    def work():
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        thread.join()


def joined(buffers):
    return b"".join(bytes(b) for b in buffers)


def received(data, **options):
    """Return the frame of these bytes, followed by the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs, sending(theirs, data):
        ours.settimeout(30)
        return Receiver(ours).receive(**options)


def head(magic=b"OARF", version=1, kind=PULL, parts=0, size=0, length=0):
    return HEAD.pack(magic, version, kind, parts, size, length, 0)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_layout():
    data = joined(encode(PUSH | BESIDE, b"abc", [b"\1\2\3\4", bytes(range(66))]))
    assert data == bytes.fromhex(GOLDEN)
    frame = received(data)
    assert (frame.kind, frame.message) == (PUSH | BESIDE, b"abc")
    assert [bytes(p) for p in frame.parts] == [b"\1\2\3\4", bytes(range(66))]


def test_parts_lie_where_arrays_may_lie(rng):
    arrays = [rng.normal(size=n).astype(np.float32) for n in (1, 300, 17, 5000)]
    frame = received(joined(encode(REPLY, b"m" * 13, arrays)))
    for array, part in zip(arrays, frame.parts, strict=True):
        found = np.frombuffer(part, np.float32)
        assert np.array_equal(found, array)
        assert found.ctypes.data % frames.ALIGNMENT == 0


@pytest.mark.parametrize("parts", [0, 1, 600, 1500, MAX_PARTS])
@pytest.mark.parametrize("size", [0, 5])
def test_any_number_of_parts_arrives_empty_ones_too(parts, size):
    sent = [bytes([n % 251]) * (n * 7 % 40) for n in range(parts)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Receiver(theirs)
        # 1024 buffers is all that one call takes.
        thread = threading.Thread(target=send, args=(ours, encode(PULL, b"x" * size, sent)))
        thread.start()
        frame = reader.receive()
        thread.join()
    assert frame.message == b"x" * size
    assert [bytes(p) for p in frame.parts] == sent


def test_an_empty_array_of_any_shape_is_a_part():
    parts = [np.empty((0, 3), np.float32), np.ones((2, 2), np.float32), np.empty(0, np.uint64)]
    frame = received(joined(encode(PULL, b"", parts)))
    assert [p.nbytes for p in frame.parts] == [0, 16, 0]


def test_too_many_parts_are_not_sent():
    with pytest.raises(Malformed, match="16385 parts in one frame"):
        encode(PULL, b"", [b""] * (MAX_PARTS + 1))


def test_what_is_over_the_limit_is_not_sent():
    # One buffer stands for many: no memory is needed to say no.
    large = np.zeros(MAX_MESSAGE_BYTES // 2, np.uint8)
    encode(PULL, b"", [large, large])
    with pytest.raises(OutOfMemory, match="over the limit of 134217728 bytes"):
        encode(PULL, b"", [large, large, large[:1000]])


def test_a_frame_cut_at_every_byte():
    data = bytes.fromhex(GOLDEN)
    with pytest.raises(Closed):
        received(b"")
    for end in range(1, len(data)):
        with pytest.raises(OSError, match="ended inside a frame"):
            received(data[:end])


def test_a_frame_says_how_long_its_sender_waits():
    buffers = encode(PUSH | BESIDE, b"abc", [b"\1\2\3\4", bytes(range(66))])
    golden = bytes.fromhex(GOLDEN)
    assert joined(frames.stamped(buffers, 12.3456)) == golden[:16] + (12345).to_bytes(4, "little") + golden[20:]
    said = [frames.read_head(bytes(frames.stamped(buffers, s)[0])).seconds for s in (0.0, 1e-9, 2.0, 1e300)]
    assert said == [0.001, 0.001, 2.0, ((1 << 32) - 1) / 1000]
    assert frames.read_head(golden[:20]).seconds is None


def test_a_frame_that_nobody_wants_is_skipped_to_its_end(pair):
    ours, theirs = pair
    data = joined(encode(PULL, b"x" * 200_000))
    with sending(theirs, data + joined(encode(REPLY, b"z")), ends=False):
        reader = Receiver(ours)
        reader.skip(reader.head())
        assert reader.receive() == (REPLY, b"z", [])


def test_a_frame_that_nobody_wants_and_that_breaks_off(pair):
    ours, theirs = pair
    with sending(theirs, joined(encode(PULL, b"x" * 200_000))[:1000]):
        reader = Receiver(ours)
        found = reader.head()
        with pytest.raises(OSError, match="ended inside a frame"):
            reader.skip(found)


def test_two_frames_side_by_side(pair):
    ours, theirs = pair
    data = bytes.fromhex(GOLDEN)
    reader = Receiver(ours)
    with sending(theirs, data + joined(encode(REPLY, b"z"))):
        assert reader.receive().message == b"abc"
        assert reader.receive() == (REPLY, b"z", [])
        with pytest.raises(Closed):
            reader.receive()


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"magic": b"OARG"}, Malformed, "no frame of version 1"),
        ({"magic": b"PRI "}, Malformed, "no frame of version 1"),
        ({"version": 0}, Malformed, "no frame of version 1"),
        ({"version": 2}, Malformed, "no frame of version 1"),
        ({"parts": 1, "length": 3}, Malformed, "cannot be"),
        ({"size": 1}, Malformed, "cannot be"),
        ({"size": (1 << 32) - 1, "length": 100}, Malformed, "cannot be"),
        ({"parts": MAX_PARTS + 1, "length": 1 << 20}, Malformed, "cannot be"),
        ({"parts": 65535, "size": (1 << 32) - 1, "length": (1 << 32) - 1}, Malformed, "cannot be"),
        ({"length": MAX_MESSAGE_BYTES + 1}, OutOfMemory, "over the limit"),
        ({"parts": 1, "length": MAX_MESSAGE_BYTES + 69}, OutOfMemory, "over the limit"),
        ({"length": (1 << 32) - 1}, OutOfMemory, "over the limit"),
        ({"length": 1 << 31}, OutOfMemory, "over the limit"),
        ({"size": (1 << 32) - 1, "length": (1 << 32) - 1}, OutOfMemory, "over the limit"),
    ],
)
def test_a_head_that_cannot_be_is_refused_by_itself(wrong, kind, says):
    """Nothing follows it, so it is not waited for either."""
    with pytest.raises(kind, match=says):
        received(head(**wrong))


@pytest.mark.parametrize(
    ("lengths", "room"),
    [
        ((5,), 4),
        ((3,), 4),
        ((0,), 4),
        (((1 << 32) - 1,), 4),
        ((4, 1), 4),
        (((1 << 32) - 1, (1 << 32) - 1), 4),
        ((1, 3), 64 + 2),
        ((0, 0, 0), 1),
    ],
)
def test_lengths_that_contradict_the_frames(lengths, room):
    """``room``: bytes after the lengths and their padding."""
    table = struct.pack(f"<{len(lengths)}I", *lengths)
    body = table.ljust(64, b"\0") + bytes(room)
    with pytest.raises(Malformed, match="whose parts end at"):
        received(head(parts=len(lengths), length=len(body)) + body)


def test_a_part_that_does_not_begin_at_its_place():
    """Without the padding, the same bytes are too few."""
    body = struct.pack("<I", 100) + b"x" * 100
    with pytest.raises(Malformed, match="whose parts end at 164"):
        received(head(parts=1, length=len(body)) + body)


def test_a_claim_takes_no_memory(pair):
    ours, theirs = pair
    reader, failed = Receiver(ours), []

    def read():
        try:
            reader.receive()
        except (OSError, PSError) as error:
            failed.append(error)

    before = resident()
    thread = threading.Thread(target=read)
    thread.start()
    theirs.sendall(head(length=MAX_MESSAGE_BYTES) + bytes(100_000))
    # It was read, so the reader has gone on to wait for the rest of it.
    while struct.unpack("i", fcntl.ioctl(ours, termios.FIONREAD, bytes(4)))[0]:
        pass
    grown = resident() - before
    theirs.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert isinstance(failed[0], ConnectionResetError)
    assert grown < 16 << 20


def test_a_hello_is_small():
    with pytest.raises(OutOfMemory):
        received(joined(encode(HELLO, b"t" * 100)), most=64)
    assert received(joined(encode(HELLO, b"t" * 64)), most=64).message == b"t" * 64


def test_no_memory_is_an_error_of_ours(monkeypatch):
    def none(self, size):
        raise MemoryError

    monkeypatch.setattr("oarlock.proto.buffers.Buffers.take", none)
    with pytest.raises(OutOfMemory, match="no memory for a frame of 20000 bytes"):
        received(joined(encode(PULL, b"abcde" * 4000)))


def test_frames_come_into_the_same_memory_unless_somebody_looks(pair):
    ours, theirs = pair
    reader = Receiver(ours)

    def next_frame(value):
        with_part = joined(encode(REPLY, b"", [np.full(100_000, value, np.uint8)]))
        thread = threading.Thread(target=theirs.sendall, args=(with_part,))
        thread.start()
        frame = reader.receive()
        thread.join()
        return np.frombuffer(frame.parts[0], np.uint8)

    held = next_frame(1)
    place = held.ctypes.data
    other = next_frame(2)
    assert other.ctypes.data != place
    assert (held == 1).all()
    del held
    again = next_frame(3)
    assert again.ctypes.data == place
    assert (other == 2).all()
    assert (again == 3).all()


@pytest.mark.parametrize("size", [3, 40, 800, 3900])
def test_small_frames_have_memory_of_their_own(pair, size):
    """They come together, into one place; what is made of the first stays when the next ones are read and come."""
    ours, theirs = pair
    reader = Receiver(ours)
    sent = [np.full(size, value, np.uint8) for value in range(1, 13)]
    theirs.sendall(b"".join(joined(encode(REPLY, bytes([value]), [sent[value - 1]])) for value in range(1, 13)))
    frames_ = [reader.receive() for _ in sent]
    for value, frame in enumerate(frames_, 1):
        assert frame.message == bytes([value])
        assert (np.frombuffer(frame.parts[0], np.uint8) == value).all()
        assert not frame.parts[0].readonly
    assert not reader.ahead


def test_arrays_of_small_frames_are_aligned_for_their_types(rng):
    arrays = [rng.normal(size=n) for n in (1, 30, 17, 101)]
    frame = received(joined(encode(REPLY, b"m" * 13, arrays)))
    for array, part in zip(arrays, frame.parts, strict=True):
        found = np.frombuffer(part, array.dtype)
        assert found.flags.aligned
        assert np.array_equal(found, array)


class Reluctant:
    """A connection that takes so many bytes a call."""

    def __init__(self, most):
        self.most, self.taken = most, b""

    def sendmsg(self, buffers):
        taken = joined(buffers)[: self.most]
        self.taken += taken
        return len(taken)


@pytest.mark.parametrize("most", [1, 7, 24, 100, 1000])
@pytest.mark.parametrize("sizes", [(), (0,), (5, 0, 70), (300,), (9, frames.SMALL_BYTES)])
def test_what_does_not_go_at_once_goes_bit_by_bit(most, sizes):
    buffers = encode(PUSH, b"abc", [bytes([n % 251]) * n for n in sizes])
    connection, steps = Reluctant(most), []
    send(connection, buffers, lambda: steps.append(len(connection.taken)))
    assert connection.taken == joined(buffers)
    # Every step but the last is told of.
    assert steps == list(range(most, len(connection.taken), most))


def test_a_frame_keeps_nothing_but_its_buffer(pair):
    """Thousands of frames leave no trace, whatever their number of parts."""
    ours, theirs = pair
    reader = Receiver(ours)
    data = joined(encode(REPLY, b"abc", [b"x" * 100] * 50))
    tracemalloc.start()
    try:
        for turn in range(300):
            theirs.sendall(data)
            reader.receive()
            if turn == 50:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def test_send_goes_on_where_the_system_took_a_part_of_it():
    class Slow:
        """Takes a few bytes at a time."""

        def __init__(self):
            self.got = bytearray()
            self.most = 0

        def sendmsg(self, buffers):
            self.most = max(self.most, len(buffers))
            data = joined(buffers)[: 1 + len(self.got) % 97]
            self.got += data
            return len(data)

    sent = [bytes([n % 256]) * (n % 30) for n in range(700)]
    slow = Slow()
    buffers = encode(PUSH, b"abc", sent)
    send(slow, buffers)
    assert bytes(slow.got) == joined(buffers)
    assert slow.most <= 1024
