# SPDX-License-Identifier: Apache-2.0
"""Transforms: fitted values and every feature equal their plain twins, however the rows are cut, and survive saving."""

import base64
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.data import transforms_text
from oarlock.data.columns import Arrays
from oarlock.data.field_keys import add_to_cross, bucket_codes, fold_codes, write_keys
from oarlock.data.files import DataFile, list_files
from oarlock.data.reader import open_reader
from oarlock.data.scaling import add_moments, scale_numbers, signed_log
from oarlock.data.schema import Field, Label, Number, Schema, Vocabulary
from oarlock.data.splits import plan_splits
from oarlock.data.transforms import Features, Fitted, fit
from oarlock.data.vocabulary import keep_known
from oarlock.proto.errors import InvalidArgument, NotFound

BOUNDS = (18.0, 30.5, 65.0)
SCHEMA = Schema(
    "parquet",
    Label("income", positive=("high", "1"), negative=("low",)),
    numbers=(
        Number("age"),
        Number("gain", fill=0.0, log=True),
        Number("gain2", log=True, standardise=False),
        Number("age2", fill=-1.0, standardise=False),
    ),
    fields=(
        Field("job", ("job",), vocabulary=Vocabulary(2, 5)),
        Field("age", ("age",), bucketise=BOUNDS),
        Field("town", ("town",)),
        Field("town'", ("town",), hash=7),
        Field("age x job", ("age", "job"), hash=1000),
        Field("job x town", ("job", "town")),
        Field("quarter", ("gain",), quantiles=4),
    ),
    missing=("", "?"),
)
ROWS = 3000


def make_rows(rng: np.random.Generator) -> dict[str, list[Any]]:
    def sometimes(values: list[Any]) -> list[Any]:
        return [None if gap else value for value, gap in zip(values, rng.random(ROWS) < 0.1, strict=True)]

    jobs = [["clerk", "cook", "?", "driver", "", f"odd {i % 40}"][j] for i, j in enumerate(rng.integers(0, 6, ROWS))]
    jobs[0], jobs[1] = "only once", "very rare"
    age = sometimes(rng.integers(0, 100, ROWS).tolist())
    gain = sometimes((rng.standard_normal(ROWS) * 1000).astype(np.float32).tolist())
    return {
        "income": [["high", "low", "1"][j] for j in rng.integers(0, 3, ROWS)],
        "age": age,
        "age2": age,
        "gain": gain,
        "gain2": gain,
        "job": sometimes(jobs),
        "town": sometimes(rng.integers(-3, 20, ROWS).tolist()),
    }


def write(folder: Path, rows: dict[str, list[Any]], group: int = 700) -> tuple[DataFile, ...]:
    folder.mkdir(exist_ok=True)
    table = pa.table(rows)
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=group)
    pq.write_table(table.slice(half), folder / "b.parquet", row_group_size=group)
    return list_files(folder)


def read(files: tuple[DataFile, ...], fitted: Fitted) -> list[Arrays]:
    reader = open_reader("arrow")
    return [reader.read(plan, fitted.columns) for plan in plan_splits(files, 1 << 20)]


def joined(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def equal(left: Features, right: Features) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def rows(rng: np.random.Generator) -> dict[str, list[Any]]:
    return make_rows(rng)


def test_every_feature_equals_its_twin(tmp_path: Path, rows: dict[str, list[Any]], reference: ModuleType) -> None:
    files = write(tmp_path, rows)
    told: list[tuple[str, int, int]] = []
    fitted = fit(SCHEMA, files, lambda *words: told.append(words))
    assert told[-1] == ("fit", ROWS, ROWS)
    assert fitted.fields == ("job", "age", "town", "town'", "age x job", "job x town", "quarter")
    assert fitted.width == 4
    features = fitted.apply(joined(read(files, fitted)))
    assert (features.dense.dtype, features.keys.dtype, features.label.dtype) == (np.float32, np.uint64, np.float32)
    assert np.array_equal(features.label, np.array([value != "low" for value in rows["income"]], np.float32))
    # Numbers: those that are there have mean 0 and deviation 1, gaps are filled.
    age = np.array([math.nan if v is None else v for v in rows["age"]])
    gain = np.array([math.nan if v is None else reference.signed_log(v) for v in rows["gain"]])
    scaled = (age - np.nanmean(age)) / np.nanstd(age)
    assert np.allclose(features.dense[:, 0], np.nan_to_num(scaled, nan=0.0), atol=1e-6)
    scaled = (np.nan_to_num(gain, nan=0.0) - np.nanmean(gain)) / np.nanstd(gain)
    assert np.allclose(features.dense[:, 1], scaled, atol=1e-6)
    assert np.allclose(features.dense[:, 2], np.nan_to_num(gain, nan=np.nanmean(gain)), atol=1e-6)
    assert np.array_equal(features.dense[:, 3], np.nan_to_num(age, nan=-1.0).astype(np.float32))
    # Fields.
    job = [0 if v in ("", "?", None) else reference.hash_value(v) for v in rows["job"]]
    town = [reference.hash_value(v) for v in rows["town"]]
    counts = Counter(code for code in job if code)
    ranked = sorted(counts, key=lambda code: (-counts[code], code))
    known = {code for code in ranked if counts[code] >= 2}.intersection(ranked[:5])
    assert len(known) == 5
    kept = [code if code in known or not code else 1 for code in job]
    buckets = [reference.bucket(math.nan if v is None else v, BOUNDS) for v in rows["age"]]
    bounds = fitted.bounds[6].tolist()
    expected = {
        "job": kept,
        "age": buckets,
        "town": town,
        "town'": [reference.fold(code, 7) for code in town],
        "age x job": [reference.fold(reference.cross([a, j]), 1000) for a, j in zip(buckets, job, strict=True)],
        "job x town": [reference.cross([j, t]) for j, t in zip(job, town, strict=True)],
        "quarter": [reference.bucket(math.nan if v is None else v, bounds) for v in rows["gain"]],
    }
    for i, (name, codes) in enumerate(expected.items()):
        wanted = np.array([reference.key(name, code) for code in codes], np.uint64)
        assert np.array_equal(features.keys[:, i], wanted), name
    present = np.array([code for code in expected["quarter"] if code])
    assert np.bincount(present - 16).tolist() == pytest.approx([len(present) / 4] * 4, abs=3)


def test_no_cut_changes_a_bit(tmp_path: Path, rows: dict[str, list[Any]], rng: np.random.Generator) -> None:
    files = write(tmp_path / "x", rows)
    fitted = fit(SCHEMA, files)
    arrays = joined(read(files, fitted))
    whole = fitted.apply(arrays)
    # Any rows, in any order and number, of any process: here one that read what was saved.
    saved = Fitted.from_json(fitted.to_json())
    assert saved.to_json() == fitted.to_json()
    for size in (0, 1, 777, ROWS):
        chosen = rng.permutation(ROWS)[:size]
        part = {name: values[chosen] for name, values in arrays.items()}
        assert equal(saved.apply(part), Features(*(values[chosen] for values in whole)))
    # In serving there is no label to look at.
    del arrays["income:codes"]
    served = saved.apply(arrays, label=False)
    assert served.label.size == 0
    assert equal(served._replace(label=whole.label), whole)
    assert {spec.name for spec in saved.columns} - {spec.name for spec in saved.inputs} == {"income"}
    # How rows lie in files changes moments in their last bits only, and neither vocabularies nor quantiles.
    other = fit(SCHEMA, write(tmp_path / "y", rows, group=50))
    assert {i: v.tolist() for i, v in other.vocabularies.items()} == {
        i: v.tolist() for i, v in fitted.vocabularies.items()
    }
    assert other.bounds[6].tolist() == fitted.bounds[6].tolist()
    assert np.allclose(np.array(other.scalings), np.array(fitted.scalings), rtol=1e-12)


def test_logarithm_needs_no_library(rng: np.random.Generator, reference: ModuleType) -> None:
    sizes = np.concatenate([10.0 ** rng.uniform(-40, 38.5, 3000), np.linspace(0, 4, 1000), [np.finfo(np.float32).max]])
    for x in np.concatenate([sizes, -sizes]).tolist():
        assert signed_log(x) == pytest.approx(reference.signed_log(x), rel=2e-15, abs=0)
    # To the bit, on every machine.
    assert [signed_log(x).hex() for x in (1e-9, 0.1, 7.0, -1e30)] == [
        "0x1.12e0be801f1d9p-30",
        "0x1.8663f793c46c7p-4",
        "0x1.0a2b23f3bab73p+1",
        "-0x1.144f69ff9ffc4p+6",
    ]


def test_kernels_are_compiled_once(tmp_path: Path, rows: dict[str, list[Any]]) -> None:
    files = write(tmp_path, rows)
    fitted = fit(SCHEMA, files)
    fitted.apply(joined(read(files, fitted)))
    for kernel in (scale_numbers, add_moments, bucket_codes, fold_codes, add_to_cross, write_keys, keep_known):
        if hasattr(kernel, "signatures"):
            assert len(kernel.signatures) == 1, kernel


def test_keys_of_fields_do_not_meet() -> None:
    names = [f"f{i}" for i in range(50)]
    schema = Schema("parquet", Label("y"), fields=tuple(Field(name, ("c",)) for name in names))
    codes = np.arange(100, 1100, dtype=np.uint64)
    keys = Fitted(schema, (), {}, {}).apply({"c:codes": codes}, label=False).keys
    assert np.unique(keys).size == keys.size


ONE = {"y": [0.0, 1.0, 0.5], "n": [1.0, 2.0, None], "c": ["a", "b", "a"]}


def one(**changes: Any) -> Schema:
    return Schema(**{"format": "parquet", "label": Label("y"), "fields": (Field("c", ("c",)),), **changes})


@pytest.mark.parametrize(
    ("schema", "rows", "message"),
    [
        (one(), {"y": [0.0, 2.0, 1.0]}, "a.parquet, row group 0: row 1 .*'y': the label 2.0 is not in .0, 1."),
        (one(), {"y": [0.0, None, 1.0]}, "row 1, column 'y': the value is null"),
        (one(), {"y": [0.0, math.nan, 1.0]}, "row 1, column 'y': nan is not a finite"),
        (one(), {"y": ["0", "1", "1"]}, "column 'y' has type string, but a label column needs"),
        (one(label=Label("y", ("7",))), {"y": [0, 1, 1]}, "label y: none of 3 rows is positive .'7'."),
        (one(label=Label("y", ("1",))), {"y": [0, None, 1]}, "row 1 .*'y': the label is missing"),
        (one(label=Label("y", ("1",))), {"y": ["0", "", "1"]}, "row 1 .*'y': the label is missing"),
        (one(label=Label("y", ("1",), ("0",))), {"y": [0, 1, 2]}, "row 2 .*neither positive nor negative"),
        (one(numbers=(Number("n"),)), {"n": [1.0, math.inf, 2.0]}, "row 1, column 'n': inf is not a finite"),
        (one(numbers=(Number("n"),)), {"n": [None, math.nan, None]}, "numbers n: none of 3 rows has a value"),
        (one(numbers=(Number("m"),)), {}, "no column 'm'; the file's columns are y, n, c"),
        (one(fields=(Field("n", ("n",)),)), {}, "'n' has type double, but a category column needs strings"),
        (one(fields=(Field("n", ("n",), quantiles=3),)), {"n": [None, None, math.nan]}, "fields n: .*no number"),
        (
            one(fields=(Field("c", ("c",), vocabulary=Vocabulary(3)),)),
            {},
            "fields c: no value occurs 3 times in 3 rows",
        ),
    ],
)
def test_data_that_do_not_fit(tmp_path: Path, schema: Schema, rows: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table({**ONE, **rows}), tmp_path / "a.parquet")
    with pytest.raises(InvalidArgument, match=message):
        fit(schema, list_files(tmp_path))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no training file"):
        fit(one(), ())
    pq.write_table(pa.table(ONE).slice(0, 0), tmp_path / "a.parquet")
    files = list_files(tmp_path)
    with pytest.raises(InvalidArgument, match="hold no row"):
        fit(one(), files)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(NotFound, match="gone"):
        fit(one(), files)


def test_constant_column_says_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({**ONE, "n": [1e6, 1e6, None]}), tmp_path / "a.parquet")
    fitted = fit(one(numbers=(Number("n"),)), list_files(tmp_path))
    assert fitted.apply(read(list_files(tmp_path), fitted)[0]).dense.tolist() == [[0.0], [0.0], [0.0]]


def test_arrays_that_do_not_fit() -> None:
    fitted = Fitted(one(numbers=(Number("n"),)), [transforms_text.Scaling(False, 0.0, 0.0, 1e-12)], {}, {})
    good: Arrays = {"y": np.zeros(3, np.float32), "n": np.zeros(3, np.float32), "c:codes": np.full(3, 20, np.uint64)}
    fitted.apply(good)
    for changes, message in [
        ({"n": None}, "column 'n' .number. is missing"),
        ({"n": np.zeros(3)}, "column 'n': expected contiguous float32"),
        ({"n": np.zeros((3, 1), np.float32)}, "column 'n': expected contiguous float32"),
        ({"n": np.zeros(6, np.float32)[::2]}, "column 'n': expected contiguous float32"),
        ({"c:codes": np.full(4, 20, np.uint64)}, "column 'c': 4 rows, but others have 3"),
        ({"n": np.array([0, np.inf, 0], np.float32)}, "row 1 .*'n': inf cannot be scaled"),
        ({"n": np.array([0, 0, 1e38], np.float32)}, "row 2 .*'n': .* cannot be scaled"),
        ({"y": np.array([0, 1, -0.1], np.float32)}, "row 2 .*'y': the label -0.1"),
    ]:
        arrays = {name: values for name, values in {**good, **changes}.items() if values is not None}
        with pytest.raises(InvalidArgument, match=message):
            fitted.apply(arrays)


def saved_values() -> dict[str, Any]:
    schema = one(
        numbers=(Number("n"),),
        fields=(Field("c", ("c",), vocabulary=Vocabulary()), Field("n", ("n",), bucketise=(1.0, 2.0))),
    )
    hashes = np.array([100, 200, 300], np.uint64)
    fitted = Fitted(
        schema, [transforms_text.Scaling(False, 1.0, 2.0, 3.0)], {1: np.array([1, 2], np.float32)}, {0: hashes}
    )
    values: dict[str, Any] = json.loads(fitted.to_json())
    return values


def b64(*values: int) -> str:
    return base64.b64encode(np.array(values, "<u8").tobytes()).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not the saved form"),
        ({"version": 2}, "version 2, this Oarlock reads 1"),
        ({"more": 1}, "expected exactly"),
        ({"schema": {}}, "transforms: schema: format is missing"),
        ({"numbers": []}, "numbers: expected a list of 1"),
        ({"numbers": [[0, 0, 0]]}, "scale > 0"),
        ({"numbers": [[0, 0, math.inf]]}, "all finite"),
        ({"numbers": [[0, "0", 1]]}, "all finite"),
        ({"numbers": [[0, 10**400, 1]]}, "all finite"),
        ({"bounds": {}}, "bounds: expected those of exactly the fields .'n'."),
        ({"bounds": {"n": [2, 1]}}, "bounds of n: expected finite float32 in ascending"),
        ({"bounds": {"n": [1e39]}}, "bounds of n: expected finite float32 in ascending"),
        ({"bounds": {"n": "12"}}, "bounds of n: expected a list"),
        ({"vocabularies": {"d": ""}}, "vocabularies: expected those of exactly the fields .'c'."),
        ({"vocabularies": {"c": "?"}}, "vocabulary of c: expected base64"),
        ({"vocabularies": {"c": ""}}, "vocabulary of c: expected base64"),
        ({"vocabularies": {"c": "AAAA"}}, "vocabulary of c: expected base64"),
        ({"vocabularies": {"c": b64(300, 200)}}, "expected hashes in ascending order"),
        ({"vocabularies": {"c": b64(0, 200)}}, "none below 16"),
    ],
)
def test_saved_form_is_hostile(changes: dict[str, Any], message: str) -> None:
    Fitted.from_json(json.dumps(saved_values()))
    with pytest.raises(InvalidArgument, match=message):
        Fitted.from_json(json.dumps({**saved_values(), **changes}))


def test_saved_form_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = Fitted.from_json(json.dumps(saved_values()))
    for limit in (300, 16):
        monkeypatch.setattr(transforms_text, "MAX_BYTES", limit)
        with pytest.raises(InvalidArgument, match=r"over the limit of 16 MiB .*c: 3.*raise vocabulary.min_count"):
            fitted.to_json()
        with pytest.raises(InvalidArgument, match="over the limit"):
            Fitted.from_json(json.dumps(saved_values()))
    for text in ("", "null", "[" * 15):
        with pytest.raises(InvalidArgument):
            Fitted.from_json(text)
