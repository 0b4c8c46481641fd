# SPDX-License-Identifier: Apache-2.0
"""Where a job keeps its checkpoints: what a job file may say of it, and that no secret can stand there."""

from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.place import Place, check_owner, same_place
from oarlock.proto.errors import InvalidArgument


def test_the_jobs_own_folder_is_where_they_go_unless_something_else_is_said(tmp_path: Path) -> None:
    assert Place().root(tmp_path) == str(tmp_path / "checkpoints")
    assert Place("/data/x/").root(tmp_path) == "/data/x"
    place = Place("s3://bucket/first/", {"endpoint_url": "http://127.0.0.1:9"}, "zstd")
    assert place.root(tmp_path) == "s3://bucket/first"
    store = Place("memory://place", compress="zstd").open(tmp_path)
    assert (store.files.root, store.compress) == ("memory://place", "zstd")
    assert Place().open(tmp_path).compress is None


def test_options_are_for_places_of_their_kind() -> None:
    place = Place("s3://bucket/first", {"endpoint_url": "http://127.0.0.1:9"})
    assert place.options_for("s3://other/second/cut-000012") == {"endpoint_url": "http://127.0.0.1:9"}
    assert place.options_for("memory://x") == place.options_for("/data/x") == {}
    assert Place().options_for("/data/x") == {}


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKIA"},
        {"secret": "x"},
        {"token": "x"},
        {"password": "x"},
        {"account_key": "x"},
        {"sas_token": "x"},
        {"connection_string": "x"},
        {"client_kwargs": {"aws_secret_access_key": "x"}},
        {"client_kwargs": {"aws_access_key_id": "x"}},
        {"s3_additional_kwargs": {"SSECustomerKey": "x"}},
        {"endpoint_url": "https://me:zebra@host"},
    ],
)
def test_secrets_are_refused_without_being_shown(options: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidArgument, match="would be written to the job's files and logs: give credentials in the"
    ) as told:
        Place("s3://bucket/first", options)
    assert "AKIA" not in str(told.value)
    assert "zebra" not in str(told.value)


def test_what_is_no_secret_is_not_refused() -> None:
    options = {
        "endpoint_url": "https://host:9000",
        "anon": False,
        "profile": "training",
        "client_kwargs": {"region_name": "eu-central-1"},
        "config_kwargs": {"retries": {"max_attempts": 3}, "connect_timeout": 5.5},
        "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/one"},
    }
    assert Place("s3://bucket/first", options).options == options


@pytest.mark.parametrize("path", ["s3://me:zebra@bucket/x", "https://host/x?sig=zebra", "az://c/x#zebra"])
def test_urls_with_secrets_are_refused_without_being_shown(path: str) -> None:
    with pytest.raises(InvalidArgument, match="has a password or a query: give credentials") as told:
        Place(path)
    assert "zebra" not in str(told.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("", {"endpoint_url": "x"}), "are those of a URL's file system"),
        (("s3://b/x", {"anon": [1]}), r"anon = \[1\]: give text, a number"),
        (("", {}, "gzip"), "choose zstd"),
    ],
)
def test_what_makes_no_sense_is_refused(values: Any, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        Place(*values)


def test_a_place_has_the_checkpoints_of_one_job(tmp_path: Path, quick: Any, write: Any) -> None:
    store = quick(tmp_path)
    check_owner(store, "f" * 32)
    job = write(store, 1, 1).job
    check_owner(store, job)
    with pytest.raises(
        InvalidArgument, match=f"checkpoints of another job \\({job}\\): every job needs a checkpoint_path"
    ):
        check_owner(store, "f" * 32)


def test_a_folder_is_the_same_place_however_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    ways = [
        str(folder),
        f"{folder}/",
        f"{tmp_path}//with space",
        f"{tmp_path}/link",
        f"{tmp_path}/elsewhere/link/",
        f"{tmp_path}/link/../with space",
        f"file://{tmp_path}/with%20space",
        f"file://localhost{tmp_path}/link/",
        f"local://{folder}",
    ]
    assert [way for way in ways if not same_place(way, str(folder))] == []
    assert [way for way in ways if not same_place(str(folder), way)] == []
    for other in (str(tmp_path), f"{folder}/below", f"{folder}2", "memory:///with space"):
        assert not any(same_place(way, other) for way in ways), other


def test_a_url_is_the_same_place_as_its_file_system_says() -> None:
    for one, other, same in (
        ("memory://jobs/first", "memory:///jobs/first/", True),
        ("memory://jobs/first", "memory://jobs/second", False),
        ("memory://jobs/first", "/jobs/first", False),
        ("hdfs://one:8020/jobs", "hdfs://one:8020/jobs/", True),
        ("hdfs://one:8020/jobs", "hdfs://two:8020/jobs", False),
        ("nosuch://bucket/first/", "nosuch://bucket/first", True),
        ("nosuch://bucket/first", "nosuch://bucket/second", False),
        ("nosuch://bucket/first", "memory://bucket/first", False),
    ):
        assert same_place(one, other) is same_place(other, one) is same, (one, other)


def test_objects_whose_names_differ_are_elsewhere() -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    assert same_place("s3://bucket/first/", "s3a://bucket/first")
    assert not same_place("s3://bucket//first", "s3://bucket/first")
    assert not same_place("s3://bucket/first", "s3://other/first")
