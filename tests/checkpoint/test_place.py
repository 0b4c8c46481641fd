# SPDX-License-Identifier: Apache-2.0
"""Where a job keeps its checkpoints: what a job file may say of it, and that no secret can stand there."""

from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.place import Place, check_owner
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
