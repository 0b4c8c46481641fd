# SPDX-License-Identifier: Apache-2.0
"""Bad input: exit code 1 and one clear line on standard error; no job folder, no traceback."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

Oarlock = Callable[..., Any]


def change(folder: Path, which: str, make: Callable[[pa.Table], pa.Table]) -> None:
    for path in (folder / which).glob("*.parquet"):
        pq.write_table(make(pq.read_table(path)), path)


def cast(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, values)


def minus(table: pa.Table, column: str) -> pa.Table:
    return cast(table, column, pc.negate(pc.add(table[column].cast(pa.int64()), 1)))


def nan(table: pa.Table, column: str) -> pa.Table:
    return cast(table, column, pa.array([float("nan")] * len(table)))


@pytest.mark.parametrize("reader", ["arrow", pytest.param("petastorm", marks=pytest.mark.petastorm)])
@pytest.mark.parametrize(
    ("which", "make", "words"),
    [
        ("train", lambda t: t.drop_columns(["item"]), "item"),
        ("test", lambda t: t.drop_columns(["user"]), "user"),
        ("train", lambda t: cast(t, "user", t["user"].cast(pa.string())), "user"),
        ("train", lambda t: minus(t, "user"), "negative"),
        ("train", lambda t: nan(t, "item"), "item"),
        ("test", lambda t: nan(t, "item"), "item"),
    ],
    ids=["no-item", "no-user-in-test", "strings", "negative-ids", "nan", "nan-in-test"],
)
def test_columns_that_are_missing_or_wrong(
    oarlock: Oarlock, data: Path, tmp_path: Path, which: str, make: Any, words: str, reader: str
) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "bad"))
    change(bad, which, make)
    ended = oarlock(
        *("train", "ncf", "--data", str(bad), "--epochs", "1", "--in-process", "--reader", reader),
        *("--set", "lease_seconds=1", "--set", "heartbeat_seconds=0.1"),
    )
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("oarlock: ")
    assert words in last
    assert which in last
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_data_that_is_not_there(oarlock: Oarlock, tmp_path: Path) -> None:
    ended = oarlock("train", "ncf", "--data", "nowhere")
    assert ended.code == 1
    assert "nowhere" in ended.line
    (tmp_path / "empty").mkdir()
    ended = oarlock("train", "ncf", "--data", "empty")
    assert ended.code == 1
    assert "oarlock data" in ended.line
    ended = oarlock("train", "ncf")
    assert (ended.code, ended.line) == (1, "oarlock: no data: give --data DIR, or `data` in the job file")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(oarlock: Oarlock, data: Path, tmp_path: Path) -> None:
    closed = Path(shutil.copytree(data, tmp_path / "closed"))
    (closed / "train").chmod(0)
    ended = oarlock("train", "ncf", "--data", str(closed))
    (closed / "train").chmod(0o700)
    assert ended.code == 1
    assert "grant read permission" in ended.line


def test_data_that_is_no_parquet(oarlock: Oarlock, data: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "bad"))
    next((bad / "train").glob("*.parquet")).write_bytes(b"garbage")
    ended = oarlock("train", "ncf", "--data", str(bad))
    assert ended.code == 1
    assert "not a readable Parquet file" in ended.line
    (bad / "dataset.json").write_text("{")
    ended = oarlock("train", "ncf", "--data", str(bad))
    assert ended.code == 1
    assert "dataset.json" in ended.line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nfc"], "no recipe 'nfc'; did you mean 'ncf'?"),
        (["zzz"], "There are: dlrm, ncf, wide_deep"),
        (["no_such_module:recipe"], "no module 'no_such_module'"),
        (["oarlock.recipes.ncf:nothing"], "has no 'nothing'"),
        (["job.toml"], "job.toml: no such file"),
        (["ncf", "--epochs", "0"], "epochs = 0"),
        (["ncf", "--set", "epohcs=3"], "did you mean 'epochs'"),
        (["ncf", "--set", "recipe_options.factrs=3"], "did you mean 'factors'"),
        (["ncf", "--set", "recipe_options.factors=abc"], "factors = 'abc': give an integer"),
        (["ncf", "--set", "recipe_options.model=mf"], "choose one of"),
        (["ncf", "--set", "epochs.x=3"], "epochs"),
        (["ncf", "--name", "a/b"], "use 1 to 100 letters"),
    ],
)
def test_jobs_that_make_no_sense(oarlock: Oarlock, data: Path, arguments: list[str], words: str) -> None:
    ended = oarlock("train", *arguments, "--data", str(data))
    assert ended.code == 1
    assert words in ended.line


def test_a_job_file_with_mistakes(oarlock: Oarlock, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    for text, words in [
        ("epochs = ", "job.toml"),
        ("epohcs = 3", "did you mean 'epochs'"),
        ('epochs = "3"', "give an integer"),
        ("[recipe_options]\nlayers = 3", "give a list"),
    ]:
        file.write_text(text)
        ended = oarlock("train", "job.toml", "--data", str(data))
        assert ended.code == 1, text
        assert words in ended.line, text


def test_jobs_that_are_not_there(oarlock: Oarlock) -> None:
    for command in ("status", "stop"):
        ended = oarlock(command, "nobody")
        assert ended.code == 1
        assert "no job 'nobody'" in ended.line
    ended = oarlock("train", "ncf", "--name", "nobody", "--resume")
    assert ended.code == 1
    assert "holds no job" in ended.line


def test_data_sets_that_cannot_be_made(oarlock: Oarlock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["generate", "ncf", "out", "--items", "80"],
        ["generate", "ncf", "out", "--users", "-1"],
        ["generate", "ncf", "file/out"],
        ["import", "ncf", "nowhere", "out"],
    ):
        ended = oarlock("data", *arguments)
        assert ended.code == 1, arguments
        assert ended.line.startswith("oarlock: ")


def test_a_folder_that_cannot_be_written(oarlock: Oarlock, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ended = oarlock("train", "ncf", "--data", str(data), "--dir", "file/job")
    assert ended.code == 1
    assert "cannot be written" in ended.line
