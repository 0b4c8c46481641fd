# SPDX-License-Identifier: Apache-2.0
"""The file on local disk that holds the cold rows of a table, as records of one size.

Records are appended in large writes, read in batches by number, and freed; when most of the file is dead, ``compact`` moves
what lives out of the emptiest segments, and their disk space is given back. The file has no name and ends with its process,
so a crash leaves nothing behind, and nothing is ever synced. Why one ``pwritev`` out of a mapping reads it, and what other
ways cost: ``docs/performance.md``.

Invariant: a record that was appended reads as it was written until it is freed and no pin of that time is left; what the
disk lost or altered is an error that names the record, never a value. Any thread: one lock for what changes the file;
readers do not take it. Who reads a number while another thread may free it holds a pin.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.pointer import address_of, check_output, kernel_array
from oarlock.embedding.spill_io import (
    Reader,
    checksum,
    failure,
    open_private,
    punch,
    read_all,
    read_records,
    release,
    reserve,
    seal_records,
    stride_of,
    write_all,
)
from oarlock.embedding.spill_space import Piece, Records, Space
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, Malformed

MAX_RECORD_BYTES = 1 << 20
MAX_SEGMENTS = 1 << 24
WRITE_BYTES = 1 << 20

Content = NDArray[np.uint8]
Move = Callable[[Records, Records, Content], None]


class SpillCounts(NamedTuple):
    """What a spill file holds now (the first three) and what it did since it was opened."""

    live_records: int
    dead_records: int
    disk_bytes: int
    records_written: int
    records_read: int
    records_read_ahead: int
    write_calls: int
    read_batches: int
    read_seconds: float


class SpillFile:
    """A private file of records of ``record_bytes`` bytes in ``folder``.

    limit_bytes     the file never takes more disk than this
    segment_bytes   the unit in which disk space is reused
    slack           ``compact`` has work to do when so many times as many records are dead as live
    """

    def __init__(
        self,
        folder: Path,
        record_bytes: int,
        *,
        limit_bytes: int = 1 << 40,
        segment_bytes: int = 4 << 20,
        slack: int = 1,
    ) -> None:
        if not 1 <= record_bytes <= MAX_RECORD_BYTES:
            raise InvalidArgument(f"record_bytes = {record_bytes}: give a number in [1, {MAX_RECORD_BYTES}]")
        self.record_bytes = record_bytes
        self._folder = folder
        self._stride = stride_of(record_bytes)
        segment = max(1, segment_bytes // self._stride)
        segments = limit_bytes // (segment * self._stride)
        least, most = segment * self._stride, MAX_SEGMENTS * segment * self._stride
        if not least <= limit_bytes <= most:
            raise InvalidArgument(f"limit_bytes = {limit_bytes}: give a number in [{least}, {most}]")
        self._space = Space(segments, segment, slack)
        self._mapped_bytes = segments * segment * self._stride
        self._lock = threading.Lock()
        self._pool = threading.Condition()
        self._idle: list[Reader] = []
        self._lent = 0
        self._file = -1
        self._base = 0
        self._state = "not open yet"
        self._written = self._write_calls = self._read = self._ahead = self._batches = 0
        self._seconds = 0.0

    def open(self) -> None:
        """Make the file."""
        with self._lock, self._pool:
            if self._state != "not open yet":
                raise InvalidArgument(f"spill file in {self._folder}: open() was called already; make a new SpillFile")
            file = open_private(self._folder)
            try:
                self._base = reserve(file, self._mapped_bytes)
            except BaseException:
                os.close(file)
                raise
            self._file = file
            self._stage = np.zeros(max(self._stride, WRITE_BYTES // self._stride * self._stride) // 8, np.uint64)
            self._state = "open"

    def close(self) -> None:
        """Wait for readers, then give everything back; the file is gone. May be called again."""
        with self._lock:
            with self._pool:
                was_open, self._state = self._state == "open", "closed"
                self._pool.wait_for(lambda: self._lent == 0)
                while self._idle:
                    self._idle.pop().close()
            if was_open:
                release(self._base, self._mapped_bytes)
                os.close(self._file)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, address: int, n: int) -> Records:
        """Write the n packed records at ``address``; return their numbers, in order: int64[n].

        On an error nothing is changed: OutOfMemory when the disk or ``limit_bytes`` is full.
        """
        if n < 0:
            raise InvalidArgument(f"n = {n} records: give a number >= 0")
        with self._lock:
            self._check_open()
            pieces = self._space.plan(n)
            try:
                for piece in pieces:
                    self._write(address, piece)
                    address += piece.length * self.record_bytes
            except OSError as error:
                self._take_back(pieces)
                raise failure(error, f"spill file in {self._folder}: {n} records were not written") from error
            self._space.take(pieces)
            self._written += n
        return np.concatenate([np.arange(p.first, p.first + p.length) for p in pieces] or [np.empty(0, np.int64)])

    def _write(self, address: int, piece: Piece) -> None:
        stage, stride = address_of(self._stage), self._stride
        most = self._stage.nbytes // stride
        for start in range(0, piece.length, most):
            count = min(most, piece.length - start)
            source, first = address + start * self.record_bytes, piece.first + start
            seal_records(source, count, self.record_bytes, stride, first, piece.life, stage)
            content = self._stage.view(np.uint8).data[: count * stride]
            self._write_calls += write_all(self._file, content, first * stride)

    def _take_back(self, pieces: list[Piece]) -> None:
        """Give back what a failed append took of the disk; a piece of the open segment has neighbours in its pages."""
        for first, length, _ in pieces:
            punch(self._file, first * self._stride, (first + length) * self._stride)

    def read(self, records: Records, out: Content) -> None:
        """Copy records: int64[n] to out: uint8[n, record_bytes].

        InvalidArgument for a number that is not in use; CorruptCheckpoint for what the disk cannot give back as it was
        written. ``out`` is undefined then.
        """
        records = kernel_array("records", records, np.int64)
        n = len(records)
        if out.dtype != np.uint8 or out.shape != (n, self.record_bytes):
            raise Malformed(f"out is {out.dtype}{list(out.shape)}, expected uint8[{n}, {self.record_bytes}]")
        check_output("out", out)
        begin = time.perf_counter()
        with self.reader() as reader:
            missing = read_records(reader, address_of(records), n, address_of(out), self.record_bytes)
            if missing:
                self._read_singly(records[n - missing :], out[n - missing :])
        seconds = time.perf_counter() - begin
        with self._pool:
            self._seconds += seconds

    @contextmanager
    def reader(self) -> Iterator[int]:
        """Lend the calling thread the first argument of ``read_records``, for kernels that read on their own.

        If that kernel reports records as not read, ``read`` them: it succeeds or raises what is wrong.
        """
        with self._pool:
            self._check_open()
            self._lent += 1
            reader = self._idle.pop() if self._idle else None
        try:
            reader = reader or self._new_reader()
            yield reader.address
        finally:
            with self._pool:
                self._lent -= 1
                if reader is not None:
                    read, ahead = reader.take_counts()
                    self._read, self._ahead, self._batches = self._read + read, self._ahead + ahead, self._batches + 1
                    self._idle.append(reader)
                self._pool.notify_all()

    def _new_reader(self) -> Reader:
        segment, lives = self._space.segment, self._space.lives
        try:
            return Reader(self._file, self._base, self.record_bytes, segment * len(lives), segment, lives)
        except OSError as error:
            raise failure(error, f"spill file in {self._folder}: no memory file to read with") from error

    def _read_singly(self, records: Records, out: Content) -> None:
        """Read record after record, so that the one that is bad can be named."""
        lives, stride = self._space.lives, self._stride
        for i, record in enumerate(records.tolist()):
            life = int(lives[record // self._space.segment]) if 0 <= record < len(lives) * self._space.segment else 0
            if life == 0:
                raise InvalidArgument(f"spill record {record} is not in use: it was freed, or never written")
            try:
                found = read_all(self._file, stride, record * stride)
            except OSError as error:
                raise self._corrupt(record, error.strerror or str(error)) from error
            if len(found) < stride:
                raise self._corrupt(record, f"only {len(found)} of {stride} bytes are there")
            words = np.frombuffer(found, np.uint64)
            if words[-1] != checksum(address_of(words), len(words) - 1, record, life):
                raise self._corrupt(record, "its checksum differs from what was written")
            out[i] = words.view(np.uint8)[: self.record_bytes]

    def _corrupt(self, record: int, reason: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"spill file in {self._folder}: record {record} cannot be read: {reason}: the disk has lost data; "
            "restore the job from its last checkpoint, with its spill folder on another disk",
            record=record,
        )

    def free(self, records: Records) -> None:
        """Mark records: int64[n] dead. InvalidArgument, and nothing is freed, if one of them is not live."""
        records = kernel_array("records", records, np.int64)
        with self._lock:
            self._check_open()
            self._give_back(self._space.drop(records))

    def pin(self) -> int:
        """Keep all records readable that are live now, freed or not, until ``unpin`` of the returned token."""
        with self._lock:
            self._check_open()
            return self._space.pin()

    def unpin(self, token: int) -> None:
        """End a pin."""
        with self._lock:
            self._check_open()
            self._give_back(self._space.unpin(token))

    def _give_back(self, segments: list[int]) -> None:
        size = self._space.segment * self._stride
        for place in segments:  # first the disk: nobody writes to a segment before it is free
            punch(self._file, place * size, (place + 1) * size)
            self._space.give_back(place)

    def compact(self, move: Move, *, segments: int | None = None) -> int:
        """While more of the file is dead than ``slack`` allows, empty its emptiest segments; return how many records moved.

        ``move(old, new, content)`` is told of each segment's records: int64[k], int64[k], uint8[k, record_bytes], and must
        see to it that nobody reads the old numbers from then on. ``segments`` bounds how many segments this call empties.
        The caller keeps other threads from freeing records meanwhile. On an error of ``move`` the old numbers stay good.
        """
        moved = emptied = 0
        while segments is None or emptied < segments:
            with self._lock:
                self._check_open()
                old = self._space.sparse_segment()
            if old is None:
                break
            content = np.empty((len(old), self.record_bytes), np.uint8)
            self.read(old, content)
            new = self.append(address_of(content), len(old))
            try:
                move(old, new, content)
            except BaseException:
                self.free(new)
                raise
            self.free(old)
            moved, emptied = moved + len(old), emptied + 1
        return moved

    @property
    def counts(self) -> SpillCounts:
        with self._lock, self._pool:
            disk = os.fstat(self._file).st_blocks * 512 if self._state == "open" else 0
            live = self._space.live_records
            return SpillCounts(
                live,
                self._space.written_records - live,
                disk,
                self._written,
                self._read,
                self._ahead,
                self._write_calls,
                self._batches,
                self._seconds,
            )

    def _check_open(self) -> None:
        if self._state != "open":
            raise InvalidArgument(f"spill file in {self._folder} is {self._state}")
