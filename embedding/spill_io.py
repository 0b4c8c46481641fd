# SPDX-License-Identifier: Apache-2.0
"""What the spill file asks of the operating system: a private file, its mapping, and kernels that read many records at once.

    a stored record:   content, padding up to a multiple of 8 bytes | checksum of both, uint64

A batch is read by one ``pwritev`` per 1,024 records: the kernel copies them out of the mapping of the file into a small
memory file, and an unreadable page is an error of that call, where a load of the mapping would be a SIGBUS. Before that, a
sample of the batch is looked up in the page cache; if any of it is missing, all of the batch is asked for ahead, so that
the disk works on many records at a time.

Invariant: nothing of a record is handed out before its checksum was found right. A Reader serves one thread at a time.
"""

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from oarlock.embedding.hashing import mix64
from oarlock.embedding.jit import jit
from oarlock.embedding.pointer import Int, address_of, copy, load_i64, load_u8, load_u64, store_i64, store_u64
from oarlock.proto.errors import InvalidArgument, OutOfMemory, PSError

WINDOW_RECORDS = 1024  # the most pieces that one call of the operating system takes
WINDOW_BYTES = 1 << 20
SAMPLE_EVERY = 32  # of so many records one is looked up in the page cache, which costs as much as reading four
_PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_CHECK = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_LIFE = np.uint64(40)
_WILLNEED = int(os.POSIX_FADV_WILLNEED)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _call(typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        long = ir.IntType(64)
        kind = ir.FunctionType(long, [long] * 4)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 5), code


# call(function, a, b, c, d) calls the C function at that address; its arguments are integers and addresses, and a function
# of fewer ignores the rest. The address is an argument because compiled code is kept beyond the life of the process.
call: Callable[[Any, Any, Any, Any, Any], Any]
if numba.config.DISABLE_JIT:
    _KIND = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 5)
    call = lambda function, a, b, c, d: _KIND(int(function))(int(a), int(b), int(c), int(d))  # noqa: E731
else:
    call = intrinsic(_call)

# Items of the int64 array that a Reader is to kernels.
_BASE, _STRIDE, _BYTES, _CAPACITY, _SEGMENT, _LIVES, _FILE = range(7)
_GATHER, _WINDOW, _PIECES, _ROOM, _FOUND, _PAGE, _PWRITEV, _MINCORE, _ADVISE, _READ, _AHEAD = range(7, 18)


def stride_of(record_bytes: int) -> int:
    """Return how many bytes a record takes in the file."""
    return -(-record_bytes // 8) * 8 + 8


@jit
def checksum(content: Int, words: Int, record: Int, life: Int) -> np.uint64:
    """Return the check of ``words`` uint64 at ``content`` as record number ``record`` in this life of its segment.

    Each step is one-to-one, so one altered word is always noticed; number and life are in it because a write that the
    disk lost leaves a record behind that was right once, or elsewhere.
    """
    check = mix64(np.uint64(record) ^ (np.uint64(life) << _LIFE))
    for i in range(words):
        check = (check ^ load_u64(content, i)) * _CHECK
        check ^= check >> _HALF
    return check


@jit
def seal_records(source: Int, n: Int, record_bytes: Int, stride: Int, first: Int, life: Int, to: Int) -> None:
    """Write n packed records at ``source`` in stored form to ``to``; they are numbers first, first + 1, ..."""
    words = stride // 8 - 1
    for i in range(n):
        place = to + i * stride
        copy(place, source + i * record_bytes, record_bytes)
        store_u64(place, words, checksum(place, words, first + i, life))


@jit
def _any_missing(reader: Int, records: Int, n: Int) -> bool:
    """Tell whether any of a sample of the records is not in the page cache."""
    base, stride, page, found = (
        load_i64(reader, _BASE),
        load_i64(reader, _STRIDE),
        load_i64(reader, _PAGE),
        load_i64(reader, _FOUND),
    )
    samples = min(n, 2 + n // SAMPLE_EVERY)
    for sample in range(samples):
        place = base + load_i64(records, sample * n // samples) * stride
        store_i64(found, 0, 1)
        call(load_i64(reader, _MINCORE), place & -page, page, found, 0)
        if load_u8(found, 0) & np.uint8(1) == 0:
            return True
    return False


@jit
def read_records(reader: Int, records: Int, n: Int, out: Int, pitch: Int) -> Int:
    """Copy records: int64[n] to ``out``, ``pitch`` bytes apart; return how many were not read, 0 = all is well.

    All arguments are addresses or counts; ``reader`` = ``Reader.address``. What was not read is undefined in ``out``;
    ``SpillFile.read`` of the same records says what is wrong with them.
    """
    base, stride, size = load_i64(reader, _BASE), load_i64(reader, _STRIDE), load_i64(reader, _BYTES)
    capacity, segment, lives = load_i64(reader, _CAPACITY), load_i64(reader, _SEGMENT), load_i64(reader, _LIVES)
    window, pieces, room = load_i64(reader, _WINDOW), load_i64(reader, _PIECES), load_i64(reader, _ROOM)
    words = stride // 8 - 1
    start = 0
    while start < n:
        count = min(room, n - start)
        chosen = records + 8 * start
        for i in range(count):
            record = load_i64(chosen, i)
            if record < 0 or record >= capacity:
                return n - start
            store_i64(pieces, 2 * i, base + record * stride)
            store_i64(pieces, 2 * i + 1, stride)
        if count > 1 and _any_missing(reader, chosen, count):
            for i in range(count):
                offset = load_i64(chosen, i) * stride
                call(load_i64(reader, _ADVISE), load_i64(reader, _FILE), offset, stride, _WILLNEED)
            store_i64(reader, _AHEAD, load_i64(reader, _AHEAD) + count)
        if call(load_i64(reader, _PWRITEV), load_i64(reader, _GATHER), pieces, count, 0) != count * stride:
            return n - start
        for i in range(count):
            record = load_i64(chosen, i)
            place = window + i * stride
            life = load_i64(lives, record // segment)
            if life == 0 or load_u64(place, words) != checksum(place, words, record, life):
                return n - start - i
            copy(out + (start + i) * pitch, place, size)
        store_i64(reader, _READ, load_i64(reader, _READ) + count)
        start += count
    return 0


class Reader:
    """One thread's means to read records: the memory file that they are gathered in, and what kernels need to know."""

    def __init__(
        self, file: int, base: int, record_bytes: int, capacity: int, segment: int, lives: np.ndarray[Any, Any]
    ) -> None:
        stride = stride_of(record_bytes)
        room = max(1, min(WINDOW_RECORDS, WINDOW_BYTES // stride))
        self._gather = os.memfd_create("oarlock-gather", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._gather, room * stride)
            self._window = mmap.mmap(self._gather, room * stride)
        except BaseException:
            os.close(self._gather)
            raise
        self._lent = np.frombuffer(self._window, np.uint8)
        self._pieces = np.zeros(2 * room + 1, np.int64)
        pieces = address_of(self._pieces)
        functions = [ctypes.cast(f, ctypes.c_void_p).value for f in (_libc.pwritev, _libc.mincore, _libc.posix_fadvise)]
        where = [self._gather, address_of(self._lent), pieces, room, pieces + 16 * room, mmap.PAGESIZE]
        shape = [base, stride, record_bytes, capacity, segment, address_of(lives), file]
        self._items = np.array([*shape, *where, *functions, 0, 0], np.int64)
        self.address = address_of(self._items)

    def take_counts(self) -> tuple[int, int]:
        """Return how many records were read and how many asked for ahead since the last call."""
        counts = int(self._items[_READ]), int(self._items[_AHEAD])
        self._items[_READ] = self._items[_AHEAD] = 0
        return counts

    def close(self) -> None:
        del self._lent
        self._window.close()
        os.close(self._gather)


def open_private(folder: Path) -> int:
    """Return a new file of ``folder`` without a name, readable by this user alone; it ends with its last descriptor."""
    if not folder.is_dir():
        raise InvalidArgument(f"spill folder {folder} is not a folder: make it, or name another one")
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        file, name = tempfile.mkstemp(prefix="oarlock-spill-", dir=folder)
        os.unlink(name)
        return file
    except OSError as error:
        raise failure(error, f"spill folder {folder}: no file can be made there") from error


def failure(error: OSError, what: str) -> PSError:
    """Return the error of the project for one of the operating system."""
    if error.errno in _NO_SPACE:
        return OutOfMemory(f"{what}: {error.strerror}: free disk space, or give the tables more memory")
    return InvalidArgument(f"{what}: {error.strerror or error}")


def reserve(file: int, size: int) -> int:
    """Map ``size`` bytes of a file, present or to come, for reading; return the address. OutOfMemory if refused."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0x4000), file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        reason = os.strerror(ctypes.get_errno())
        raise OutOfMemory(f"no address space for a spill file of {size} bytes: {reason}: set a lower limit_bytes")
    _libc.madvise(address, size, mmap.MADV_RANDOM)  # a miss reads its page only, not the 100 KiB around it
    return int(address)


def release(address: int, size: int) -> None:
    """Take back a mapping of ``reserve``."""
    _libc.munmap(address, size)


def punch(file: int, start: int, end: int) -> None:
    """Give the disk back the whole pages of [start, end), where the file system can; they read as zeros then."""
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        _libc.fallocate(file, _PUNCH, start, end - start)


def write_all(file: int, content: memoryview, offset: int) -> int:
    """Write all of ``content`` at ``offset``; return how many calls it took. OSError if the file does not take it."""
    calls = 0
    while content:
        taken = os.pwrite(file, content, offset)
        if taken <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        content, offset, calls = content[taken:], offset + taken, calls + 1
    return calls


def read_all(file: int, size: int, offset: int) -> bytes:
    """Return up to ``size`` bytes at ``offset``; fewer only at the end of the file."""
    parts: list[bytes] = []
    while size > 0:
        part = os.pread(file, size, offset)
        if not part:
            break
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
