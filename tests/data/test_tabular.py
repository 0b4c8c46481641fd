# SPDX-License-Identifier: Apache-2.0
"""Folders of tabular data: text becomes Parquet once and value for value, and what is wrong is found with its line."""

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.data import delimited, tabular
from oarlock.data.columns import codes_of
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.data.tabular import cache_folder, tabular_files
from oarlock.data.transforms import fit
from oarlock.proto.errors import InvalidArgument, NotFound

SCHEMA = """
format = "csv"
missing = ["", "?"]
label = { column = "y", positive = ["yes"], negative = ["no"] }
numbers = [{ column = "n" }]
fields = [{ column = "c" }, { column = "n", name = "n as it is" }]
"""
CSV = """y, c ,n,unused
yes, a,1,x
no,"b,c", 2.50,x
\t
no,?,,
yes,ü,1e3 ,x
"""


def folder(tmp_path: Path, files: dict[str, str | bytes], schema: str = SCHEMA) -> Path:
    root = tmp_path / "data"
    for name, text in {"schema.toml": schema, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def values(path: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return found


def test_text_becomes_parquet(tmp_path: Path) -> None:
    # A line of blanks is one column: the file's own blank line must be empty.
    root = folder(
        tmp_path, {"train.csv": CSV.replace("\t\n", "\n"), "test.csv.gz": gzip.compress(b"n,c,y\r\n7,a,no\r\n")}
    )
    told: list[tuple[str, int, int]] = []
    schema, train, test = tabular_files(root, tmp_path / "cache", lambda *words: told.append(words))
    assert told == [("convert", 1, 2), ("convert", 2, 2)]
    assert [Path(file.path).name for file in (*train, *test)] == ["train.csv.parquet", "test.csv.parquet"]
    assert values(train[0].path) == {
        "y": ["yes", "no", "no", "yes"],
        "n": ["1", "2.50", None, "1e3"],
        "c": ["a", "b,c", None, "ü"],
    }
    assert values(test[0].path) == {"y": ["no"], "n": ["7"], "c": ["a"]}
    fitted = fit(schema, train)
    part = open_reader("arrow").read(plan_splits(train, 10)[0], fitted.columns)
    features = fitted.apply(part)
    assert features.label.tolist() == [1, 0, 0, 1]
    assert part["n"].tolist()[:2] == [1.0, 2.5]
    assert part[codes_of("n")][2] == 0


def test_tabs_without_a_header(tmp_path: Path) -> None:
    schema = """
    format = "tsv"
    columns = ["y", "n", "c"]
    trim = false
    label = { column = "y" }
    numbers = [{ column = "n" }]
    fields = [{ column = "c" }]
    """
    lines = {"train/part-1.tsv": '0\t1\t "a"\n1\t\t\n', "train/part-0.tsv": "0.5\t-3\tb"}
    schema_read, train, test = tabular_files(folder(tmp_path, lines, schema), tmp_path / "cache")
    assert not test
    assert [values(file.path) for file in train] == [
        {"y": [0.5], "n": [-3.0], "c": ["b"]},
        {"y": [0.0, 1.0], "n": [1.0, None], "c": [' "a"', None]},
    ]
    assert schema_read.columns == ("y", "n", "c")


def test_parquet_is_read_where_it_is(tmp_path: Path) -> None:
    root = folder(tmp_path, {}, 'format = "parquet"\nlabel = { column = "y" }\nfields = [{ column = "c" }]')
    pq.write_table(pa.table({"y": [0, 1], "c": [17, 18]}), root / "train.parquet")
    _, train, test = tabular_files(root, tmp_path / "cache")
    assert [file.path for file in train] == [str(root / "train.parquet")]
    assert not test
    assert not (tmp_path / "cache").exists()
    pq.write_table(pa.table({"y": [0, 1], "d": [17, 18]}), root / "test.parquet")
    with pytest.raises(InvalidArgument, match=r"test.parquet: no column 'c'"):
        tabular_files(root)


def test_row_groups_depend_on_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "y,c,n\n" + "".join(f"yes,{i},{i}\n" for i in range(50_000))
    root = folder(tmp_path, {"train.csv": text})
    files = []
    for block in (1 << 12, 1 << 16, 1 << 22):
        monkeypatch.setattr(delimited, "BLOCK_BYTES", block)
        _, (file,), _ = tabular_files(root, tmp_path / f"cache {block}")
        assert file.row_groups == (16384, 16384, 16384, 848)
        files.append(Path(file.path).read_bytes())
    assert values(file.path)["c"] == [str(i) for i in range(50_000)]
    assert files[0] == files[1] == files[2]


def test_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"train.csv": "y,c,n\nyes,a,1\n"})
    made: list[Path] = []
    convert = delimited.convert_text

    def counted(source: Path, target: Path, schema: Any) -> None:
        made.append(target)
        convert(source, target, schema)

    monkeypatch.setattr(tabular, "convert_text", counted)
    first = tabular_files(root, tmp_path / "cache")[1]
    assert tabular_files(root, tmp_path / "cache")[1] == first
    assert len(made) == 1
    # Only what is said of reading counts; a fold of the same values reads the same.
    (root / "schema.toml").write_text(SCHEMA.replace('{ column = "c" }', '{ column = "c", hash = 9 }'))
    tabular_files(root, tmp_path / "cache")
    assert len(made) == 1
    (root / "schema.toml").write_text(SCHEMA.replace('"?"', '"-"'))
    tabular_files(root, tmp_path / "cache")
    assert len(made) == 2
    os.utime(root / "train.csv", ns=(1, 1))
    tabular_files(root, tmp_path / "cache")
    assert len(made) == 3
    # A file that was cut short is made again, and nothing half-made stays.
    made[-1].write_bytes(made[-1].read_bytes()[:100])
    tabular_files(root, tmp_path / "cache")
    assert len(made) == 4
    assert len(set(made)) == 3
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["train.csv.parquet"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv: the file is empty"),
        ("\n\n", "train.csv: the file is empty"),
        ("y,c,n\n", "train.csv: the file has a header line but no row"),
        ("y,c,n\nyes,a,1\n\nno,a,1,2\n", "train.csv, line 4: 4 columns, expected 3; correct the line"),
        ("y,c,n\nyes,a\n", "train.csv, line 2: 2 columns, expected 3"),
        ("y,c,n\nyes,a,1\n\n\nno,a,b\n", "train.csv, line 5: column 'n': 'b' is not a number"),
        ("y,c,n\nyes,a,1\nno,a,inf\n", "train.csv, line 3: column 'n': 'inf' is not a finite float32"),
        ("y,c,n\nyes,a,1\nno,a,-1e39\n", "train.csv, line 3: column 'n': '-1e39' is not a finite float32"),
        ("y,c,n\nyes,a,1\n?,a,1\n", "train.csv, line 3: column 'y': the label is missing"),
        (
            "y,c,n\nyes,a,1\nno.,a,1\n",
            "train.csv, line 3: column 'y': the label 'no.' is neither positive nor negative",
        ),
        ("y,cc,n\nyes,a,1\n", "train.csv: no column 'c' as the schema has it; did you mean 'cc'"),
        ("y,c,n,c\nyes,a,1,b\n", "train.csv: column 'c' appears 2 times"),
        (b"y,c,n\nyes,a,1\n\nyes,\xff,1\n", "train.csv, line 4: not UTF-8 text"),
        (b"y,c,\xff\nyes,a,1\n", "train.csv, line 1: not UTF-8 text"),
        ("y,c,n\nyes,a," + "1" * 400 + "\n", "line 2: column 'n': '1{40}' is not a finite float32"),
    ],
)
def test_text_that_is_wrong(tmp_path: Path, text: str | bytes, message: str) -> None:
    root = folder(tmp_path, {"train.csv": text})
    with pytest.raises(InvalidArgument, match=message):
        tabular_files(root, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 4096)
    root = folder(tmp_path, {"train.csv": "y,c,n\nyes,a,1\nyes," + "a" * 20_000 + ",1\n" + "yes,a,1\n" * 2000})
    with pytest.raises(InvalidArgument, match="a line is longer than 4,096 bytes"):
        tabular_files(root, tmp_path / "cache")


@pytest.mark.parametrize(
    ("label", "message"), [("2", "line 3: column 'y': the label '2' is not in"), ("no", "'no' is not a number")]
)
def test_label_that_is_no_share(tmp_path: Path, label: str, message: str) -> None:
    schema = 'format = "csv"\nlabel = { column = "y" }\nfields = [{ column = "c" }]'
    root = folder(tmp_path, {"train.csv": f"y,c\n0.5,a\n{label},a\n"}, schema)
    with pytest.raises(InvalidArgument, match=message):
        tabular_files(root, tmp_path / "cache")


def test_names_without_a_header_must_fit(tmp_path: Path) -> None:
    schema = 'format = "csv"\ncolumns = ["y", "c"]\nlabel = { column = "y" }\nfields = [{ column = "c" }]'
    with pytest.raises(InvalidArgument, match=r"line 1: 3 columns, expected 2; .* columns = .* must name every column"):
        tabular_files(folder(tmp_path, {"train.csv": "0,a,x\n"}, schema), tmp_path / "cache")
    with pytest.raises(InvalidArgument, match="line 2: column 'y': 'x' is not a number"):
        tabular_files(folder(tmp_path, {"train.csv": "0,a\nx,a\n"}, schema), tmp_path / "cache")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        tabular_files(tmp_path / "nothing")
    root = folder(tmp_path, {})
    with pytest.raises(NotFound, match=r"no file train.csv and no folder train/"):
        tabular_files(root)
    (root / "train.tsv").write_text("x")
    with pytest.raises(InvalidArgument, match=r"train.tsv: expected a name that ends in .csv or .csv.gz"):
        tabular_files(root)
    (root / "train.tsv").rename(root / "train.csv")
    (root / "train").mkdir()
    with pytest.raises(InvalidArgument, match=r"both train.csv and the folder train/"):
        tabular_files(root)
    (root / "train.csv").unlink()
    with pytest.raises(InvalidArgument, match="train: no file in this folder"):
        tabular_files(root)
    (root / "schema.toml").unlink()
    with pytest.raises(NotFound, match=r"schema.toml: no such file"):
        tabular_files(root)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"train.csv": "y,c,n\nyes,a,1\n"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be made"):
        tabular_files(root, tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "oarlock" / "tabular"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"oarlock-{os.getuid()}" / "tabular"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(InvalidArgument, match=r"no folder can be written .* set XDG_CACHE_HOME"):
        cache_folder()


def test_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"train.csv": "y,c,n\nyes,a,1\n"})
    numbers = delimited.parse_numbers

    def growing(*arguments: Any) -> Any:
        with open(root / "train.csv", "a") as file:
            file.write("no,a,1\n")
        return numbers(*arguments)

    monkeypatch.setattr(delimited, "parse_numbers", growing)
    with pytest.raises(InvalidArgument, match="changed while it was read"):
        tabular_files(root, tmp_path / "cache")
