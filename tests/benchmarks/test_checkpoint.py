# SPDX-License-Identifier: Apache-2.0
"""What is made of workers' notes, on notes whose answer is known."""

from pathlib import Path

import numpy as np

from oarlock.benchmarks.checkpoint import row_bytes
from oarlock.benchmarks.checkpoint_disk import read_raw, write_raw
from oarlock.benchmarks.checkpoint_gaps import NOTES, groups, longest_gap, median_gap, speed
from oarlock.benchmarks.checkpoint_peer import PUSH


def test_notes_are_what_workers_write() -> None:
    found = np.frombuffer(PUSH.pack(1.0, 2.0, 3, 4, 5), NOTES)
    assert found.tolist() == [(1.0, 2.0, 3, 4, 5)]


def test_a_group_counts_once_when_its_last_message_was_acknowledged() -> None:
    notes = np.array([(0, 3, 1, 0, 0), (0, 1, 1, 0, 0), (0, 2, 1, 1, 0), (0, 0.5, 0, 1, 0)], NOTES)
    found = groups(notes)
    assert found[["told", "split", "group"]].tolist() == [(0.5, 0, 1), (2.0, 1, 1), (3.0, 1, 0)]


def test_gaps() -> None:
    told = np.array([0.0, 1.0, 2.0, 5.0, 6.0, 16.0])
    assert median_gap(told) == 1.0
    # A gap counts where any part of it is in the span.
    assert longest_gap(told, 2.5, 3.0) == 3.0
    assert longest_gap(told, 0.0, 1.5) == 1.0
    assert longest_gap(told, 1.0, 7.0) == 10.0
    assert longest_gap(told, 20.0, 30.0) == 0.0


def test_speed_is_of_all_workers() -> None:
    assert speed([np.array([1.0, 2.0, 3.0]), np.array([2.5])], 1.0, 3.0) == 1.5


def test_a_row_has_a_state_for_each_weight() -> None:
    assert row_bytes() == 8 + 4 * 17 + 4 * 17


def test_the_disk_is_left_as_it_was(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for each in files:
        each.write_bytes(b"x" * 1000)
    assert write_raw(files, tmp_path / "raw") > 0
    assert read_raw(files) > 0
    assert sorted(tmp_path.iterdir()) == files
