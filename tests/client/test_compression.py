# SPDX-License-Identifier: Apache-2.0
"""How compression is spelt in a job, and what is refused when the job is made, by name."""

import pytest
import rig

from oarlock.client.compression import Way, WireSpec, feedback_of, read_compression, read_way
from oarlock.client.forms import Forms
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.embedding.spec import TableSpec
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("float32", Way("none")),
        ("float16", Way("float16")),
        ("bfloat16", Way("bfloat16")),
        ("int8", Way("int8")),
        ("int8+feedback", Way("int8", feedback=True)),
        ("float16+feedback", Way("float16", feedback=True)),
        ("topk:0.01", Way("topk", 0.01, feedback=True)),
        ("topk:1", Way("topk", 1.0, feedback=True)),
    ],
)
def test_what_can_be_written(text, way):
    assert read_way(text, "push") == way
    assert WireSpec(push=text).pushed == way


@pytest.mark.parametrize(
    "text",
    [
        *("", "int4", "none", "float32+feedback", "topk", "topk:", "topk:0", "topk:1.5", "topk:nan", "topk:-1"),
        *("topk:x+feedback", 8, None, True),
    ],
)
def test_what_cannot(text):
    with pytest.raises(InvalidArgument, match="compression: push"):
        WireSpec(push=text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"user": {"pull": "topk:0.1"}}, "nothing is kept of rows"),
        ({"user": {"pull": "int8+feedback"}}, "nothing is kept of rows"),
        ({"user": {"push": "int9"}}, "did you mean 'int8'"),
        ({"user": {"puhs": "int8"}}, "did you mean 'push'"),
        ({"user": {"zstd": 3}}, "zstd = 3: give true or false"),
        ({"user": "int8"}, "compression.user = 'int8': give a table of pull, push, zstd"),
    ],
)
def test_what_is_wrong_is_named(values, words):
    with pytest.raises(InvalidArgument, match=words) as error:
        read_compression(values, "job file")
    assert "job file" in str(error.value)


@pytest.mark.parametrize(
    ("compression", "mode", "words"),
    [
        ({"usr": WireSpec()}, "async", "compression.usr: the job has no such table; did you mean 'user'"),
        ({"user": WireSpec(push="topk:0.1")}, "geo", "mode = 'geo' and compression.user.push = 'topk:0.1'"),
        ({"dense": WireSpec(push="int8+feedback")}, "geo", "mode = 'geo' and compression.dense.push"),
    ],
)
def test_a_job_that_cannot_be_is_refused(compression, mode, words):
    with pytest.raises(InvalidArgument, match=words):
        rig.spec_of(compression=compression, mode=mode)


def test_what_goes_with_geo_and_ssp():
    rig.spec_of(
        compression={"user": WireSpec("int8", "int8", zstd=True), "dense": WireSpec(push="float16")}, mode="geo"
    )
    spec = rig.spec_of(compression={"user": WireSpec(push="topk:0.1")}, mode="ssp", staleness=2)
    assert feedback_of(spec.compression)
    assert not feedback_of({"user": WireSpec("int8", "int8")})


def test_the_name_dense_is_taken():
    with pytest.raises(InvalidArgument, match="a table named 'dense' contradict"):
        rig.spec_of(tables=(TableSpec("dense", 2),), compression={"dense": WireSpec()})


def test_a_spec_comes_back_as_it_went():
    spec = rig.spec_of(compression={"user": WireSpec("int8", "topk:0.1", zstd=True), "dense": WireSpec()})
    assert JobSpec.from_json(spec.to_json()) == spec
    broken = spec.to_json().replace('"topk:0.1"', '"topk:7"')
    with pytest.raises(InvalidArgument, match="topk:7"):
        JobSpec.from_json(broken)


def test_gradients_of_which_nothing_is_kept_are_rounded_stochastically():
    spec = rig.spec_of(compression={"user": WireSpec("int8", "int8"), "item": WireSpec("float16", "int8+feedback")})
    forms = Forms(Layout(spec.tables, spec.dense), spec.compression, spec.seed)
    assert [form.compression.rounding for form in forms.pushes] == ["stochastic", "nearest"]
    assert [form.compression.rounding for form in forms.pulls] == ["nearest", "nearest"]
    assert [form.limit for form in forms.pushes] == [1e15, 1e15]
    assert forms.kept == [False, True]
    assert not forms.kept_dense
    assert forms.pull_dense.plain
    assert forms.push_dense.plain
