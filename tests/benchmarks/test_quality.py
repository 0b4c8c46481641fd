# SPDX-License-Identifier: Apache-2.0
"""Cases of the quality benchmark are read as they are spelt; generated clicks can be learnt; a small comparison ends."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oarlock.benchmarks import quality
from oarlock.benchmarks.quality_cases import BASE, CASES, Outcome, Trained, bytes_per_sample, read_case
from oarlock.benchmarks.quality_data import FIELDS, generate_clicks
from oarlock.benchmarks.quality_kept import Kept
from oarlock.client.compression import WireSpec
from oarlock.proto.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "settings", "wire"),
    [
        ("async", {"mode": "async"}, None),
        ("ssp:2", {"mode": "ssp", "staleness": 2}, None),
        ("geo:4/float16", {"mode": "geo", "accumulate": 4}, WireSpec(push="float16")),
        ("async/topk:0.1/int8/zstd", {"mode": "async"}, WireSpec("int8", "topk:0.1", zstd=True)),
        ("async:4", {"mode": "async", "accumulate": 4}, None),
        ("async@cache:3", {"mode": "async", "cache": {"fields": {"rows": 100_000, "bound": 3}}}, None),
        (
            "geo:2@recipe_options.optimizer=sgd",
            {"mode": "geo", "accumulate": 2, "recipe_options": {"optimizer": "sgd"}},
            None,
        ),
        ("in-process@epochs=2", {"servers": 1, "workers": 1, "epochs": 2}, None),
    ],
)
def test_a_case_is_what_is_spelt(text: str, settings: dict[str, Any], wire: WireSpec | None) -> None:
    found = read_case(text).settings(["fields"])
    form = wire and {"pull": wire.pull, "push": wire.push, "zstd": wire.zstd}
    assert found == {**settings, **({"compression": {"fields": form, "dense": form}} if wire else {})}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "asyn",
        "async/int7",
        "async/int8/int8/int8",
        "async/int8/int8/zstd/zstd",
        "ssp:x",
        "async@cache:x",
        "async@epochs",
    ],
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


def test_a_case_adds_to_what_all_jobs_have_and_leaves_it_alone() -> None:
    common = {"epochs": 3, "recipe_options": {"dim": 4}}
    found = read_case("geo:2@recipe_options.optimizer=sgd").settings([], common)
    assert found["recipe_options"] == {"dim": 4, "optimizer": "sgd"}
    assert found["epochs"] == 3
    assert common == {"epochs": 3, "recipe_options": {"dim": 4}}


def test_a_case_has_the_base_that_is_changed_alike() -> None:
    assert read_case("async/int8").own_base == BASE
    assert read_case("async@cache:3").own_base == BASE
    assert read_case("geo:4@cache:1@recipe_options.optimizer=sgd").own_base == "in-process@recipe_options.optimizer=sgd"


def test_figures_of_a_case() -> None:
    base, own = Outcome([Trained(0.5, 10.0), Trained(0.7, 20.0)]), Outcome([Trained(0.9, 1.0)])
    case = Outcome([Trained(0.8, 5.0, 100.0), Trained(0.6, 6.0), Trained(0.7, 7.0, 50.0)])
    told = case.told(base, own)
    assert (told["gap"], told["gap_own"]) == (pytest.approx(0.1), pytest.approx(-0.2))
    assert told["gap_error"] == pytest.approx(0.2)  # of the differences 0.3 and -0.1
    assert (told["mean"], told["spread"], told["bytes_per_sample"]) == (0.7, [0.6, 0.8], 75.0)
    assert told["deviation"] == pytest.approx(0.1)
    assert not {"gap", "gap_error", "gap_own", "bytes_per_sample"} & set(base.told(None))


def test_jobs_are_kept_and_an_interrupted_line_is_not(tmp_path: Path) -> None:
    folder, done = tmp_path / "kept", Trained(0.7, 5.0, None)
    kept = Kept(folder, {"epochs": 2})
    kept.open()
    kept.put("async", 0, done)
    with (folder / "jobs.jsonl").open("a") as file:
        file.write('{"case": "async", "se')
    again = Kept(folder, {"epochs": 2})
    again.open()
    assert (again.get("async", 0), again.get("async", 1)) == (done, None)
    again.put("async", 1, done)
    third = Kept(folder, {"epochs": 2})
    third.open()
    assert third.get("async", 1) == done


@pytest.mark.parametrize("text", ['{"epochs": 3}\n', '{"epochs": 2}\n{"case": "async"}\n', "x\n", "1\n", ""])
def test_what_was_kept_of_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs.jsonl").write_text(text)
    with pytest.raises(InvalidArgument, match="name another folder"):
        Kept(tmp_path, {"epochs": 2}).open()


def test_jobs_that_are_kept_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, int]] = []

    def train(self: quality.Bench, case: quality.Case, seed: int) -> Trained:
        run.append((case.text, seed))
        return Trained(0.5 + seed / 10, 1.0)

    monkeypatch.setattr(quality.Bench, "train", train)
    generate_clicks(tmp_path / "clicks", 1000)
    settings = {"recipe": "dlrm", "data": str(tmp_path / "clicks"), "epochs": 1}
    cases = [read_case("async"), read_case("async:2")]

    def measure(most: int | None) -> dict[str, Any]:
        kept = Kept(tmp_path / "kept", settings)
        kept.open()
        return quality.Bench(settings, tmp_path, kept, print).measure(cases, 2, most)

    assert measure(2)["left"] == 4
    assert run == [(BASE, 0), ("async", 0)]
    found = measure(None)
    assert run[2:] == [("async:2", 0), (BASE, 1), ("async", 1), ("async:2", 1)]
    assert (found["left"], found["cases"]["async"]["mean"]) == (0, 0.55)
    measure(None)
    assert len(run) == 6


def test_a_case_that_cannot_be_run_is_refused_before_any_is(tmp_path: Path) -> None:
    generate_clicks(tmp_path / "clicks", 1000)
    settings = {"recipe": "dlrm", "data": str(tmp_path / "clicks"), "epochs": 1}
    bench = quality.Bench(settings, tmp_path, Kept(None, {}), print)
    with pytest.raises(InvalidArgument, match="geo"):
        bench.measure([read_case("async"), read_case("geo:4")], 1, None)
    assert not (tmp_path / "job").exists()


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
    _, case = result["cases"].values()
    assert {"mean", "gap", "samples_per_s"} < set(case)
    assert list(tmp_path.iterdir()) == []
