# SPDX-License-Identifier: Apache-2.0
"""`oarlock checkpoint`: damage is named and ends with 1, and what is shown of a cut is what is in it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from oarlock.cli.main import main

GOLDEN = Path(__file__).parent.parent / "checkpoint" / "golden" / "format-1.2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "job"))


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def json_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert err == ""
    return code, json.loads(out)


def damage(folder: Path, name: str, cut: int = 12) -> None:
    path = folder / f"cut-0000{cut}" / name
    data = bytearray(path.read_bytes())
    data[-520] ^= 1
    path.write_bytes(data)


def test_whole_cuts_are_whole(folder: Path, capsys: Any) -> None:
    assert run(capsys, "verify", folder) == (0, f"{folder}: cut 12 is whole: 9 blocks, 33,576 bytes\n", "")
    assert run(capsys, "verify", f"{folder}@11")[1] == f"{folder}@11: cut 11 is whole: 9 blocks, 20,344 bytes\n"
    code, found = json_of(capsys, "verify", "--all", folder, f"file://{folder}/cut-000011")
    assert (code, found["damaged"]) == (0, 0)
    assert [(each["cut"], each["whole"]) for each in found["cuts"]] == [(12, True), (11, True), (11, True)]


def test_every_damaged_file_is_named_with_its_column_and_the_cut_to_go_back_to(folder: Path, capsys: Any) -> None:
    path = folder / "cut-000012" / "rows-user-00000.arrow"
    data = path.read_bytes()
    at = data.index(b"\x00\x80\xcf\x42")  # 103.75
    path.write_bytes(data[: at + 1] + b"\x81" + data[at + 2 :])
    (folder / "cut-000012" / "gone-seen-00000.arrow").unlink()
    code, out, err = run(capsys, "verify", folder)
    assert (code, err) == (1, "")
    first, second, last = out.splitlines()
    assert first == (
        f"{folder}: damaged: cut-000012/gone-seen-00000.arrow: missing (table seen, block 0); cut 11 is the next older one"
    )
    assert second == (
        f"{folder}: damaged: cut-000012/rows-user-00000.arrow: altered: column weights: its checksum does not fit "
        "(table user, block 0); cut 11 is the next older one"
    )
    assert last == f"{folder}: cut 12 is damaged: go back to cut 11, and verify it first"
    code, found = json_of(capsys, "verify", folder, f"{folder}@11")
    assert (code, found["damaged"]) == (1, 1)
    assert [each["whole"] for each in found["cuts"]] == [False, True]
    damaged = found["cuts"][0]["damage"]
    assert [(each["file"], each["columns"], each["older"]) for each in damaged] == [
        ("cut-000012/gone-seen-00000.arrow", [], 11),
        ("cut-000012/rows-user-00000.arrow", ["weights"], 11),
    ]


def test_a_file_that_both_cuts_need_leaves_nothing_to_go_back_to(folder: Path, capsys: Any) -> None:
    damage(folder, "rows-user-00000.arrow", 11)
    code, out, _ = run(capsys, "verify", "--all", folder)
    assert code == 1
    assert out.count("cut-000011/rows-user-00000.arrow: altered") == 2
    assert out.count("no older cut can be read") == 4


def test_a_damaged_manifest_is_damage(folder: Path, capsys: Any) -> None:
    damage(folder, "manifest.json")
    for path in (folder, f"{folder}@12"):
        code, out, _ = run(capsys, "verify", path)
        assert code == 1
        assert re.search(r"damaged: cut-000012/manifest.json: (truncated or )?altered", out)
        assert "cut 12 is damaged: go back to cut 11, and verify it first" in out
    assert "cut 11 is whole" in run(capsys, "verify", folder)[1]
    code, found = json_of(capsys, "describe", folder)
    assert (code, found["cut"]) == (0, 11)
    assert [(each["cut"], each["whole"]) for each in found["cuts"]] == [(11, True), (12, False)]
    assert re.search(r"12 .* damaged", run(capsys, "describe", folder)[1])


def test_what_is_described(folder: Path, capsys: Any) -> None:
    code, found = json_of(capsys, "describe", folder)
    assert code == 0
    assert found["cuts"][1] == {
        "cut": 12,
        "whole": True,
        "created": "2026-01-31T12:00:00Z",
        "run": 2,
        "step": 1300,
        "written": sum(p.stat().st_size for p in (folder / "cut-000012").glob("*.arrow")),
        "bytes": 33576,
        "increments": 4,
        "longest": 2,
        "metrics": {"auc": 0.75, "loss": 0.1},
    }
    assert found["marks"] == {"7": [6, 8], str(1 << 40): [3, 3]}
    assert (found["open_splits"], found["metrics"]) == ([7, 1 << 40], {"auc": 0.75, "loss": 0.1})
    tables = {each["name"]: each for each in found["tables"]}
    assert (tables["user"]["rows_at_most"], tables["user"]["rows_exact"], tables["user"]["chains"]) == (
        4,
        False,
        [2, 2],
    )
    assert (tables["Item"]["rows_at_most"], tables["Item"]["rows_exact"], tables["Item"]["chains"]) == (2, True, [1, 1])
    assert found["dense"][0]["size"] == 6
    out = run(capsys, "describe", f"{folder}@12")[1]
    for text in (
        "12 *",
        "≤ 4",
        "1 to 2",
        "split 7: group 6 to 8",
        "metrics: auc 0.75, loss 0.1",
        "below 5, and 2 above; open: 2",
    ):
        assert text in out


def test_what_differs(folder: Path, capsys: Any) -> None:
    code, found = json_of(capsys, "diff", f"{folder}@11", f"{folder}/cut-000012")
    assert (code, found["differs"]) == (0, True)
    assert [each["cut"] for each in found["cuts"]] == [11, 12]
    user = found["tables"][0]
    assert user == {
        "kind": "rows",
        "name": "user",
        "added": 0,
        "removed": 1,
        "changed": 1,
        "same": 1,
        "largest": 100.0,
        "largest_key": 8,
    }
    assert "100 (key 8)" in run(capsys, "diff", f"{folder}@11", folder)[1]
    assert not json_of(capsys, "diff", folder, folder)[1]["differs"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["verify", "/nowhere"], 1, "no checkpoint in /nowhere"),
        (["verify", f"{GOLDEN}@7"], 1, "no committed cut 7 in .*; there is: 11, 12"),
        (["describe", "gopher://x/y"], 1, "no file system for it"),
        (["describe", "/nowhere"], 1, "no checkpoint in /nowhere"),
        (["some-job"], 1, "some-job"),
        (["some-job", "--jsno"], 2, "unknown argument --jsno"),
        (["diff", "a"], 2, "the following arguments are required"),
        ([], 2, "the following arguments are required: VERB"),
    ],
)
def test_what_cannot_be_ends_in_one_line(words: list[str], code: int, says: str, capsys: Any) -> None:
    try:
        found: Any = main(["checkpoint", *words])
    except SystemExit as error:
        found = error.code
    said = capsys.readouterr()
    assert found == code
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("oarlock")
    assert re.search(says, line)
