# SPDX-License-Identifier: Apache-2.0
"""The text forms of a Schema: TOML, which people write, and JSON, which is saved with a model.

Invariant: both go through one reader that treats them as hostile: an unknown key, a wrong type or a missing part is an error
that says where it stands and, for a key, which one is near. ``from_values(to_values(schema)) == schema``. Any thread.
"""

import difflib
import json
import math
import os
import tomllib
from pathlib import Path
from typing import Any

from oarlock.data.schema_parts import Field, Label, Number, Schema, Vocabulary
from oarlock.proto.errors import InvalidArgument, NotFound

__all__ = ["Field", "Label", "Number", "Schema", "Vocabulary", "from_json", "load_schema", "to_json"]

MAX_BYTES = 4 << 20

_TOP = ("format", "columns", "missing", "trim", "label", "numbers", "fields")
_LABEL = ("column", "positive", "negative")
_NUMBER = ("column", "fill", "log", "standardise")
_FIELD = ("name", "column", "cross", "vocabulary", "hash", "bucketise", "quantiles")
_VOCABULARY = ("min_count", "max_size")


def load_schema(path: str | os.PathLike[str]) -> Schema:
    """Return the schema of a TOML file; the errors name the file and the key."""
    place = Path(os.path.abspath(path))
    try:
        data = place.read_bytes()
        if len(data) > MAX_BYTES:
            raise InvalidArgument(f"{place}: {len(data)} bytes are no schema; name a TOML file below 4 MiB")
        return from_values(tomllib.loads(data.decode("utf-8")), "schema")
    except FileNotFoundError:
        raise NotFound(f"{place}: no such file; docs/data.md says how to write a schema") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{place}: not readable as TOML ({' '.join(str(error).split())}); correct it") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{place}: {error}") from None


def to_json(schema: Schema) -> str:
    """Return the JSON form of a schema."""
    return json.dumps(to_values(schema), separators=(",", ":"))


def from_json(text: str) -> Schema:
    """Return the schema of its JSON form."""
    if len(text) > MAX_BYTES:
        raise InvalidArgument(f"schema: {len(text)} characters are over the limit of 4 MiB")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"schema: not readable as JSON ({error})") from None
    return from_values(values, "schema")


def to_values(schema: Schema) -> dict[str, Any]:
    """Return the schema as JSON-ready values, in the form of the TOML file."""
    label: dict[str, Any] = {"column": schema.label.column}
    for name in ("positive", "negative"):
        if getattr(schema.label, name):
            label[name] = list(getattr(schema.label, name))
    return {
        "format": schema.format,
        "columns": list(schema.columns),
        "missing": list(schema.missing),
        "trim": schema.trim,
        "label": label,
        "numbers": [
            {
                "column": number.column,
                "fill": "mean" if number.fill is None else number.fill,
                "log": number.log,
                "standardise": number.standardise,
            }
            for number in schema.numbers
        ],
        "fields": [_field_values(one) for one in schema.fields],
    }


def from_values(values: Any, owner: str) -> Schema:
    """Return the schema of nested values as TOML and JSON give them; ``owner`` begins the messages."""
    top = _table(values, _TOP, owner, ("format", "label"))
    label = _table(top["label"], _LABEL, "[label]", ("column",))
    if "positive" in label and not label["positive"]:
        raise InvalidArgument(
            "label.positive = []: list the values that mean 1, or leave it out for a column of numbers"
        )
    settings: dict[str, Any] = {}
    if "columns" in top:
        settings["columns"] = _texts(top["columns"], "columns")
    if "missing" in top:
        settings["missing"] = _values(top["missing"], "missing")
    if "trim" in top:
        settings["trim"] = _bool(top["trim"], "trim")
    return Schema(
        format=_text(top["format"], "format"),
        label=Label(
            _text(label["column"], "label.column"),
            _values(label.get("positive", []), "label.positive"),
            _values(label.get("negative", []), "label.negative"),
        ),
        numbers=tuple(_number(v, i) for i, v in enumerate(_list(top.get("numbers", []), "numbers"), 1)),
        fields=tuple(_field(v, i) for i, v in enumerate(_list(top.get("fields", []), "fields"), 1)),
        **settings,
    )


def _number(value: Any, place: int) -> Number:
    owner = f"[[numbers]] {place}"
    table = _table(value, _NUMBER, owner, ("column",))
    fill = table.get("fill", "mean")
    if fill != "mean":
        if isinstance(fill, str):
            raise InvalidArgument(f'{owner}: fill = {fill!r}: give "mean" or a number')
        fill = _float(fill, f"{owner}: fill")
    return Number(
        _text(table["column"], f"{owner}: column"),
        None if fill == "mean" else fill,
        _bool(table.get("log", False), f"{owner}: log"),
        _bool(table.get("standardise", True), f"{owner}: standardise"),
    )


def _field(value: Any, place: int) -> Field:
    owner = f"[[fields]] {place}"
    table = _table(value, _FIELD, owner, ())
    if ("column" in table) == ("cross" in table):
        raise InvalidArgument(f"{owner}: give one of column = NAME and cross = [NAMES]")
    if "column" in table:
        columns: tuple[str, ...] = (_text(table["column"], f"{owner}: column"),)
    else:
        columns = _texts(table["cross"], f"{owner}: cross")
        if len(columns) < 2:
            raise InvalidArgument(f"{owner}: cross = {list(columns)}: name two columns or more")
    vocabulary = None
    if "vocabulary" in table:
        given = _table(table["vocabulary"], _VOCABULARY, f"{owner}: vocabulary", ())
        vocabulary = Vocabulary(**{name: _int(v, f"{owner}: vocabulary.{name}") for name, v in given.items()})
    settings: dict[str, Any] = {}
    for name in ("hash", "quantiles"):
        if name in table:
            settings[name] = _int(table[name], f"{owner}: {name}")
            if settings[name] < 1:
                raise InvalidArgument(f"{owner}: {name} = {settings[name]}: give an integer >= 1, or leave it out")
    if "bucketise" in table:
        bounds = _list(table["bucketise"], f"{owner}: bucketise")
        settings["bucketise"] = tuple(_float(bound, f"{owner}: bucketise") for bound in bounds)
        if not bounds:
            raise InvalidArgument(f"{owner}: bucketise = []: give at least one bound")
    name = _text(table["name"], f"{owner}: name") if "name" in table else " x ".join(columns)
    return Field(name, columns, vocabulary, **settings)


def _field_values(one: Field) -> dict[str, Any]:
    values: dict[str, Any] = {"name": one.name}
    values |= {"cross": list(one.columns)} if one.is_cross else {"column": one.columns[0]}
    if one.vocabulary:
        values["vocabulary"] = {"min_count": one.vocabulary.min_count, "max_size": one.vocabulary.max_size}
    if one.hash:
        values["hash"] = one.hash
    if one.bucketise:
        values["bucketise"] = list(one.bucketise)
    if one.quantiles:
        values["quantiles"] = one.quantiles
    return values


def _table(value: Any, known: tuple[str, ...], owner: str, needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{owner}: expected a table, got {_shown(value)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument(f"{owner}: unknown key {str(key)[:40]!r}{hint} Known: {', '.join(known)}")
    for key in needed:
        if key not in value:
            raise InvalidArgument(f"{owner}: {key} is missing; give it")
    return value


def _list(value: Any, owner: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidArgument(f"{owner} = {_shown(value)}: expected a list")
    return value


def _text(value: Any, owner: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{owner} = {_shown(value)}: expected a string")
    return value


def _texts(value: Any, owner: str) -> tuple[str, ...]:
    return tuple(_text(item, owner) for item in _list(value, owner))


def _values(value: Any, owner: str) -> tuple[str, ...]:
    """Return values of a column as text: an integer counts as its digits."""
    for item in _list(value, owner):
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise InvalidArgument(f"{owner}: {_shown(item)}: expected strings or integers")
    return tuple(dict.fromkeys(str(item) for item in value))


def _bool(value: Any, owner: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{owner} = {_shown(value)}: expected true or false")
    return value


def _int(value: Any, owner: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{owner} = {_shown(value)}: expected an integer")
    return value


def _float(value: Any, owner: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) < 1e300
        or not math.isfinite(value)
    ):
        raise InvalidArgument(f"{owner} = {_shown(value)}: expected a finite number")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
