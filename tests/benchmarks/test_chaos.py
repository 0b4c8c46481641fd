# SPDX-License-Identifier: Apache-2.0
"""The chaos benchmark: its job learns clicks and counts exactly beside it; the quick size ends, loses nothing, leaves nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from oarlock.benchmarks.chaos import SHARDS, SIZES, WORKERS
from oarlock.benchmarks.chaos_recipe import BALLAST, RECIPE, write_clicks
from oarlock.benchmarks.counting import check
from oarlock.checkpoint.store import LocalStore
from oarlock.launch.chaos_events import USUAL, Plan
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process

BALLAST_ROWS = 8


def test_what_is_run() -> None:
    full, quick = SIZES["full"], SIZES["quick"]
    assert full.events >= 50
    assert full.quiet_seeds == 5
    blocks, rows, dim = full.ballast
    # Each of two shards owns a GiB, in blocks that hold the lock no longer than the largest may.
    assert blocks * rows * dim * 4 >= 2 << 30
    assert rows * dim * 4 <= 8 << 20
    # Owners and copies; and every row of it comes within an epoch.
    assert full.loaded <= 2 * blocks * rows * dim * 4
    assert full.rows // full.batch >= rows
    assert quick.events >= 10
    for size in (full, quick):
        Plan(size.events, size.gap_seconds, 0, USUAL, SHARDS, WORKERS)
        Plan(size.sync_events, size.sync_gap_seconds, 0, size.sync_mix, SHARDS, WORKERS)


def test_the_job_learns_and_counts_beside_it(tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "job"
    write_clicks(data, rows=8192, test_rows=2048, seed=1)
    options = {"batch_samples": 128, "ballast": 4, "ballast_rows": BALLAST_ROWS, "ballast_dim": 16}
    run = RunConfig(
        recipe=RECIPE, data=str(data), epochs=2, servers=2, workers=2, reader="arrow", recipe_options=options
    )
    spec = create(folder, "job", run)
    status = run_in_process(spec, folder, watch=lambda status: True, watch_seconds=0.01)
    count = check(data, folder, spec, status["history"])
    assert count.exact, count
    assert count.samples_exact
    assert not count.evaluation_exact, "the metric is not the count"
    assert status["history"][-1]["metrics"]["auc"] > 0.6
    # Each of the groups, 128 of them, pushed to one row of each block of the ballast, in turns.
    store = LocalStore(folder / "checkpoints")
    manifest = store.load_manifest()
    found = [store.load_block(manifest, entry) for entry in manifest.blocks if entry.name == BALLAST]
    assert [len(image.keys) for image in found] == [BALLAST_ROWS] * 4
    assert all((image.weights == 128 / BALLAST_ROWS).all() for image in found)
    # One occurrence that the files have not is one that was applied twice, and one that they have more was lost.
    file = data / "train" / "part-0.parquet"
    table = pq.read_table(file)
    rows = table.slice(1).num_rows
    pq.write_table(table.slice(1), file, row_group_size=1024)
    fewer = check(data, folder, spec, status["history"])
    assert (fewer.lost, fewer.doubled, fewer.rows, rows) == (0, 4, 8191, 2047)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_loses_nothing(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.chaos", "--quick", "--json", "--seed", "3"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == [], "something was left behind"
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert (result["lost_pushes"], result["double_applied"], result["processes_left"]) == (0, 0, 0)
    assert result["sync_identical"] is True
    assert result["sync"]["events"] >= 1
    assert result["samples_exact"] is True
    assert result["events"] >= 10
    assert result["kinds"]["kill shard"] >= 1
    assert len(result["auc_quiet"]) == result["quiet_seeds"] == 2
    assert 0 < result["recover_s_p50"] <= result["recover_s_max"]
    names = ("auc_gap", "paused_recover_s_max", "worker_recover_s_max", "coordinator_recover_s_max", "unmeasured")
    assert set(names) <= set(result)
