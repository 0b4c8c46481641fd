# SPDX-License-Identifier: Apache-2.0
"""`oarlock export`: of a job by name, of its checkpoint by path; what it prints, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.cli import compress_options, export_options
from oarlock.embedding.spec import MAX_DIM
from oarlock.export import method, onnx, tables

Oarlock = Callable[..., Any]


def test_options_offer_what_there_is() -> None:
    # They are written again, so that `oarlock --help` imports none of it.
    assert (*tables.FORMATS, "onnx") == export_options.FORMATS
    assert export_options.MAX_ROW_BYTES == onnx.MAX_ROW_BYTES
    assert compress_options.RANKS == method.RANKS
    assert (compress_options.METHODS, compress_options.MAX_DIM) == (method.METHODS, MAX_DIM)


def test_rows_and_model_of_a_job_become_files(oarlock: Oarlock, train: Oarlock, tmp_path: Path) -> None:
    assert train("--epochs", "1", "--name", "first").code == 0
    ended = oarlock("export", "first", "--to", "rows", "--format", "parquet", "--state")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    told = dict(line.split(": ") for line in ended.out.splitlines())
    assert list(told) == ["rows/item.parquet", "rows/user.parquet"]
    rows = pq.read_table("rows/user.parquet")
    assert (
        told["rows/user.parquet"] == f"{len(rows):,} rows of user, {Path('rows/user.parquet').stat().st_size:,} bytes"
    )
    assert rows.column_names[:3] == ["key", "weights", "state"]
    for checkpoint in ("runs/first", "runs/first/checkpoints@1", "runs/first/checkpoints/cut-000001"):
        ended = oarlock("export", checkpoint, "--table", "user", "--to", "user.arrow", "--json")
        assert ended.code == 0, ended.err
        facts = json.loads(ended.out)
        assert (facts["cut"], facts["format"]) == (1, "arrow")
        assert facts["files"][0]["rows"] == len(rows)
        Path("user.arrow").unlink()
    pytest.importorskip("onnx")
    for more in (("--with-rows",), ()):
        Path("first.onnx").unlink(missing_ok=True)
        ended = oarlock("export", "first", "--to", "first.onnx", *more)
        assert ended.code == 0, ended.err
        assert ended.out == f"first.onnx: {Path('first.onnx').stat().st_size:,} bytes\n"
        assert "is there already" in oarlock("export", "first", "--to", "first.onnx").line
    assert "--max-row-bytes" in oarlock("export", "first", "--to", "a.onnx", "--with-rows", "--max-row-bytes", "9").line
    # A checkpoint says itself what its graph is, but not which code of others is to be imported.
    Path("runs/first/checkpoints").rename("alone")
    assert oarlock("export", "alone", "--to", "a.safetensors", "--table", "user").code == 0
    assert oarlock("export", "alone", "--to", "a.onnx").code == 0
    assert Path("a.onnx").read_bytes() == Path("first.onnx").read_bytes()
    store = LocalStore("alone")
    manifest = store.load_manifest()
    foreign = replace(manifest, cut=2, recipe="evil:recipe", blocks=manifest.blocks)
    store.commit(foreign)
    assert "job.json" in oarlock("export", "alone", "--to", "b.onnx").line
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs", "alone", "rows", "first.onnx", "a.safetensors", "a.onnx")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "a"], "give --format parquet, arrow, safetensors or onnx"),
        (["--to", "a.onnx", "--state"], "--state and --format onnx contradict each other"),
        (["--to", "a.onnx", "--table", "user"], "--table and --format onnx contradict each other"),
        (["--to", "a.arrow", "--with-rows"], "--with-rows and --format arrow contradict each other"),
        (["--to", "a.arrow"], "no checkpoint"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(oarlock: Oarlock, arguments: list[str], words: str) -> None:
    ended = oarlock("export", "nothing", *arguments)
    assert ended.code == 1
    assert words in ended.line
    assert ended.out == ""
