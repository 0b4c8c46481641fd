# SPDX-License-Identifier: Apache-2.0
"""Configurations: every wrong name and value is named, and what is written as TOML reads back the same."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.launch.config import RunConfig, assign, build, load_toml, run_config, to_toml
from oarlock.proto.errors import InvalidArgument, NotFound


def test_the_defaults_are_valid() -> None:
    assert run_config({}) == RunConfig()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"epohcs": 3}, "unknown field 'epohcs'; did you mean 'epochs'"),
        ({"zzz": 3}, r"unknown field 'zzz' Known: recipe, data"),
        ({"epochs": "3"}, "epochs = '3': give an integer"),
        ({"epochs": True}, "epochs = True: give an integer"),
        ({"epochs": 2.0}, "give an integer"),
        ({"epochs": 0}, "epochs = 0: give an integer from 1"),
        ({"servers": -1}, "servers = -1"),
        ({"workers": 5000}, "from 1 to 4096"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 63}, "2\\^63 - 1"),
        ({"reader": "csv"}, "choose one of petastorm, arrow, auto"),
        ({"reader": 1}, "reader = 1: give a string"),
        ({"data": "a\0b"}, "zero byte"),
        ({"lease_seconds": float("nan")}, "give a finite number"),
        ({"lease_seconds": float("inf")}, "give a finite number"),
        ({"lease_seconds": 0.1}, "below lease_seconds"),
        ({"heartbeat_seconds": 0}, "above 0"),
        ({"checkpoint_epochs": -1}, "checkpoint_epochs must be >= 0"),
        ({"checkpoints_kept": 0}, "checkpoints_kept >= 1"),
        ({"compute_threads": 0}, "compute_threads = 0: give an integer from 1 to 256"),
        ({"blas_threads": 257}, "blas_threads = 257: give an integer from 1 to 256"),
        ({"blas_threads": True}, "blas_threads = True: give an integer"),
        ({"network_threads": 15}, "network_threads = 15: give an integer from 16 to 65536"),
        ({"request_memory_bytes": 1 << 20}, "request_memory_bytes = 1048576: give an integer from 67108864 to"),
        ({"server_pin_cores": "0-"}, "server_pin_cores = '0-': give cores like 0-3,8"),
        ({"worker_pin_cores": "Auto"}, "worker_pin_cores = 'Auto': give cores"),
        ({"worker_pin_cores": 3}, "worker_pin_cores = 3: give a string"),
        ({"restarts": -1}, r"restarts = -1: give an integer from 0 \(killed processes are not started again\)"),
        ({"restarts": 1.5}, "restarts = 1.5: give an integer"),
        ({"recipe_options": 3}, "recipe_options = 3: give a table"),
        ({"compression": 3}, "compression = 3: give a table"),
        (
            {"compression": {"user": {"push": "int7"}}},
            "compression.user: compression: push = 'int7'.*did you mean 'int8'",
        ),
        (
            {"compression": {"user": {"pull": "topk:0.1"}}},
            "compression.user: compression: pull = 'topk:0.1': nothing is kept",
        ),
    ],
)
def test_wrong_fields_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        run_config(values)


def test_an_integer_is_a_number() -> None:
    made = run_config({"lease_seconds": 7})
    assert made.lease_seconds == 7.0
    assert isinstance(made.lease_seconds, float)


@dataclass(frozen=True)
class Options:
    layers: tuple[int, ...] = (8, 4)
    rate: float = 0.1
    name: str = ""
    deep: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    maybe: float | None = None


def test_recipe_fields_are_checked_by_their_annotations() -> None:
    assert build(Options, {"layers": [1, 2], "maybe": 1}, "recipe_options").layers == [1, 2]
    for values, match in [
        ({"layers": [1, "x"]}, "layers = .* give a list, each an integer"),
        ({"layers": 3}, "give a list"),
        ({"rate": "fast"}, "rate = 'fast': give a finite number"),
        ({"deep": 1}, "deep = 1: give true or false"),
        ({"ratee": 1.0}, "did you mean 'rate'"),
    ]:
        with pytest.raises(InvalidArgument, match=match):
            build(Options, values, "recipe_options")


def test_settings_reach_into_tables() -> None:
    values: dict[str, Any] = {}
    for setting in (
        "epochs=3",
        "recipe_options.layers=[4, 2]",
        "recipe_options.model=gmf",
        "reader = arrow",
        "a.b.c=1.5",
    ):
        assign(values, setting)
    assert values == {
        "epochs": 3,
        "recipe_options": {"layers": [4, 2], "model": "gmf"},
        "reader": "arrow",
        "a": {"b": {"c": 1.5}},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ('"3"', "3"),
        ("abc", "abc"),
        ("", ""),
        ("03", "03"),
        ("a=b", "a=b"),
        ("1\nother = 2", "1\nother = 2"),
        ("/path/with spaces", "/path/with spaces"),
    ],
)
def test_values_are_toml_or_else_strings(text: str, value: Any) -> None:
    values: dict[str, Any] = {}
    assign(values, f"x={text}")
    assert values == {"x": value}


@pytest.mark.parametrize("setting", ["epochs", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_settings_without_a_name_or_a_value(setting: str) -> None:
    with pytest.raises(InvalidArgument, match="write it as NAME=VALUE"):
        assign({}, setting)


def test_a_setting_inside_a_value() -> None:
    with pytest.raises(InvalidArgument, match="epochs is a value, not a table"):
        assign({"epochs": 3}, "epochs.x=1")


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
values = st.one_of(
    texts,
    st.booleans(),
    st.integers(-(1 << 62), 1 << 62),
    st.floats(allow_nan=False),
    st.lists(st.integers(0, 9), max_size=3),
    st.lists(texts, max_size=3),
    st.dictionaries(texts, st.integers(0, 9), max_size=3),
)


@given(texts, st.dictionaries(texts, values, max_size=5))
def test_what_is_written_reads_back(data: str, options: dict[str, Any]) -> None:
    run = RunConfig(data=data, seed=12, lease_seconds=7.25)
    read = tomllib.loads(to_toml(run, options))
    assert read.pop("recipe_options") == options
    assert RunConfig(**read) == run


def test_compression_is_written_and_set_by_table() -> None:
    values: dict[str, Any] = {}
    for setting in (
        "compression.fields.push=int8+feedback",
        "compression.dense.push=topk:0.01",
        "compression.dense.zstd=true",
    ):
        assign(values, setting)
    run = run_config(values)
    assert run.compression == {"fields": {"push": "int8+feedback"}, "dense": {"push": "topk:0.01", "zstd": True}}
    read = tomllib.loads(to_toml(run, {"dim": 4}))
    assert read.pop("recipe_options") == {"dim": 4}
    assert RunConfig(**read) == run


def test_what_is_open_is_left_out() -> None:
    assert tomllib.loads(to_toml(RunConfig(), {"a": None, "b": (1, 2)}))["recipe_options"] == {"b": [1, 2]}


def test_a_path_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no text in UTF-8"):
        to_toml(RunConfig(data="/data/\udcff"), {})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no\.toml: no such file"):
        load_toml(tmp_path / "no.toml")
    with pytest.raises(InvalidArgument, match="Is a directory"):
        load_toml(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"epochs = ")
    with pytest.raises(InvalidArgument, match=r"bad\.toml: "):
        load_toml(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match=r"bad\.toml: .*decode"):
        load_toml(bad)
