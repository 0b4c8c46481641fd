# SPDX-License-Identifier: Apache-2.0
"""The benchmark of smaller rows comes to its end and leaves nothing; Frappe's files become tabular data."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from oarlock.benchmarks.compress_rows import METHODS, prepare
from oarlock.data.tabular import tabular_files


@pytest.mark.slow
def test_it_comes_to_its_end(run_tiny: Any) -> None:
    result, _ = run_tiny("compress_rows")
    assert result["int8_bytes_ratio"] == 0.3125
    assert result["methods"].keys() == METHODS.keys()
    assert abs(result["int8_loss"]) < 0.01


def test_frappe_becomes_tabular_data(tmp_path: Path) -> None:
    line = (
        b"1 " + b" ".join(b"%d:1" % n for n in range(10)) + b"\n-1 " + b" ".join(b"%d:1" % n for n in range(10)) + b"\n"
    )
    for name in ("frappe.train.reconstructed.libfm.zst", "frappe.test.libfm.zst"):
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            stream.write(line)
    folder = prepare(tmp_path, tmp_path / "data", 0)
    schema, _, _ = tabular_files(folder)
    assert len(schema.fields) == 10
    assert (folder / "test.tsv").read_bytes() == line.replace(b" ", b"\t")
    (tmp_path / "other").mkdir()
    assert prepare(tmp_path / "other", tmp_path / "data2", 0) == (tmp_path / "other").resolve()
