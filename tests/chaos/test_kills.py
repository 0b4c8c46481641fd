# SPDX-License-Identifier: Apache-2.0
"""Real processes, killed and stopped while a job counts: nothing is lost, nothing done twice, nobody is left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oarlock.benchmarks.counting import LIMIT, check, write_data
from oarlock.benchmarks.kills import MARKER, RECIPE, Rhythm, plan, processes_left, run_job
from oarlock.client.job import JobSpec
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process

LEAST_KILLS = 8


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "geo", "accumulate": 3},
        {"mode": "ssp", "staleness": 2, "accumulate": 2, "compute_threads": 2},
    ],
    ids=["async", "geo", "ssp"],
)
def test_a_job_that_is_killed_all_the_time_counts_exactly(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv(MARKER, "chaos")
    data = tmp_path / "data"
    write_data(data, rows=60_000, keys=5_000, seed=seed)
    run = plan(data, recipe=RECIPE, epochs=8, seed=seed, **changes)
    ended = run_job(tmp_path / "job", run, Rhythm(worker=1.5, coordinator=3.0, stop=5.0), seed)
    count = check(data, ended.folder, ended.spec, ended.status["history"])
    assert count.exact, count
    assert count.samples_exact
    assert count.evaluation_exact
    assert ended.harm.kills >= LEAST_KILLS
    assert min(ended.harm.worker_kills, ended.harm.coordinator_kills, ended.harm.stops) >= 1
    # Some are killed when the job is about to end, and need not be started again.
    assert ended.harm.kills - 3 <= ended.status["restarts"]
    assert processes_left("chaos") == 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_benchmark_comes_to_its_end(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.kills", "--quick", "--json", "--seed", "3"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=190,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == [], "something was left behind"
    result = json.loads(ended.stdout.splitlines()[-1])
    assert [result[name] for name in ("lost", "doubled", "groups_lost", "groups_doubled", "processes_left")] == [0] * 5
    assert all(result[name] is True for name in ("counting_exact", "samples_exact", "evaluation_exact"))
    assert result["ncf"]["samples_exact"] is True
    assert result["kills"] == result["worker_kills"] + result["coordinator_kills"] >= 4
    assert 0 < result["hr_at_10"] <= 1
    assert len(result["hr_at_10_quiet"]) == 3
    assert result["within_spread"] in (True, False)


Finished = tuple[Path, Path, JobSpec, list[dict[str, Any]]]


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """A counting job that ended in peace: its data, its folder, its spec and its history."""
    data, folder = tmp_path / "data", tmp_path / "job"
    write_data(data, rows=3000, keys=200, seed=1)
    spec = create(folder, "job", plan(data, recipe=RECIPE, epochs=2, recipe_options={"rows_per_split": 512}))
    status = run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01)
    return data, folder, spec, status["history"]


def change(file: Path, row: int, column: str, value: int) -> None:
    table = pq.read_table(file).to_pydict()
    table[column][row] = value
    pq.write_table(pa.table({n: np.array(v, np.int64) for n, v in table.items()}), file, row_group_size=1024)


def test_what_is_missing_and_what_is_too_much_is_seen(finished: Finished, tmp_path: Path) -> None:
    data, folder, spec, history = finished
    count = check(data, folder, spec, history)
    assert count.exact
    assert (count.samples_exact, count.evaluation_exact) == (True, True)
    assert (count.rows, count.epochs) == (3000, 2)
    # The same checkpoint against other files: one occurrence of a rare key more, one of another less, in each epoch.
    other = Path(shutil.copytree(data, tmp_path / "other"))
    file = other / "train" / "part-2.parquet"
    was = pq.read_table(file)["a"][7].as_py()
    change(file, 7, "a", 199 if was != 199 else 198)
    count = check(other, folder, spec, history)
    assert (count.lost, count.doubled, count.exact) == (2, 2, False)
    assert count.samples_exact
    # A history that tells less than was trained, and one that evaluated other counts.
    assert not check(data, folder, spec, [{**history[0], "samples": 2999}, history[1]]).samples_exact
    assert not check(data, folder, spec, [history[1], history[0]]).evaluation_exact
    assert not check(data, folder, spec, history[:1]).samples_exact


def test_groups_that_are_missing_are_seen(finished: Finished) -> None:
    data, folder, spec, history = finished
    longer = JobSpec.from_json(spec.to_json().replace('"epochs": 2', '"epochs": 3'))
    assert longer.epochs == 3
    count = check(data, folder, longer, history)
    assert count.groups_lost == 12
    assert count.lost == 6000
    assert not count.exact


def test_keys_that_are_too_frequent_to_be_counted_are_refused(finished: Finished) -> None:
    data, folder, spec, history = finished
    longer = JobSpec.from_json(spec.to_json().replace('"epochs": 2', f'"epochs": {LIMIT}'))
    with pytest.raises(ValueError, match="float32 cannot count that"):
        check(data, folder, longer, history)


def test_processes_that_are_left_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARKER, "one")
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        # Popen comes back while the system still puts the new process together, its environment among the last.
        child.stdin.write(b"here\n")
        assert child.stdout.readline() == b"here\n"
        assert processes_left("one") == 1
        assert processes_left("another") == 0
    finally:
        child.communicate()
    assert processes_left("one") == 0
    assert os.environ[MARKER] == "one"
