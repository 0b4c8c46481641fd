# SPDX-License-Identifier: Apache-2.0
"""What a warm start may name, and what is said of what it may not."""

import pytest

from oarlock.client.job import JobSpec
from oarlock.client.warm import WarmStart, chosen, read_warm_start, to_values
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument, NotFound, SpecMismatch

TABLES = {t.name: t for t in (TableSpec("user", 4), TableSpec("film", 8))}
OLD = {t.name: t for t in (TableSpec("user", 4), TableSpec("item", 8), TableSpec("wide", 1))}
DENSE = {d.name: d for d in (DenseSpec("w", (3, 4)), DenseSpec("b", (3,)))}
OLD_DENSE = {d.name: d for d in (DenseSpec("w", (4, 3)), DenseSpec("b", (3,)))}


def choose(**said):
    return chosen(WarmStart("p", **said), TABLES, DENSE, OLD, OLD_DENSE)


def test_without_names_all_of_equal_names_are_meant():
    found = choose()
    assert (found.tables, found.dense) == ({"user": "user"}, {"b": "b"})
    assert choose(tables={"film": "item"}) == WarmStart("p", {"film": "item"}, {})
    with pytest.raises(NotFound, match="has item, the job user: none of one name"):
        chosen(WarmStart("p"), {"user": TABLES["user"]}, {}, {"item": OLD["item"]}, {})


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        (
            {"tables": {"usr": "user"}},
            NotFound,
            r"the job has no table 'usr'; did you mean 'user'\? There are: film, user",
        ),
        (
            {"tables": {"film": "itme"}},
            NotFound,
            r"p has no table 'itme'; did you mean 'item'\? There are: item, user, wide",
        ),
        (
            {"tables": {"film": "user"}},
            SpecMismatch,
            'film has dim 8, user in the checkpoint 4: give dimension = "pad"',
        ),
        (
            {"tables": {"user": "item"}},
            SpecMismatch,
            'user has dim 4, item in the checkpoint 8: give dimension = "truncate"',
        ),
        ({"dense": {"w": "w"}}, SpecMismatch, r"w has shape \(3, 4\), w in the checkpoint \(4, 3\)"),
        ({"dense": {"b": "c"}}, NotFound, "has no dense parameter 'c'"),
        ({"dense": {"user": "w"}}, NotFound, "the job has no dense parameter 'user'"),
    ],
)
def test_what_does_not_go_together(said, error, match):
    with pytest.raises(error, match=match):
        choose(**said)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (7, "give a table with path"),
        ({"tables": {}}, "needs a path"),
        ({"path": 3}, r"warm_start\.path"),
        ({"path": "a\0"}, r"warm_start\.path"),
        ({"path": "a", "table": {}}, "unknown field 'table'; did you mean 'tables'"),
        ({"path": "a", "tables": ["user"]}, r"warm_start\.tables: give a table of names"),
        ({"path": "a", "dense": {"w": 3}}, r"warm_start\.dense: give a table of names"),
        ({"path": "a", "dimension": "cut"}, "choose one of refuse, truncate, pad"),
    ],
)
def test_values_that_are_none(values, match):
    with pytest.raises(InvalidArgument, match=match):
        read_warm_start(values, "job file")


def test_it_travels_with_the_job(spec_values):
    warm = WarmStart("p", {"film": "item"}, {"b": "b"}, "pad")
    assert read_warm_start(to_values(warm), "job") == warm
    assert not WarmStart()
    spec = JobSpec(**spec_values, warm_start=warm)
    assert JobSpec.from_json(spec.to_json()) == spec
    with pytest.raises(InvalidArgument, match="restore = 'q' and warm_start of 'p' contradict each other"):
        JobSpec(**spec_values, warm_start=warm, restore="q")


@pytest.fixture
def spec_values():
    numbers = ("splits", "evaluation_splits", "rows_per_split", "evaluation_rows_per_split", "batch_rows")
    values = dict.fromkeys((*numbers, "epochs", "servers", "workers", "seed"), 1)
    values |= dict.fromkeys(("files", "evaluation_files", "metrics"), ())
    tables, dense = tuple(TABLES.values()), tuple(DENSE.values())
    return {**values, "job": "a" * 32, "name": "n", "recipe": "x:y", "tables": tables, "dense": dense}
