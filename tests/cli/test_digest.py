# SPDX-License-Identifier: Apache-2.0
"""`oarlock digest`: of a job by name, of its checkpoint by path; what it depends on, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import open_checkpoint
from oarlock.cli.digest import digest_of

Oarlock = Callable[..., Any]


def train(oarlock: Oarlock, data: Path, name: str, *more: str) -> str:
    options = ("--in-process", "--epochs", "1", "--workers", "1", "--set", "open_splits=1", "--name", name)
    assert oarlock("train", "ncf", "--data", str(data), *options, *more).code == 0
    ended = oarlock("digest", name)
    assert ended.code == 0
    return str(ended.out.strip())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_equal_models_have_one_digest_on_any_number_of_shards(oarlock: Oarlock, data: Path) -> None:
    one = train(oarlock, data, "one", "--servers", "1")
    assert len(one) == 32
    assert train(oarlock, data, "three", "--servers", "3") == one
    assert train(oarlock, data, "other", "--seed", "1", "--servers", "1") != one
    cut = next(Path("runs/three/checkpoints").glob("cut-*"))
    for target in (cut, cut.parent, Path("runs/three"), "three@1", f"{cut.parent}@1"):
        assert oarlock("digest", str(target)).out.strip() == one
    told = json.loads(oarlock("digest", "three", "--json").out)
    assert told == {"digest": one, "cut": 1, "run": 1, "epoch": 1, "rows": told["rows"]}
    _, manifest = open_checkpoint(cut)
    assert told["rows"] == sum(entry.rows for entry in manifest.blocks if entry.kind == "rows") > 100
    store, manifest = open_checkpoint(Path("runs/one/checkpoints"))
    assert str(digest_of(store, manifest)) == one


def test_what_is_no_checkpoint_is_said_in_one_line(oarlock: Oarlock, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target, words in (
        ("nothing", "no checkpoint in"),
        ("host:1", "no checkpoint in"),
        ("empty", "no checkpoint"),
    ):
        ended = oarlock("digest", str(tmp_path / "empty") if target == "empty" else target)
        assert ended.code == 1
        assert words in ended.line
