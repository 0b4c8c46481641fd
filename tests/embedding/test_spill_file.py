# SPDX-License-Identifier: Apache-2.0
"""The spill file by its promises: what is read is what was written, and space comes back."""

import ctypes
import itertools
import os
import random
import threading

import embedding_reference as reference
import numpy as np
import pytest

from oarlock.embedding import spill_io
from oarlock.embedding.pointer import address_of
from oarlock.embedding.spill_file import SpillFile
from oarlock.embedding.spill_io import checksum, read_records
from oarlock.proto.errors import InvalidArgument, Malformed


def some(rng, n, width):
    return rng.integers(0, 256, (n, width)).astype(np.uint8)


def append(file, content):
    return file.append(address_of(content), len(content))


def read(file, records):
    out = np.full((len(records), file.record_bytes), 0xEE, np.uint8)
    file.read(np.array(records, np.int64), out)
    return out


@pytest.mark.parametrize("width", [1, 7, 8, 80, 2052])
def test_records_read_back_in_any_order_and_number(tmp_path, rng, width):
    with SpillFile(tmp_path, width, segment_bytes=64 * (width + 8), limit_bytes=1 << 26) as file:
        content = some(rng, reference.MANY, width)
        cuts = [0, 0, 1, 17, len(content) // 2, len(content)]
        parts = [append(file, content[a:b]) for a, b in itertools.pairwise(cuts)]
        records = np.concatenate(parts)
        assert len(np.unique(records)) == len(content)
        chosen = rng.integers(0, len(content), 2 * reference.MANY)
        assert (read(file, records[chosen]) == content[chosen]).all()
        assert read(file, []).shape == (0, width)
        counts = file.counts
        assert counts[:2] == (len(content), 0)
        assert (counts.records_written, counts.records_read) == (len(content), 2 * reference.MANY)
        assert counts.disk_bytes >= len(content) * width
        assert counts.read_seconds > 0


def test_a_kernel_reads_into_rows_of_its_own_pitch(tmp_path, rng):
    content = some(rng, 40, 12)
    with SpillFile(tmp_path, 12) as file:
        records = append(file, content)[::-1].copy()
        wide = np.full((40, 32), 7, np.uint8)
        with file.reader() as reader:
            assert read_records(reader, address_of(records), 40, address_of(wide) + 8, 32) == 0
            records[3] = 40
            assert read_records(reader, address_of(records), 40, address_of(wide) + 8, 32) == 37
    assert (wide[:, 8:20] == content[::-1]).all()
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 20:] == 7).all()


def test_records_that_are_not_cached_are_all_asked_for_before_one_is_read(tmp_path, rng):
    content = some(rng, 50, 80)
    asked = []
    kind = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 5)

    def mincore(address, size, found, _):
        ctypes.c_uint8.from_address(found).value = 0
        return 0

    def advise(file, offset, size, advice):
        asked.append((offset, size))
        assert advice == os.POSIX_FADV_WILLNEED
        return 0

    replaced = {spill_io._MINCORE: kind(mincore), spill_io._ADVISE: kind(advise)}
    with SpillFile(tmp_path, 80) as file:
        records = append(file, content)
        assert (read(file, records) == content).all()
        assert file.counts.records_read_ahead == 0  # just written, so in the page cache
        items = file._idle[0]._items
        for place, function in replaced.items():
            items[place] = ctypes.cast(function, ctypes.c_void_p).value
        assert (read(file, records) == content).all()
        assert asked == [(88 * record, 88) for record in records.tolist()]
        assert file.counts.records_read_ahead == 50


def test_the_checksum_is_the_written_formula(rng):
    words = rng.integers(0, 1 << 64, 9, dtype=np.uint64)
    check = reference.mix64(5 ^ 3 << 40)
    for word in words.tolist():
        check = (check ^ word) * reference.GOLDEN & reference.WORD
        check ^= check >> 32
    assert int(checksum(address_of(words), 9, 5, 3)) == check


def test_freed_segments_are_used_again_and_their_disk_space_is_given_back(tmp_path, rng):
    content = some(rng, 900, 2040)
    with SpillFile(tmp_path, 2040, segment_bytes=300 * 2048) as file:
        records = append(file, content)
        full = file.counts.disk_bytes
        file.free(records[:300])
        assert file.counts[:2] == (600, 0)
        if not punches(tmp_path):
            pytest.skip("the file system cannot free the middle of a file")
        assert file.counts.disk_bytes <= full - 290 * 2048
        assert append(file, content[:300]).tolist() == records[:300].tolist()
        assert (read(file, records) == content).all()


def punches(folder):
    file = spill_io.open_private(folder)
    try:
        os.pwrite(file, bytes(1 << 16), 0)
        before = os.fstat(file).st_blocks
        spill_io.punch(file, 0, 1 << 16)
        return os.fstat(file).st_blocks < before
    finally:
        os.close(file)


def test_compaction_bounds_the_file_and_a_failing_move_changes_nothing(tmp_path, rng):
    live = {}
    with SpillFile(tmp_path, 8, segment_bytes=160, limit_bytes=1 << 16) as file:  # 10 records

        def move(old, new, content):
            for a, b, line in zip(old.tolist(), new.tolist(), content, strict=True):
                assert live[a] == line.tobytes()
                live[b] = live.pop(a)

        def fail(old, new, content):
            raise RuntimeError("not now")

        failures = 0
        for _ in range(30):
            content = some(rng, 25, 8)
            live |= zip(append(file, content).tolist(), (line.tobytes() for line in content), strict=True)
            dead = random.sample(sorted(live), len(live) * 3 // 4)
            file.free(np.array(dead))
            for record in dead:
                del live[record]
            before = file.counts.live_records
            try:
                file.compact(fail)
            except RuntimeError:
                failures += 1
            assert file.counts.live_records == before
            assert file.compact(move, segments=1) <= 10
            file.compact(move)
            assert file.counts.live_records == len(live)
            assert file.counts.dead_records <= len(live) + 10
            assert read(file, list(live)).tobytes() == b"".join(live.values())
        assert failures > 5


def test_values_out_of_range_are_refused(tmp_path):
    for size in (0, -1, (1 << 20) + 1):
        with pytest.raises(InvalidArgument, match="record_bytes"):
            SpillFile(tmp_path, size)
    for limit in (0, 15, 1 << 60):
        with pytest.raises(InvalidArgument, match="limit_bytes"):
            SpillFile(tmp_path, 8, limit_bytes=limit)
    file = SpillFile(tmp_path, 8)
    with pytest.raises(InvalidArgument, match="not open yet"):
        file.append(0, 0)
    with file:
        with pytest.raises(InvalidArgument, match="called already"):
            file.open()
        with pytest.raises(InvalidArgument, match="n = -1"):
            file.append(0, -1)
        assert file.append(0, 0).tolist() == []
        records = append(file, np.zeros((4, 8), np.uint8))
        for out in (np.empty((4, 7), np.uint8), np.empty((3, 8), np.uint8), np.empty((4, 8), np.int8)):
            with pytest.raises(Malformed, match="expected uint8"):
                file.read(records, out)
        with pytest.raises(InvalidArgument, match="writable"):
            file.read(records, np.empty((8, 4), np.uint8).T)
        for bad in (-1, 4, 10**9, 1 << 62):
            with pytest.raises(InvalidArgument, match=f"record {bad} is not live"):
                file.free(np.array([0, 1, bad]))
        for bad in (-1, 10**9, 1 << 62):
            with pytest.raises(InvalidArgument, match=f"record {bad} is not in use"):
                read(file, [0, bad])
        with pytest.raises(InvalidArgument, match="named twice"):
            file.free(np.array([0, 1, 0]))
        assert file.counts[:2] == (4, 0)
        with pytest.raises(InvalidArgument, match="pin 9"):
            file.unpin(9)
    file.close()
    with pytest.raises(InvalidArgument, match="closed"):
        read(file, [0])
    with pytest.raises(InvalidArgument, match="called already"):
        file.open()


def test_threads_read_while_one_appends_frees_and_compacts(tmp_path):
    rows = {}  # record number -> content, replaced whole, as a table's index would be
    lock = threading.Lock()
    done = threading.Event()
    problems, reads = [], []

    def readers(number):
        draw = random.Random(number)
        try:
            while not done.is_set() or not reads:
                with lock:
                    token = file.pin()
                    chosen = draw.sample(sorted(rows), min(len(rows), 30))
                    expected = b"".join(rows[record] for record in chosen)
                with np.errstate(over="ignore"):  # what conftest sets for the main thread
                    assert read(file, chosen).tobytes() == expected
                file.unpin(token)
                reads.append(len(chosen))
        except BaseException as error:
            problems.append(error)
            raise

    def move(old, new, content):
        with lock:
            for a, b in zip(old.tolist(), new.tolist(), strict=True):
                rows[b] = rows.pop(a)

    rng = np.random.default_rng(3)
    with SpillFile(tmp_path, 24, segment_bytes=32 * 20, limit_bytes=1 << 24) as file:
        threads = [threading.Thread(target=readers, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(reference.MANY // 20):
            content = some(rng, 30, 24)
            records = append(file, content)
            with lock:
                rows |= zip(records.tolist(), (line.tobytes() for line in content), strict=True)
                dead = [record for record in rows if rng.random() < 0.3]
                for record in dead:
                    del rows[record]
            file.free(np.array(dead, np.int64))
            file.compact(move)
        done.set()
        for thread in threads:
            thread.join()
        assert not problems
        assert file.counts.live_records == len(rows)


def test_close_waits_for_a_reader(tmp_path, rng):
    content = some(rng, 20, 80)
    file = SpillFile(tmp_path, 80)
    file.open()
    records = append(file, content)
    closing = threading.Thread(target=file.close)
    with file.reader() as reader:
        closing.start()
        while file._state != "closed":
            closing.join(0.001)
        out = np.empty((20, 80), np.uint8)
        assert read_records(reader, address_of(records), 20, address_of(out), 80) == 0
        assert closing.is_alive()
    closing.join()
    assert (out == content).all()
