# SPDX-License-Identifier: Apache-2.0
"""Data files and splits: the list, its JSON form, what is refused, and that a plan covers every row once."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.data.files import DataFile, check_files, files_from_json, files_to_json, list_files
from oarlock.data.order import split_order
from oarlock.data.splits import SplitPlan, locate, plan_splits
from oarlock.proto.errors import InvalidArgument, NotFound


def write(path: Path, rows: int, group: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user": list(range(rows))}), path, row_group_size=group)
    return path


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "_hidden.parquet", ".part.parquet", "sub/c.parquet"):
        write(tmp_path / name, 10, 4)
    (tmp_path / "notes.txt").write_text("no data")
    files = list_files(tmp_path)
    assert [Path(file.path).name for file in files] == ["a.parquet", "b.parquet"]
    assert files[0].row_groups == (4, 4, 2)
    assert files[0].size_bytes == os.path.getsize(tmp_path / "a.parquet")
    assert list_files(tmp_path / "a.parquet") == files[:1]
    assert files_from_json(json.loads(json.dumps(files_to_json(files)))) == files
    check_files(files)


def test_a_list_names_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", 3, 3)
    monkeypatch.chdir(tmp_path)
    assert list_files(".")[0].path == str(tmp_path / "a.parquet")


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere: no such file or directory; check the path"):
        list_files(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match=r"no \*\.parquet file in this directory"):
        list_files(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not a footer PAR1")
    with pytest.raises(InvalidArgument, match=r"bad\.parquet: not a readable Parquet file") as caught:
        list_files(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "bad.parquet").write_bytes(b"")
    with pytest.raises(InvalidArgument, match=r"bad\.parquet"):
        list_files(tmp_path)
    with pytest.raises(NotFound, match="not a directory"):
        list_files(tmp_path / "bad.parquet" / "below")


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_may_not_be_read_is_named(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", 3, 3)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may read everything, so the refusal is made rather than the mode of a folder.
    if what == "directory":
        monkeypatch.setattr("oarlock.data.files.os.listdir", refuse)
    else:
        monkeypatch.setattr("oarlock.data.files.pq.read_metadata", refuse)
    named = tmp_path if what == "directory" else path
    with pytest.raises(InvalidArgument, match=f"{named}: the .*{what} cannot be read; grant read permission"):
        list_files(tmp_path)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    files = list_files(write(tmp_path / "a.parquet", 10, 4))
    write(tmp_path / "a.parquet", 10, 5)
    with pytest.raises(InvalidArgument, match=r"a\.parquet: the file has changed .*3 row groups.*2 row groups"):
        check_files(files)
    os.remove(tmp_path / "a.parquet")
    with pytest.raises(NotFound, match=r"a\.parquet: no such data file"):
        check_files(files)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list"),
        ([{"path": "a"}], r"data files\[0\]: expected an object"),
        ([{"path": 3, "size_bytes": 1, "row_groups": []}], "path = 3"),
        ([{"path": "a", "size_bytes": -1, "row_groups": []}], "size_bytes = -1"),
        ([{"path": "a", "size_bytes": True, "row_groups": []}], "size_bytes = True"),
        ([{"path": "a", "size_bytes": 1, "row_groups": [1.5]}], "row_groups"),
    ],
)
def test_json_that_does_not_fit_is_refused(value: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        files_from_json(value)


def file_of(*groups: int) -> DataFile:
    return DataFile("/data/a.parquet", 1, groups)


def test_a_split_closes_as_soon_as_it_has_enough_rows() -> None:
    files = [file_of(3, 3, 9, 1, 1), file_of(5)]
    assert [(p.file, p.first_group, p.stop_group, p.rows) for p in plan_splits(files, 5)] == [
        (files[0], 0, 2, 6),
        (files[0], 2, 3, 9),
        (files[0], 3, 5, 2),
        (files[1], 0, 1, 5),
    ]
    assert [p.index for p in plan_splits(files, 5)] == [0, 1, 2, 3]
    assert plan_splits(files, 5)[1].first_row == 6
    assert str(plan_splits(files, 5)[0]) == "/data/a.parquet, row groups 0 to 1"
    assert str(plan_splits(files, 5)[1]) == "/data/a.parquet, row group 2"


@pytest.mark.parametrize("per_split", [1, 4, 7, 100])
def test_a_plan_has_every_row_once(per_split: int) -> None:
    files = [file_of(0, 2, 0, 5, 1), file_of(), file_of(0), file_of(8, 1, 0)]
    seen = [(p.file, group) for p in plan_splits(files, per_split) for group in range(p.first_group, p.stop_group)]
    assert len(seen) == len(set(seen))
    rows = [(f, g) for f in files for g, count in enumerate(f.row_groups) if count]
    assert set(rows) <= set(seen)
    assert all(
        p.rows == sum(p.file.row_groups[p.first_group : p.stop_group]) > 0 for p in plan_splits(files, per_split)
    )


def test_data_without_rows_cannot_be_planned() -> None:
    with pytest.raises(InvalidArgument, match="hold no row"):
        plan_splits([file_of(0, 0)], 10)
    with pytest.raises(InvalidArgument, match="rows_per_split = 0"):
        plan_splits([file_of(1)], 0)


def test_a_split_id_finds_epoch_and_place() -> None:
    plan: tuple[SplitPlan, ...] = plan_splits([file_of(*[1] * 9)], 1)
    for epoch in range(3):
        found = [locate(epoch * 9 + position, plan, 4) for position in range(9)]
        assert [e for e, _ in found] == [epoch] * 9
        assert [p.index for _, p in found] == split_order(4, epoch, 9).tolist()
    with pytest.raises(InvalidArgument, match="split -1"):
        locate(-1, plan, 4)
