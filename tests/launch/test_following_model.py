# SPDX-License-Identifier: Apache-2.0
"""`oarlock serve --follow --recall` beside NCF in real processes: predictions and nearest rows while it trains, loses a shard
and goes back to a cut, and at its end."""

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_job import nobody_is_left
from serving_process import following

from oarlock.checkpoint.store import open_checkpoint
from oarlock.client.job import STOPPED
from oarlock.data.planted import generate_ncf
from oarlock.launch.config import run_config
from oarlock.launch.folder import create
from oarlock.launch.prediction import predictor_of
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.errors import Unavailable
from oarlock.serving import Client
from oarlock.serving.snapshot import open_snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
USERS, ITEMS = 120, 150
PAIRS = np.random.default_rng(0).integers(0, (USERS, ITEMS), (300, 2)).astype(np.uint64)
SECONDS = 120.0


class Asker:
    """Asks one process for predictions over HTTP and for nearest rows, and sees to it that versions go forward."""

    def __init__(self, client: Client, http_address: str) -> None:
        self.client = client
        self._address = http_address
        self.scores: list[Any] = []
        self.ages: list[float] = []
        self.near_ages: list[float] = []
        self.version = (0, 0)
        self.waited = 0
        self.dim = 0

    def ask(self) -> bool:
        """Ask for both; False: a new run is not all here yet."""
        found = self._predict()
        near = self._near()
        if found is None or near is None:
            self.waited += 1
            return False
        values, version, age = found
        assert np.isfinite(values).all()
        assert version >= self.version
        self.version = version
        self.scores.append(values)
        self.ages.append(age)
        assert near.version[:2] >= version
        self.near_ages.append(near.version[2])
        count = int(near.counts[0])
        assert count == min(20, len(np.unique(near.keys[0, :count])))
        assert (np.diff(near.scores[0, :count]) <= 0).all()
        assert not set(near.keys[0, :count].tolist()) - set(range(ITEMS))
        return True

    def _predict(self) -> tuple[Any, tuple[int, int], float] | None:
        inputs = [
            {"name": name, "datatype": "UINT64", "shape": [len(PAIRS)], "data": PAIRS[:, i].tolist()}
            for i, name in enumerate(("user", "item"))
        ]
        connection = http.client.HTTPConnection(self._address, timeout=30)
        try:
            connection.request("POST", "/v2/models/ncf/infer", json.dumps({"inputs": inputs}))
            response = connection.getresponse()
            body = json.loads(response.read())
        finally:
            connection.close()
        if response.status == 503:
            return None
        assert response.status == 200, body
        told = body["parameters"]
        assert body["model_version"] == f"{told['run']}.{told['cut']}"
        values = np.array(body["outputs"][0]["data"], np.float32)
        return values, (told["run"], told["cut"]), float(told["seconds_since"])

    def _near(self) -> Any:
        vector = np.ones(self.dim, np.float32)
        try:
            return self.client.nearest("item", vector, 20, timeout_seconds=1.0)
        except Unavailable:
            return None


def test_predictions_and_nearest_rows_of_a_job_that_trains(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = tmp_path / "data", tmp_path / "job"
    generate_ncf(data, users=USERS, items=ITEMS, positives_per_user=20, seed=seed)
    values = {"recipe": "ncf", "data": str(data), "recipe_options": {"factors": 8, "layers": [32, 16, 8]}}
    run = {"epochs": 100_000, "seed": seed, "workers": 1, "servers": 2, "lease_seconds": 100.0}
    spec = create(folder, "job", run_config({**values, **run}))
    launched = LocalProcesses(spec, folder, restarts=100)
    status: dict[str, Any] = {}
    asker: Asker | None = None

    def until(condition: Any) -> Iterator[None]:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            yield

    def fresh() -> bool:
        assert asker is not None
        return asker.ask() and max(asker.ages[-1], asker.near_ages[-1]) < 2.0

    def scene() -> Iterator[None]:
        nonlocal asker
        yield from until(lambda: status.get("checkpoints"))
        options = ("--recall", "item:exact", "--http", "127.0.0.1:0")
        with following(folder, tmp_path / "log", *options) as (client, facts):
            assert facts["prediction"] == "ncf"
            asker = Asker(client, str(facts["http"]))
            asker.dim = next(table.dim for table in spec.tables if table.name == "item")
            yield from until(fresh)
            begun, first = asker.version, len(asker.scores)
            for _ in range(40):
                assert asker.ask()
                yield
            assert len({each.tobytes() for each in asker.scores}) > 5, "it trains on"
            calm = asker.ages[first:], asker.near_ages[first:]
            print("age of predictions:", np.quantile(calm[0], [0.5, 1.0]))
            print("age of nearest rows:", np.quantile(calm[1], [0.5, 1.0]))
            # A shard without a copy dies: all goes back to a cut.
            dead = next(m for m in status["members"] if m["role"] == "shard")
            next(c for c in launched.children if c.process.pid == dead["pid"]).process.kill()
            killed = time.monotonic()
            yield from until(lambda: asker.ask() and asker.version[0] > begun[0])
            print("of the new run after", time.monotonic() - killed, "s; not ready yet:", asker.waited)
            yield from until(fresh)
            for _ in range(10):
                asker.ask()
                yield
            stop.append(True)
            yield from until(lambda: over)
            # The end of the training is in the last cut.
            manifest = open_checkpoint(str(folder / "checkpoints"))[1]
            yield from until(lambda: asker.ask() and asker.version == (manifest.run, manifest.cut))
            yield from until(lambda: asker.ask() and np.abs(asker.scores[-1] - of_the_cut(folder)).max() <= 1e-6)
            print("largest difference from the last cut:", np.abs(asker.scores[-1] - of_the_cut(folder)).max())

    stop: list[bool] = []
    over: list[bool] = []
    played = scene()

    def watch(told: dict[str, Any]) -> bool:
        if told:
            status.update(told)
        if not stop:
            assert next(played, "over") != "over"
        return not stop

    with nobody_is_left(monkeypatch):
        try:
            final = asyncio.run(launched.run(watch, 0.05))
            assert final["phase"] == STOPPED, final["reason"]
            over.append(True)
            for _ in played:
                time.sleep(0.05)
        finally:
            played.close()
    assert asker is not None
    assert len(asker.scores) > 50


def of_the_cut(folder: Path) -> Any:
    """Return what the newest checkpoint predicts."""
    store, manifest = open_checkpoint(str(folder / "checkpoints"))
    predictor = predictor_of(manifest, job=folder)
    state = open_snapshot(store, manifest)
    return predictor.predict(state, {"user": PAIRS[:, 0], "item": PAIRS[:, 1]}, len(PAIRS)).scores
