# SPDX-License-Identifier: Apache-2.0
"""The spill file on a bad day: a full disk, a lost page, an altered byte, a killed process."""

import ctypes
import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from oarlock.embedding import spill_file, spill_io
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, OutOfMemory


def some(rng, n, width):
    return rng.integers(0, 256, (n, width)).astype(np.uint8)


def append(file, content):
    return file.append(address_of(content), len(content))


def read(file, records):
    out = np.full((len(records), file.record_bytes), 0xEE, np.uint8)
    file.read(np.array(records, np.int64), out)
    return out


def test_a_folder_that_cannot_hold_the_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match="not a folder"):
        SpillFile(tmp_path / "absent", 8).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="not a folder"):
        SpillFile(tmp_path / "file", 8).open()

    def refuse(*arguments, **named):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(spill_io.os, "open", refuse)
    with pytest.raises(InvalidArgument, match="Permission denied"):
        SpillFile(tmp_path, 8).open()


def test_the_limit_of_the_file_is_out_of_memory_and_leaves_all_as_it_was(tmp_path, rng):
    with SpillFile(tmp_path, 8, segment_bytes=160, limit_bytes=480) as file:
        content = some(rng, 31, 8)
        records = append(file, content[:25])
        with pytest.raises(OutOfMemory, match="30 records"):
            append(file, content[:6])
        assert append(file, content[25:30]).tolist() == [25, 26, 27, 28, 29]
        assert (read(file, records) == content[:25]).all()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, 0])
def test_a_full_disk_changes_nothing_whichever_write_it_hits(tmp_path, rng, monkeypatch, code):
    true, calls = os.pwrite, []

    def pwrite(file, content, offset):
        calls.append(offset)
        if len(calls) == fatal:
            if code:
                raise OSError(code, os.strerror(code))
            return 0
        return true(file, content[: max(1, len(content) // 2)], offset)  # all writes come up short

    first, second = some(rng, 15, 8), some(rng, 40, 8)
    for fatal in range(1, 60):
        with SpillFile(tmp_path, 8, segment_bytes=160, limit_bytes=1 << 16) as file:
            records = append(file, first)
            calls.clear()
            monkeypatch.setattr(spill_io.os, "pwrite", pwrite)
            try:
                append(file, second)
                assert len(calls) < fatal
                assert (read(file, np.arange(15, 55)) == second).all()
                break
            except OutOfMemory as error:
                assert "40 records were not written" in str(error)  # noqa: PT017
            finally:
                monkeypatch.setattr(spill_io.os, "pwrite", true)
            assert file.counts[:2] == (15, 0)
            assert append(file, second).tolist() == list(range(15, 55))
            assert (read(file, records) == first).all()
            assert (read(file, np.arange(15, 55)) == second).all()
    assert fatal > 10


FULL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile
from oarlock.proto.errors import OutOfMemory
np.seterr(over="ignore")
with SpillFile(Path(sys.argv[1]), 4088, segment_bytes=1 << 16) as file:
    content = np.arange(300 * 4088).astype(np.uint8).reshape(300, 4088)
    out = np.empty((300, 4088), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 12, 300 << 12))
    records = file.append(address_of(content), 250)
    file.read(records, out[:250])
    try:
        file.append(address_of(content), 250)
    except OutOfMemory as error:
        print("refused", "free disk space" in str(error))
    records = np.concatenate([records, file.append(address_of(content), 50)])
    file.read(records, out)
    print((out[:250] == content[:250]).all() and (out[250:] == content[:50]).all(), file.counts.live_records)
"""


def test_a_limit_of_the_system_is_a_full_disk(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, timeout=100)
    assert (done.stdout.split(), done.stderr) == (["refused", "True", "True", "300"], "")


def test_a_lost_page_is_an_error_that_names_the_record_and_not_a_signal(tmp_path, rng):
    content = some(rng, 100, 4088)
    with SpillFile(tmp_path, 4088) as file:
        records = append(file, content)
        assert (read(file, records) == content).all()  # its window of memory still holds all of them afterwards
        os.ftruncate(file._file, 70 << 12)
        with pytest.raises(CorruptCheckpoint, match=r"record 70 .* only 0 of 4096"):
            read(file, records)
        assert (read(file, records[:70]) == content[:70]).all()
        with pytest.raises(CorruptCheckpoint, match=r"record 70 .* only 0 of 4096") as raised:
            read(file, records)
        assert raised.value.details["record"] == 70
        os.ftruncate(file._file, 100 << 12)
        with pytest.raises(CorruptCheckpoint, match=r"record 70 .*checksum"):
            read(file, records)


@pytest.mark.parametrize("place", [0, 11, 79, 80, 87])
def test_an_altered_byte_is_noticed_wherever_it_is(tmp_path, rng, place):
    with SpillFile(tmp_path, 80) as file:
        records = append(file, some(rng, 20, 80))
        byte = os.pread(file._file, 1, 13 * 88 + place)
        os.pwrite(file._file, bytes([byte[0] ^ 4]), 13 * 88 + place)
        with pytest.raises(CorruptCheckpoint, match=r"record 13 .*checksum"):
            read(file, records)
        os.pwrite(file._file, byte, 13 * 88 + place)
        read(file, records)


def test_a_lost_write_is_noticed_by_the_life_of_its_segment(tmp_path, rng):
    with SpillFile(tmp_path, 8, segment_bytes=160, limit_bytes=1 << 16) as file:
        records = append(file, some(rng, 10, 8))
        old = os.pread(file._file, 160, 0)
        file.free(records)
        assert append(file, some(rng, 10, 8)).tolist() == records.tolist()
        os.pwrite(file._file, old, 0)
        with pytest.raises(CorruptCheckpoint, match="record 0 "):
            read(file, records)
        file.free(records)
        with pytest.raises(InvalidArgument, match="record 0 is not in use"):
            read(file, records)


def test_an_error_of_the_disk_is_reported_in_its_words(tmp_path, rng, monkeypatch):
    with SpillFile(tmp_path, 80) as file:
        records = append(file, some(rng, 20, 80))
        os.pwrite(file._file, b"....", 13 * 88)

        def pread(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(spill_io.os, "pread", pread)
        with pytest.raises(CorruptCheckpoint, match=r"record 13 .*Input/output error"):
            read(file, records)


def test_what_fails_to_open_leaves_no_descriptor(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))

    def refuse(file, size):
        raise OutOfMemory("no address space")

    monkeypatch.setattr(spill_file, "reserve", refuse)
    file = SpillFile(tmp_path, 8)
    with pytest.raises(OutOfMemory):
        file.open()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_address_space_is_out_of_memory(tmp_path, monkeypatch):
    class Refusing:
        mmap = staticmethod(lambda *arguments: ctypes.c_void_p(-1).value)

    monkeypatch.setattr(spill_io, "_libc", Refusing)
    with pytest.raises(OutOfMemory, match="limit_bytes"):
        SpillFile(tmp_path, 8).open()


@pytest.mark.parametrize("nameless", [True, False])
def test_the_file_is_private_and_has_no_name(tmp_path, rng, monkeypatch, nameless):
    true = os.open

    def without_tmpfile(path, flags, *mode, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return true(path, flags, *mode, **named)

    if not nameless:
        monkeypatch.setattr(os, "open", without_tmpfile)
    before = len(os.listdir("/proc/self/fd"))
    with SpillFile(tmp_path, 8) as file:
        append(file, some(rng, 5, 8))
        read(file, [0, 4])
        about = os.fstat(file._file)
        assert (about.st_mode & 0o777, about.st_nlink) == (0o600, 0)
        assert not os.get_inheritable(file._file)
        assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert file.counts.disk_bytes == 0


KILLED = """
import sys
import numpy as np
from pathlib import Path
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile
np.seterr(over="ignore")
with SpillFile(Path(sys.argv[1]), 80) as file:
    file.append(address_of(np.zeros((1000, 80), np.uint8)), 1000)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        child.kill()
        child.wait()
    assert list(tmp_path.iterdir()) == []
