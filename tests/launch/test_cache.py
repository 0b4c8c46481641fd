# SPDX-License-Identifier: Apache-2.0
"""Jobs whose workers keep rows: what a job file may say of it, and that a job with bound 0 trains to the bit as one without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.embedding.spec import CacheSpec
from oarlock.launch.cache import HIGHEST
from oarlock.launch.config import load_toml, run_config, to_toml
from oarlock.launch.folder import resume
from oarlock.proto.errors import InvalidArgument, SpecMismatch

# Heard of often: such a job is over soon.
ALONE = {"epochs": 1, "servers": 2, "workers": 1, "open_splits": 1, "prefetch": 1, "heartbeat_seconds": 0.005}


def test_a_job_file_says_which_rows_workers_keep(start: Any) -> None:
    caches = {"item": {"rows": 50, "bound": 3, "policy": "lfu"}}
    spec, folder = start(cache=caches)
    assert {t.name: t.cache for t in spec.tables if t.cache} == {"item": CacheSpec(50, 3, "lfu")}
    again = run_config(load_toml(folder / "job.toml"))
    assert again.cache == caches
    assert to_toml(again, again.recipe_options) == (folder / "job.toml").read_text()


@pytest.mark.parametrize(("more", "highest"), [({}, HIGHEST), ({"highest": 7}, 7)])
def test_a_bound_may_be_left_to_the_workers(start: Any, more: dict[str, int], highest: int) -> None:
    caches = {"item": {"rows": 50, "bound": "auto", **more}}
    spec, folder = start(cache=caches)
    assert {t.name: t.cache for t in spec.tables if t.cache} == {"item": CacheSpec(50, highest, adaptive=True)}
    assert run_config(load_toml(folder / "job.toml")).cache == caches


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cache": {"itme": {"rows": 5}}}, "cache.itme: the recipe has no such table; did you mean 'item'"),
        ({"cache": {"zzz": {"rows": 5}}}, r"cache.zzz: the recipe has no such table. Its tables: item, user"),
        ({"cache": {"item": 5}}, "cache.item = 5: give a table with rows, bound and policy"),
        ({"cache": {"item": {"bound": 5}}}, "cache.item: rows must be given"),
        ({"cache": {"item": {"rows": 0}}}, "cache.rows = 0"),
        ({"cache": {"item": {"rows": 1.5}}}, "cache.item: rows = 1.5: give an integer"),
        ({"cache": {"item": {"rows": 5, "bonud": 1}}}, "cache.item: unknown field 'bonud'; did you mean 'bound'"),
        ({"cache": {"item": {"rows": 5, "policy": "x"}}}, "cache.policy = 'x': choose one of lru, lfu"),
        ({"cache": {"item": {"rows": 5, "bound": "max"}}}, "cache.item: bound = 'max': give an integer, or 'auto'"),
        ({"cache": {"item": {"rows": 5, "bound": "auto", "highest": 0}}}, "highest = 0: give an integer from 1 to 10"),
        ({"cache": {"item": {"rows": 5, "bound": "auto", "highest": True}}}, "highest = True: give an integer"),
        ({"cache": {"item": {"rows": 5, "bound": "auto", "highest": 2**31}}}, "highest = 2147483648: give"),
        ({"cache": {"item": {"rows": 5, "bound": "auto", "highest": "9"}}}, "highest = '9': give an integer"),
        ({"cache": {"item": {"rows": 5, "bound": 3, "highest": 9}}}, "highest = 9 is the upper end of bound = 'auto'"),
        ({"cache": {"item": {"rows": 5, "adaptive": True}}}, "unknown field 'adaptive'; write bound = 'auto'"),
        ({"cache": 5}, "cache = 5: give a table"),
        ({"cache": {"item": {"rows": 5}}, "mode": "ssp"}, "mode = 'ssp' and the cache of table item contradict"),
    ],
)
def test_what_cannot_be_is_refused_when_the_job_is_made(start: Any, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        start(**changes)


def contents(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Return keys, weights and state of each block of the last checkpoint."""
    store = LocalStore(folder / "checkpoints")
    manifest = store.latest()
    assert manifest is not None
    out = {}
    for entry in manifest.blocks:
        image = store.load_block(manifest, entry)
        out[image.name, image.block] = image.keys, image.weights, image.state
    return out


def test_with_bound_0_a_worker_that_is_alone_trains_as_without_a_cache(start: Any, run_job: Any) -> None:
    plain, plain_folder = start("plain", **ALONE)
    caches = {t.name: {"rows": 60, "policy": "lfu"} for t in plain.tables}
    cached, cached_folder = start("cached", cache=caches, **ALONE)
    seen: list[dict[str, Any]] = []
    without = run_job(plain, plain_folder)
    with_caches = run_job(cached, cached_folder, stop_when=lambda status: seen.append(status) or False)
    for a, b in zip(without["history"], with_caches["history"], strict=True):
        assert (a["loss"], a["metrics"]) == (b["loss"], b["metrics"])
    one, other = contents(plain_folder), contents(cached_folder)
    assert one.keys() == other.keys()
    for block, arrays in one.items():
        for a, b in zip(arrays, other[block], strict=True):
            assert np.array_equal(a, b), block
    told = [m["stats"]["caches"] for s in seen for m in s["members"] if "caches" in m["stats"]]
    # Every batch changes every row that it pulls: what is kept is always a little too old.
    assert max(c[table]["outdated"] for c in told for table in caches) > 0
    assert max(c[table]["evictions"] for c in told for table in caches) > 0


def test_a_worker_that_is_alone_chooses_the_same_bounds_every_time(start: Any, run_job: Any) -> None:
    """With probes among its groups, and bounds that change, it trains the same bits."""
    runs, seen = [], []
    for name in ("one", "other"):
        spec, folder = start(
            name,
            cache={"item": {"rows": 150, "bound": "auto"}, "user": {"rows": 60, "bound": "auto", "highest": 2}},
            recipe_options={"batch_samples": 128},
            **ALONE,
        )
        status = run_job(spec, folder, stop_when=lambda status: seen.append(status) or False)
        runs.append((status["history"][0]["loss"], status["history"][0]["metrics"], contents(folder)))
    assert runs[0][:2] == runs[1][:2]
    for block, arrays in runs[0][2].items():
        for a, b in zip(arrays, runs[1][2][block], strict=True):
            assert np.array_equal(a, b), block
    told = [m["stats"]["caches"] for s in seen for m in s["members"] if "caches" in m["stats"]]
    assert max(c[table]["probes"] for c in told for table in c) > 3
    assert len({c["item"]["bound"] for c in told}) > 1
    assert max(c["user"]["bound"] for c in told) <= 2


def test_a_job_that_goes_on_keeps_its_caches(start: Any, run_job: Any) -> None:
    """Its workers are new ones, and begin with empty caches under a new run."""
    spec, folder = start(epochs=1, cache={"item": {"rows": 60, "bound": 2}})
    run_job(spec, folder)
    spec, path = resume(folder, {"epochs": 2})
    status = run_job(spec, folder, path)
    assert (status["phase"], status["run"]) == ("done", 2)
    with pytest.raises(SpecMismatch, match="tables cannot change"):
        resume(folder, {"epochs": 3, "cache": {}})
