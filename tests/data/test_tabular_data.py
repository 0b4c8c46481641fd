# SPDX-License-Identifier: Apache-2.0
"""Published tabular data, where they are present, from their text to features: the counts that their sources state."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from oarlock.data.columns import Arrays
from oarlock.data.files import DataFile
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.data.tabular import tabular_files
from oarlock.data.transforms import Fitted, fit

ADULT = """
format = "csv"
columns = [
    "age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship", "race",
    "gender", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income_bracket",
]
missing = ["", "?"]

[label]
column = "income_bracket"
positive = [">50K", ">50K."]
negative = ["<=50K", "<=50K."]

[[numbers]]
column = "age"

[[numbers]]
column = "capital_gain"
log = true

[[fields]]
column = "occupation"
vocabulary = { min_count = 10 }

[[fields]]
column = "native_country"

[[fields]]
column = "age"
bucketise = [18, 25, 30, 35, 40, 45, 50, 55, 60, 65]

[[fields]]
cross = ["age", "education", "occupation"]
hash = 5000
"""
CRITEO = (
    'format = "tsv"\ncolumns = ["label"'
    + "".join(f', "I{i}"' for i in range(1, 14))
    + "".join(f', "C{i}"' for i in range(1, 27))
    + ']\nlabel = { column = "label" }\n'
    + "".join(f'[[numbers]]\ncolumn = "I{i}"\nlog = true\n' for i in range(1, 14))
    + "".join(f'[[fields]]\ncolumn = "C{i}"\nhash = 100_000\n' for i in range(1, 27))
)


def unpack(source: Path, target: Path) -> list[list[str]]:
    """Write a zstd file to ``target``; return its rows, read the slow way."""
    with pa.input_stream(str(source), compression="zstd") as stream:
        data: bytes = stream.read()
    target.write_bytes(data)
    cut = "," if target.suffix == ".csv" else "\t"
    return [[value.strip() for value in line.split(cut)] for line in data.decode().splitlines() if line]


def read(files: tuple[DataFile, ...], fitted: Fitted) -> Arrays:
    parts = [open_reader("auto").read(plan, fitted.columns) for plan in plan_splits(files, 10_000)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_adult(shared_data: Path, tmp_path: Path) -> None:
    if not (shared_data / "adult").is_dir():
        pytest.skip("shared data: adult is not present")
    rows = unpack(shared_data / "adult" / "adult.data.zst", tmp_path / "train.csv")
    unpack(shared_data / "adult" / "adult.test.zst", tmp_path / "test.csv")
    (tmp_path / "schema.toml").write_text(ADULT)
    schema, train, test = tabular_files(tmp_path, tmp_path / "cache")
    assert [sum(file.rows for file in files) for files in (train, test)] == [32_561, 16_281]
    assert train[0].row_groups == (16_384, 16_177)
    fitted = fit(schema, train)
    learnt, held_out = fitted.apply(read(train, fitted)), fitted.apply(read(test, fitted))
    assert learnt.label.sum() == 7_841
    assert held_out.label.sum() == 3_846
    assert np.allclose(learnt.dense.mean(0), 0, atol=1e-5)
    assert np.allclose(learnt.dense.std(0), 1, atol=1e-4)
    age = np.array([float(row[0]) for row in rows])
    assert np.allclose(learnt.dense[:, 0], (age - age.mean()) / age.std(), atol=1e-5)
    distinct = [np.unique(learnt.keys[:, i]).size for i in range(4)]
    # 14 occupations, of which one has 9 rows, and "?"; 41 countries and "?".
    assert distinct[:3] == [len({row[6] for row in rows}), len({row[13] for row in rows}), 11]
    assert [int(np.unique(learnt.keys[:, 1], return_counts=True)[1].max()), len(rows)] == [29_170, 32_561]


def test_criteo(shared_data: Path, tmp_path: Path) -> None:
    if not (shared_data / "criteo-8k").is_dir():
        pytest.skip("shared data: criteo-8k is not present")
    rows = unpack(shared_data / "criteo-8k" / "criteo.train.tsv.zst", tmp_path / "train.tsv")
    unpack(shared_data / "criteo-8k" / "criteo.test.tsv.zst", tmp_path / "test.tsv")
    (tmp_path / "schema.toml").write_text(CRITEO)
    schema, train, test = tabular_files(tmp_path, tmp_path / "cache")
    assert [file.rows for file in (*train, *test)] == [7_200, 391]
    fitted = fit(schema, train)
    assert (fitted.width, len(fitted.fields)) == (13, 26)
    features = fitted.apply(read(train, fitted))
    assert features.label.tolist() == [float(row[0]) for row in rows]
    for i in (0, 1, 12):
        x = np.array([float(row[1 + i]) if row[1 + i] else np.nan for row in rows])
        t = np.sign(x) * np.log1p(np.abs(x))
        expected = np.nan_to_num((t - np.nanmean(t)) / np.nanstd(t), nan=0.0)
        assert np.allclose(features.dense[:, i], expected, atol=1e-5)
    distinct = [np.unique(features.keys[:, i]).size for i in range(26)]
    there = [len({row[14 + i] for row in rows}) for i in range(26)]
    # Of 4,000 values in 100,000 buckets about 80 share one.
    assert all(0.97 * count - 1 <= found <= count for found, count in zip(distinct, there, strict=True))
    assert fitted.apply(read(test, fitted)).keys.shape == (391, 26)
