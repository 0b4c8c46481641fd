# SPDX-License-Identifier: Apache-2.0
"""Sync jobs of real processes have one digest, whatever hosts them, cuts them, kills them, and resumes them."""

from pathlib import Path

import pytest
from sync_job import config, digest

from oarlock.benchmarks.kills import MARKER, processes_left
from oarlock.benchmarks.lives import STRIKES, Fate, Lived, live
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import create
from oarlock.launch.inprocess import run_in_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    generate_ncf(folder, users=600, items=400, positives_per_user=40, seed=1)
    return folder


def in_peace(folder: Path, run: RunConfig) -> str:
    """Return the digest of a job of one process that nobody touches."""
    status = run_in_process(create(folder, folder.name, run), folder, watch=lambda status: True)
    assert status["phase"] == "done", status["reason"]
    return digest(folder)


def harmed(folder: Path, run: RunConfig, fate: Fate, seed: int) -> tuple[str, Lived]:
    """Return the digest of a job of real processes that met its fate."""
    lived = live(folder, run, fate, seed, shards=(1, 2, 4))
    print(f"seed {seed}: {dict(lived.done)} cuts {lived.cuts} given up {lived.given_up} shards {lived.shards}")
    return digest(folder), lived


def test_digests_are_equal_however_a_job_is_hosted_and_cut(data: Path, tmp_path: Path) -> None:
    wanted = in_peace(tmp_path / "quiet", config(data, servers=1, workers=1))
    found = {}
    for servers, workers, every in (
        (1, 1, ""),
        (2, 1, "0.2s"),
        (4, 1, ""),
        (1, 2, "7 steps"),
        (2, 2, ""),
        (4, 2, "0.2s"),
    ):
        name = f"{servers}-{workers}-{every.replace(' ', '')}"
        run = config(data, servers=servers, workers=workers, checkpoint_every=every)
        found[name], lived = harmed(tmp_path / name, run, Fate(strikes=0, deaths=0), 0)
        assert not lived.done
        assert lived.cuts > lived.spec.epochs if every else lived.cuts <= lived.spec.epochs
    assert found == dict.fromkeys(found, wanted)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_digests_are_equal_whoever_was_killed_whenever(
    data: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKER, f"digests-{seed}")
    changes = {"epochs": 60, "seed": seed}
    wanted = in_peace(tmp_path / "quiet", config(data, servers=1, workers=1, **changes))
    run = config(data, servers=2, workers=2, checkpoint_every="1s", **changes)
    # In the last one some are stopped, too.
    kinds = ("kill worker", "kill worker", "kill coordinator") if seed < 3 else STRIKES
    fate = Fate(strikes=20, deaths=4, at_cuts=False, spread=1.0, kinds=kinds)
    found, lived = harmed(tmp_path / "harmed", run, fate, seed)
    assert found == wanted
    assert sum(lived.done.values()) >= KILLS
    assert len(set(lived.shards)) > 1
    assert processes_left(f"digests-{seed}") == 0
