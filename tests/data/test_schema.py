# SPDX-License-Identifier: Apache-2.0
"""Schemas: what the text form means, that it survives saving, and that every mistake is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from oarlock.data.columns import ColumnSpec
from oarlock.data.schema import (
    Field,
    Label,
    Number,
    Schema,
    Vocabulary,
    from_json,
    from_values,
    load_schema,
    to_json,
    to_values,
)
from oarlock.proto.errors import InvalidArgument, NotFound

TEXT = """
format = "csv"
columns = ["age", "job", "town", "income", "note"]
missing = ["", "?", 99]

[label]
column = "income"
positive = ["high", 1]

[[numbers]]
column = "age"
fill = 40
log = true
standardise = false

[[numbers]]
column = "note"

[[fields]]
column = "job"
vocabulary = { min_count = 2, max_size = 100 }

[[fields]]
column = "age"
bucketise = [18, 30.5, 65]

[[fields]]
column = "age"
name = "age as it is"

[[fields]]
cross = ["age", "job"]
hash = 1000

[[fields]]
column = "town"
hash = 50

[[fields]]
column = "note"
quantiles = 10
"""


def test_text_form(tmp_path: Path) -> None:
    (tmp_path / "schema.toml").write_text(TEXT)
    schema = load_schema(tmp_path / "schema.toml")
    assert schema == Schema(
        "csv",
        Label("income", ("high", "1")),
        numbers=(Number("age", 40.0, log=True, standardise=False), Number("note", None, log=False, standardise=True)),
        fields=(
            Field("job", ("job",), vocabulary=Vocabulary(2, 100)),
            Field("age", ("age",), bucketise=(18.0, 30.5, 65.0)),
            Field("age as it is", ("age",)),
            Field("age x job", ("age", "job"), hash=1000),
            Field("town", ("town",), hash=50),
            Field("note", ("note",), quantiles=10),
        ),
        columns=("age", "job", "town", "income", "note"),
        missing=("", "?", "99"),
        trim=True,
    )
    # The age of the cross is its bucket; the text of the age is read for the field that has it as it is.
    assert schema.specs == (
        ColumnSpec("income", "category"),
        ColumnSpec("age", "number"),
        ColumnSpec("age", "category"),
        ColumnSpec("note", "number"),
        ColumnSpec("job", "category"),
        ColumnSpec("town", "category"),
    )
    assert from_json(to_json(schema)) == schema
    hash(schema)


def minimal(**changes: Any) -> dict[str, Any]:
    return {"format": "csv", "label": {"column": "y"}, "fields": [{"column": "c"}], **changes}


def test_what_is_left_out() -> None:
    schema = from_values(minimal(), "schema")
    assert schema == Schema("csv", Label("y"), fields=(Field("c", ("c",)),))
    assert (schema.missing, schema.trim, schema.columns) == (("",), True, ())
    assert schema.specs == (ColumnSpec("y", "label"), ColumnSpec("c", "category"))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"feilds": []}, "schema: unknown key 'feilds'; did you mean 'fields'"),
    ({"label": {"colum": "y"}}, r"\[label\]: unknown key 'colum'; did you mean 'column'"),
    ({"label": {}}, r"\[label\]: column is missing"),
    ({"label": "y"}, r"\[label\]: expected a table, got 'y'"),
    ({"label": {"column": "y", "positive": []}}, r"label.positive = \[\]: list the values"),
    ({"label": {"column": "y", "positive": [True]}}, "label.positive: True: expected strings or integers"),
    ({"label": {"column": "y", "negative": ["0"]}}, "label.negative: needs label.positive"),
    ({"label": {"column": "y", "positive": ["a"], "negative": ["a"]}}, "'a' is both positive and negative"),
    ({"label": {"column": "c"}}, "column 'c' is the label and also a number or field"),
    ({"format": "cvs"}, "format = 'cvs': choose one of csv, tsv, parquet; did you mean 'csv'"),
    ({"format": 3}, "format = 3: expected a string"),
    ({"format": "parquet", "columns": ["y", "c"]}, "columns: Parquet files name their own"),
    ({"columns": ["y", "cc"]}, "columns: no column 'c' as the schema has it; did you mean 'cc'"),
    ({"columns": ["y", "c", "c"]}, "columns 'c' appears twice"),
    ({"columns": "y"}, "columns = 'y': expected a list"),
    ({"missing": [None]}, "missing: None: expected strings or integers"),
    ({"trim": "yes"}, "trim = 'yes': expected true or false"),
    ({"fields": []}, "at least one"),
    ({"fields": {"column": "c"}}, "fields = .*: expected a list"),
    ({"fields": [{"column": "c", "cross": ["a", "b"]}]}, r"\[\[fields\]\] 1: give one of column = NAME and cross"),
    ({"fields": [{"hash": 3}]}, r"\[\[fields\]\] 1: give one of column = NAME and cross"),
    (
        {"fields": [{"column": "c"}, {"column": "d", "hsah": 3}]},
        r"\[\[fields\]\] 2: unknown key 'hsah'; did you mean 'hash'",
    ),
    (
        {"fields": [{"column": "c"}, {"column": "c", "hash": 3}]},
        "name 'c' appears twice; give one of them another name",
    ),
    ({"fields": [{"column": "c", "hash": 0}]}, "hash = 0: give an integer >= 1"),
    ({"fields": [{"column": "c", "hash": 1 << 63}]}, "hash = 9223372036854775808: give a number of buckets"),
    ({"fields": [{"column": "c", "hash": 3.0}]}, "hash = 3.0: expected an integer"),
    ({"fields": [{"column": "c", "hash": 3, "quantiles": 3}]}, "hash and quantiles: choose one"),
    ({"fields": [{"column": "c", "quantiles": 1}]}, "quantiles = 1: give 2 to 4096"),
    ({"fields": [{"column": "c", "bucketise": []}]}, r"bucketise = \[\]"),
    ({"fields": [{"column": "c", "bucketise": [1, 1]}]}, "in ascending order"),
    ({"fields": [{"column": "c", "bucketise": [1, 1.00000001]}]}, "as float32 distinct"),
    ({"fields": [{"column": "c", "bucketise": [1e39]}]}, "give finite numbers"),
    ({"fields": [{"column": "c", "bucketise": [float("nan")]}]}, "bucketise = nan: expected a finite number"),
    ({"fields": [{"column": "c", "bucketise": [10**400]}]}, "expected a finite number"),
    ({"fields": [{"column": "c", "bucketise": list(range(5000))}]}, "5000 bounds, at most 4096"),
    ({"fields": [{"cross": ["c"]}]}, "name two columns or more"),
    ({"fields": [{"cross": ["c", "c"]}]}, "a column is named twice"),
    ({"fields": [{"cross": ["c", "d"], "quantiles": 3}]}, "quantiles does not go with cross"),
    (
        {"fields": [{"column": "c", "vocabulary": {"min_cout": 2}}]},
        "vocabulary: unknown key 'min_cout'; did you mean 'min_",
    ),
    ({"fields": [{"column": "c", "vocabulary": {"min_count": 0}}]}, "vocabulary.min_count = 0"),
    ({"fields": [{"column": "c", "vocabulary": True}]}, "expected a table, got True"),
    ({"fields": [{"column": ""}]}, "give a name of 1 to 256"),
    ({"fields": [{"column": "c:codes"}]}, "names that end in :offsets or :codes are taken"),
    ({"fields": [{"column": f"c{i}"} for i in range(4097)]}, "fields: 4097 of them, at most 4096"),
    ({"numbers": [{"column": "n"}, {"column": "n"}]}, "numbers: column 'n' appears twice"),
    ({"numbers": [{"column": "n", "fill": "median"}]}, "fill = 'median': give \"mean\" or a number"),
    ({"numbers": [{"column": "n", "fill": 1e39}]}, 'fill = 1e.39: give "mean" or a finite number'),
    ({"numbers": [{"column": "n", "fill": float("inf")}]}, "fill = inf: expected a finite number"),
    ({"numbers": [{"column": "n", "standardize": True}]}, "unknown key 'standardize'; did you mean 'standardise'"),
    ({"numbers": [{"column": "n", "log": 1}]}, "log = 1: expected true or false"),
    ({"numbers": ["n"]}, r"\[\[numbers\]\] 1: expected a table"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        from_values(minimal(**changes), "schema")


def test_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "schema.toml"
    with pytest.raises(NotFound, match=r"schema.toml: no such file"):
        load_schema(path)
    for data, message in [
        (b"format = ", "not readable as TOML"),
        (b"\xff", "not readable as TOML"),
        (b"a = " + b"[" * 100_000, "not readable as TOML"),
        (b"# " + b"x" * (4 << 20), "are no schema"),
        (b"formt = 1", "schema.toml: schema: unknown key 'formt'; did you mean 'format'"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InvalidArgument, match=message):
            load_schema(path)
    with pytest.raises(InvalidArgument, match="not readable as TOML"):
        load_schema(tmp_path)


def test_json_that_is_none() -> None:
    values = to_values(from_values(minimal(), "schema"))
    for text in ("", "[]", "{", "[" * 100_000, json.dumps({**values, "more": 1})):
        with pytest.raises(InvalidArgument):
            from_json(text)


@pytest.mark.parametrize("name", ["adult", "criteo", "frappe"])
def test_the_schemas_of_the_docs_are_read(name: str) -> None:
    found = load_schema(Path(__file__).resolve().parents[2] / "docs" / "schemas" / f"{name}.toml")
    assert len(found.fields) == {"adult": 13, "criteo": 26, "frappe": 10}[name]
    assert len(found.numbers) == {"adult": 5, "criteo": 13, "frappe": 0}[name]


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "schema.toml").write_text(example)
    schema = load_schema(tmp_path / "schema.toml")
    assert [field.name for field in schema.fields] == [
        "job",
        "town",
        "education",
        "age",
        "age by tenths",
        "age x job x education",
    ]
    assert schema.kinds["age"] == ("number",)
