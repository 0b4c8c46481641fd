# SPDX-License-Identifier: Apache-2.0
"""Roots: what a request may name is below one of them, however it is written."""

import os
from pathlib import Path

import pytest

from oarlock.checkpoint.roots import Roots
from oarlock.proto.errors import PermissionDenied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "job" / "checkpoints" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "in").symlink_to(tmp_path / "job" / "checkpoints")
    return tmp_path


def inside(roots: Roots, path: str) -> bool:
    try:
        roots.check(path)
    except PermissionDenied:
        return False
    return True


def test_folders(folder: Path) -> None:
    roots = Roots([f"{folder}/job/checkpoints"])
    for path in ("", "/", "@3", "/cut-000003", "/a/b/../c", "/not/there/yet"):
        assert inside(roots, f"{folder}/job/checkpoints{path}"), path
    assert inside(roots, f"{folder}/in/cut-000001")
    assert inside(roots, f"file://{folder}/job/checkpoints/cut-000001")
    for path in (
        "/",
        "/etc/passwd",
        f"{folder}/job",
        f"{folder}/job/checkpoints2",
        f"{folder}/job/checkpoints/..",
        f"{folder}/job/checkpoints/../../other",
        f"{folder}/job/checkpoints/out/x",
        f"{folder}/other@3",
        f"file://{folder}/job/checkpoints/../../other",
        f"file://{folder}/other",
        f"s3:/{folder}/job/checkpoints",
    ):
        assert not inside(roots, path), path


def test_urls() -> None:
    roots = Roots(["memory://bucket/job", "memory://bucket/more/"])
    for path in (
        "memory://bucket/job",
        "memory://bucket/job@4",
        "memory://bucket/job/cut-000001",
        "memory://bucket/more/x",
    ):
        assert inside(roots, path), path
    for path in (
        "memory://bucket",
        "memory://bucket/jobs",
        "memory://bucket/job/../other",
        "memory://other/job",
        "simplecache::memory://bucket/job",
        "nosuch://bucket/job",
        "/bucket/job",
    ):
        assert not inside(roots, path), path


def test_no_roots_at_all_bound_nothing_and_an_empty_list_lets_nothing_in() -> None:
    assert inside(Roots(), os.sep)
    with pytest.raises(PermissionDenied, match=r"'/tmp/x' is below none of the roots .* --root"):
        Roots([]).check("/tmp/x")
