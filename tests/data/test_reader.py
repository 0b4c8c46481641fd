# SPDX-License-Identifier: Apache-2.0
"""Readers: both give the same arrays in the same order, and refuse the same rows with the same words."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.data import petastorm_reader
from oarlock.data.columns import ColumnSpec, offsets_of
from oarlock.data.files import list_files
from oarlock.data.reader import Reader, SplitReader, check_columns, open_reader
from oarlock.data.splits import SplitPlan, plan_splits
from oarlock.proto.errors import InvalidArgument, NotFound

needs_petastorm = pytest.mark.skipif(
    petastorm_reader.problem() is not None, reason=f"petastorm: {petastorm_reader.problem()}"
)
KINDS = [pytest.param("petastorm", marks=needs_petastorm), "arrow"]
COLUMNS = (
    ColumnSpec("user", "key"),
    ColumnSpec("item", "key"),
    ColumnSpec("price", "float"),
    ColumnSpec("count", "float"),
    ColumnSpec("clicked", "label"),
    ColumnSpec("negatives", "key_list"),
    ColumnSpec("history", "key_list"),
)


@pytest.fixture(params=KINDS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return open_reader(request.param)


def rows_of(first: int, rows: int) -> dict[str, Any]:
    ids = np.arange(first, first + rows)
    lists = [list(range(i % 4)) for i in ids.tolist()]
    return {
        "user": ids * 1_000_003,
        "item": ids.astype(np.int32),
        "price": ids / 7,
        "count": ids.astype(np.int16),
        "clicked": ids % 3 == 0,
        "negatives": pa.ListArray.from_arrays(
            pa.array(np.arange(rows + 1, dtype=np.int32) * 99), pa.array(np.arange(rows * 99) + first)
        ),
        "history": pa.array(lists, pa.list_(pa.int64())),
        "unused": [f"text {i}" for i in ids.tolist()],
    }


def write(folder: Path, **changes: Any) -> SplitPlan:
    table = pa.table({**rows_of(0, 10), **changes})
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    return plan_splits(list_files(folder), 100)[0]


def test_values_and_order(reader: Reader, tmp_path: Path) -> None:
    # A folder's name that looks like a partition, several files, one of them with a single row group.
    folder = tmp_path / "day=3 %41"
    folder.mkdir()
    for part, (first, rows, group) in enumerate([(0, 20, 6), (20, 5, 100), (25, 9, 3)]):
        pq.write_table(pa.table(rows_of(first, rows)), folder / f"part-{part}.parquet", row_group_size=group)
    for per_split in (1, 7, 1000):
        parts = [reader.read(plan, COLUMNS) for plan in plan_splits(list_files(folder), per_split)]
        whole = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0] if not name.endswith(":offsets")
        }
        ids = np.arange(34)
        assert np.array_equal(whole["user"], (ids * 1_000_003).astype(np.uint64))
        assert np.array_equal(whole["item"], ids.astype(np.uint64))
        assert np.array_equal(whole["price"], (ids / 7).astype(np.float32))
        assert np.array_equal(whole["count"], ids.astype(np.float32))
        assert np.array_equal(whole["clicked"], (ids % 3 == 0).astype(np.float32))
        assert whole["negatives"].size == 34 * 99
        assert whole["history"].tolist() == [k for i in range(34) for k in range(i % 4)]
        for part in parts:
            assert np.diff(part[offsets_of("history")]).tolist() == [int(i) % 4 for i in part["item"]]
            assert np.diff(part[offsets_of("negatives")]).tolist() == [99] * part["item"].size
            for name, array in part.items():
                wanted = (
                    np.int64
                    if ":" in name
                    else np.uint64
                    if name in ("user", "item", "negatives", "history")
                    else np.float32
                )
                assert array.dtype == wanted
                assert array.flags.c_contiguous
                assert array.flags.writeable


@needs_petastorm
@pytest.mark.parametrize("key", [pa.int8(), pa.int32(), pa.int64(), pa.uint16(), pa.uint32(), pa.uint64()])
def test_readers_agree_on_every_key_type(tmp_path: Path, key: Any) -> None:
    values = pa.array(range(100), key)
    offsets = pa.array(range(0, 101, 2), pa.int64())
    table = pa.table({"user": values[:50], "large": pa.LargeListArray.from_arrays(offsets, values)})
    table = table.append_column("fixed", pa.FixedSizeListArray.from_arrays(values, 2))
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        # With an empty row group: petastorm publishes nothing for it.
        for part in (table.slice(0, 13), table.slice(0, 0), table.slice(13)):
            writer.write_table(part)
    columns = [ColumnSpec("user", "key"), ColumnSpec("large", "key_list"), ColumnSpec("fixed", "key_list")]
    for per_split in (1, 50):
        for plan in plan_splits(list_files(tmp_path), per_split):
            found, wanted = (open_reader(kind).read(plan, columns) for kind in ("petastorm", "arrow"))
            assert list(found) == list(wanted)
            for name, array in wanted.items():
                assert array.dtype == found[name].dtype
                assert np.array_equal(array, found[name])
    assert wanted["user"].tolist() == list(range(50))
    assert wanted["fixed"].tolist() == wanted["large"].tolist() == list(range(100))


def test_largest_keys_come_through(reader: Reader, tmp_path: Path) -> None:
    keys = np.array([0, 2**63, 2**64 - 1], np.uint64)
    pq.write_table(pa.table({"user": keys}), tmp_path / "a.parquet")
    found = reader.read(plan_splits(list_files(tmp_path), 1)[0], [ColumnSpec("user", "key")])
    assert np.array_equal(found["user"], keys)


BAD = [
    ({"user": pa.array([*range(6), -7, 7, 8, 9])}, "user", "row 6, column 'user': -7 is negative"),
    ({"user": pa.array([*range(6), None, 7, 8, 9])}, "user", "row 6, column 'user': null is not a key"),
    ({"price": pa.array([0.0] * 9 + [float("nan")])}, "price", "row 9, column 'price': nan is not a finite"),
    ({"price": pa.array([0.0] * 5 + [1e300] * 5)}, "price", "row 5, column 'price': 1e\\+300 is not a finite"),
    ({"price": pa.array([0.0] * 4 + [None] * 6)}, "price", "row 4, column 'price': the value is null"),
    ({"clicked": pa.array([0.0] * 8 + [float("inf")] * 2)}, "clicked", "row 8, column 'clicked': inf is not a finite"),
    ({"clicked": pa.array([1] * 8 + [None] * 2)}, "clicked", "row 8, column 'clicked': the value is null"),
    ({"history": pa.array([[1]] * 5 + [[], [2, -3], [4], [], []])}, "history", "row 6, .*the list holds -3"),
    ({"history": pa.array([[1]] * 5 + [[], [2, None], [4], [], []])}, "history", "row 6, .*the list holds None"),
    ({"history": pa.array([[1]] * 7 + [None] * 3)}, "history", "row 7, .*null is not a list"),
]


@pytest.mark.parametrize(("changes", "name", "message"), BAD)
def test_bad_values_are_named(reader: Reader, tmp_path: Path, changes: Any, name: str, message: str) -> None:
    plan = write(tmp_path, **changes)
    wanted = [column for column in COLUMNS if column.name == name]
    with pytest.raises(InvalidArgument, match=f"a.parquet: {message}") as caught:
        reader.read(plan, wanted)
    assert "\n" not in str(caught.value)
    for late in plan_splits(list_files(tmp_path), 1)[1:]:
        # The position is that in the file, also when a split starts later.
        if late.first_row <= int(message.split(",")[0].removeprefix("row ")) < late.first_row + late.rows:
            with pytest.raises(InvalidArgument, match=message):
                reader.read(late, wanted)


def test_missing_columns_and_wrong_types_are_named(reader: Reader, tmp_path: Path) -> None:
    plan = write(tmp_path)
    with pytest.raises(InvalidArgument, match=r"no column 'usr'; the file's columns are user, item, price"):
        reader.read(plan, [ColumnSpec("usr", "key")])
    for name, kind, found in [
        ("price", "key", "double"),
        ("unused", "key", "string"),
        ("unused", "label", "string"),
        ("user", "key_list", "int64"),
        ("negatives", "key", "list<"),
    ]:
        with pytest.raises(InvalidArgument, match=f"column '{name}' has type {found}.*but a {kind} column needs"):
            reader.read(plan, [ColumnSpec(name, kind)])
        with pytest.raises(InvalidArgument, match=f"column '{name}' has type"):
            check_columns([plan.file], [ColumnSpec(name, kind)])


def test_column_specs_and_readers_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="kind 'text': choose one of key, float"):
        ColumnSpec("user", "text")
    with pytest.raises(InvalidArgument, match="non-empty"):
        ColumnSpec("", "key")
    with pytest.raises(InvalidArgument, match="reader 'spark': choose one of petastorm, arrow, auto"):
        open_reader("spark")


def test_lost_rows_are_an_error(tmp_path: Path) -> None:
    plan = write(tmp_path)

    class Loses:
        def table(self, plan: SplitPlan, names: Any) -> Any:
            return pq.read_table(plan.file.path, columns=names).slice(1)

    with pytest.raises(InvalidArgument, match=r"row groups 0 to 2: the test reader returned 9 rows .* says 10"):
        SplitReader("test", Loses()).read(plan, COLUMNS)


def test_a_file_that_changed_since_the_plan_is_an_error(reader: Reader, tmp_path: Path) -> None:
    plan = write(tmp_path)
    pq.write_table(pa.table(rows_of(0, 8)), tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(InvalidArgument, match="returned 8 rows where the footer says 10"):
        reader.read(plan, COLUMNS)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(NotFound, match="the data file is gone"):
        reader.read(plan, COLUMNS)


def test_damaged_pages_are_an_error(reader: Reader, tmp_path: Path) -> None:
    plan = write(tmp_path)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(InvalidArgument, match=r"a\.parquet, row groups 0 to 2: the .* reader failed") as caught:
        reader.read(plan, COLUMNS)
    assert "\n" not in str(caught.value)


def test_auto_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_reader("auto").name == ("arrow" if petastorm_reader.problem() else "petastorm")
    monkeypatch.setattr(petastorm_reader, "problem", lambda: "No module named 'petastorm'")
    assert open_reader("auto").name == "arrow"
    with pytest.raises(InvalidArgument, match=r"No module named 'petastorm'.*install oarlock\[petastorm\]"):
        open_reader("petastorm")


def test_petastorm_is_loaded_only_when_used() -> None:
    script = (
        "import sys; from oarlock.data.reader import open_reader; open_reader('arrow'); "
        "sys.exit('petastorm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@needs_petastorm
def test_petastorm_is_silent_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    plan = write(tmp_path)
    warnings.simplefilter("always")
    open_reader("petastorm").read(plan, COLUMNS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert [str(w.message) for w in recwarn] == []
    with pytest.warns(FutureWarning, match="of mine"):
        warnings.warn("of mine", FutureWarning, stacklevel=1)


@needs_petastorm
def test_petastorm_thread_pool_looks_at_its_ventilator_first() -> None:
    """A result that arrives between the two questions of ThreadPool.get_results must not be dropped."""
    petastorm_reader.problem()
    from_pool = sys.modules["petastorm.workers_pool.thread_pool"].ThreadPool
    asked = []

    class Ventilator:
        def completed(self) -> bool:
            asked.append("ventilator")
            return True

    pool = from_pool(1)
    pool._ventilator = Ventilator()
    pool.current_worker_done = lambda worker: asked.append("worker") or True
    assert pool.all_workers_done()
    assert asked == ["ventilator", "worker"]


@needs_petastorm
def test_a_path_that_petastorm_would_cut_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a#b"
    folder.mkdir()
    plan = write(folder)
    with pytest.raises(InvalidArgument, match="use --reader arrow"):
        open_reader("petastorm").read(plan, COLUMNS)
    assert open_reader("arrow").read(plan, COLUMNS)["user"].size == 10
