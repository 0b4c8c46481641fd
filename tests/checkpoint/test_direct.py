# SPDX-License-Identifier: Apache-2.0
"""Large files past the system's cache hold what small ones would."""

import errno
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from oarlock.checkpoint.direct import CHUNK_BYTES, LEAST_BYTES, UNIT
from oarlock.checkpoint.files import Calls, LocalFiles

RANDOM = np.random.default_rng(5).integers(0, 256, CHUNK_BYTES + 3 * UNIT + 777, dtype=np.uint8).tobytes()


@dataclass
class Watched(Calls):
    """Notes how each write went, and refuses what a disk may refuse."""

    refuses: bool = False  # the direct way at all
    unit: int = 0  # writes that are no multiple of it, or begin at none
    short: int = 0  # a write takes no more than this
    log: list[tuple[bool, int]] = field(default_factory=list)

    def sync(self, descriptor: int) -> None:
        pass

    def bypass(self, descriptor: int, on: bool) -> bool:
        if self.refuses and on:
            return False
        return super().bypass(descriptor, on)

    def write(self, descriptor: int, data: memoryview) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and self.unit and (len(data) % self.unit or os.lseek(descriptor, 0, os.SEEK_CUR) % self.unit):
            raise OSError(errno.EINVAL, "no whole unit")
        n = super().write(descriptor, data[: self.short or None])
        self.log.append((direct, n))
        return n


@pytest.fixture
def direct(tmp_path: Path) -> bool:
    """Whether the file system of the temporary folder knows a direct way; both are tested where it does."""
    with (tmp_path / "probe").open("wb") as probe:
        return Calls().bypass(probe.fileno(), True)


@pytest.mark.parametrize("size", [LEAST_BYTES, LEAST_BYTES + 1, CHUNK_BYTES - 1, CHUNK_BYTES, len(RANDOM)])
def test_a_large_file_is_the_same_by_either_way(tmp_path: Path, direct: bool, size: int) -> None:
    for refuses in (False, True):
        calls = Watched(refuses)
        files = LocalFiles(tmp_path / str(refuses), calls=calls)
        data = RANDOM[:size]
        files.write_file("cut-000001/a", [data[:10], b"", data[10:5000], memoryview(data)[5000:]])
        assert (tmp_path / str(refuses) / "cut-000001" / "a").read_bytes() == data
        assert bytes(files.read_file("cut-000001/a")) == data
        by_way = {way: sum(n for found, n in calls.log if found == way) for way in (True, False)}
        straight = size // UNIT * UNIT if direct and not refuses else 0
        assert by_way == {True: straight, False: size - straight}


def test_a_small_file_is_written_as_it_is(tmp_path: Path) -> None:
    calls = Watched()
    files = LocalFiles(tmp_path, calls=calls)
    files.write_file("cut-000001/a", [RANDOM[:100], RANDOM[100 : LEAST_BYTES - 1]])
    assert bytes(files.read_file("cut-000001/a")) == RANDOM[: LEAST_BYTES - 1]
    assert not any(way for way, _ in calls.log)


def test_what_the_direct_way_refuses_goes_through_the_cache(tmp_path: Path, direct: bool) -> None:
    """A unit larger than ours, and parts of one."""
    for number, calls in enumerate((Watched(unit=1 << 20), Watched(short=100_001))):
        files = LocalFiles(tmp_path / str(number), calls=calls)
        files.write_file("cut-000001/a", RANDOM)
        assert bytes(files.read_file("cut-000001/a")) == RANDOM
        assert calls.log[0][0] == (direct and calls.unit > 0)
        assert not calls.log[-1][0]


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(tmp_path, calls=Watched())
    files.write_file("cut-000001/a", RANDOM)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="broken"):
        files.read_file("cut-000001/a")
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="broken"):
        files.write_file("cut-000001/b", RANDOM)


def test_what_is_refused_by_either_way_is_told_once_both_were_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file system: it is as if it knew a direct way."""
    ways: list[bool] = []
    tried: list[bool] = []

    class Refusing(Calls):
        def sync(self, descriptor: int) -> None:
            pass

        def bypass(self, descriptor: int, on: bool) -> bool:
            ways.append(on)
            return on

        def write(self, descriptor: int, data: memoryview) -> int:
            return refuse()

    def refuse(*_: object) -> int:
        tried.append(ways[-1])
        assert len(tried) < 10, "it is tried for ever"
        raise OSError(errno.EINVAL, "no such file")

    LocalFiles(tmp_path, calls=Watched()).write_file("cut-000001/a", RANDOM)
    files = LocalFiles(tmp_path, calls=Refusing())
    with pytest.raises(OSError, match="no such file"):
        files.write_file("cut-000001/b", RANDOM)
    assert tried == [True, False]
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(OSError, match="no such file"):
        files.read_file("cut-000001/a")
    assert tried == [True, False] * 2


def test_a_file_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path, calls=Watched())
    files.write_file("cut-000001/a", RANDOM)
    os.truncate(tmp_path / "cut-000001" / "a", LEAST_BYTES + 5)
    found = files.read_file("cut-000001/a")
    assert bytes(found) == RANDOM[: LEAST_BYTES + 5]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
