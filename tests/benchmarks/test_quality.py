# SPDX-License-Identifier: Apache-2.0
"""Cases of the quality benchmark are read as they are spelt; generated clicks can be learnt; a small comparison ends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oarlock.benchmarks.quality_cases import CASES, Outcome, bytes_per_sample, read_case
from oarlock.benchmarks.quality_data import FIELDS, generate_clicks
from oarlock.client.compression import WireSpec
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "settings", "wire"),
    [
        ("async", {"mode": "async"}, None),
        ("ssp:2", {"mode": "ssp", "staleness": 2}, None),
        ("geo:4/float16", {"mode": "geo", "accumulate": 4}, WireSpec(push="float16")),
        ("async/topk:0.1/int8/zstd", {"mode": "async"}, WireSpec("int8", "topk:0.1", zstd=True)),
    ],
)
def test_a_case_is_what_is_spelt(text: str, settings: dict[str, Any], wire: WireSpec | None) -> None:
    found = read_case(text).settings(["fields"])
    form = wire and {"pull": wire.pull, "push": wire.push, "zstd": wire.zstd}
    assert found == {**settings, **({"compression": {"fields": form, "dense": form}} if wire else {})}


@pytest.mark.parametrize(
    "text", ["", "asyn", "async/int7", "async/int8/int8/int8", "async/int8/int8/zstd/zstd", "ssp:x"]
)
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read_case(text)


def test_all_default_cases_are_cases() -> None:
    assert len({read_case(text) for text in CASES}) == len(CASES)


def test_generated_clicks_are_the_same_again_and_can_be_told_apart(tmp_path: Path) -> None:
    best = [generate_clicks(tmp_path / name, 3000, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    texts = [(tmp_path / name / "train.tsv").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert best[0] == best[1]
    assert all(0.65 < auc < 0.95 for auc in best)
    lines = [line.split("\t") for line in texts[0].splitlines()]
    assert len(lines) == 2700
    assert {len(line) for line in lines} == {1 + len(FIELDS)}


def test_figures_of_a_case() -> None:
    base, case = Outcome([0.5, 0.7], [10.0, 20.0]), Outcome([0.8, 0.6], [5.0, 6.0], [100.0, 50.0])
    told = case.told(base)
    assert told["gap"] == pytest.approx(0.1)
    assert (told["mean"], told["spread"], told["bytes_per_sample"]) == (0.7, [0.6, 0.8], 75.0)
    assert "gap" not in base.told(None)


def test_bytes_are_counted_before_the_first_evaluation_alone() -> None:
    members = [{"stats": {"pull_bytes": 100, "push_bytes": 20}}, {"stats": {"samples": 10}}, {"stats": None}]
    assert bytes_per_sample({"epoch": 0, "evaluated": 0, "members": members}) == 12
    assert bytes_per_sample({"epoch": 0, "evaluated": 1, "members": members}) is None
    assert bytes_per_sample({"epoch": 1, "evaluated": 0, "members": members}) is None
    assert bytes_per_sample({"epoch": 0, "evaluated": 0, "members": []}) is None


@pytest.mark.slow
def test_a_comparison_comes_to_its_end(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "oarlock.benchmarks.quality",
            "--tiny",
            "--json",
            "--cases",
            "async/int8+feedback/int8/zstd",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    (case,) = result["cases"].values()
    assert {"mean", "gap", "samples_per_s"} < set(case)
    assert list(tmp_path.iterdir()) == []
