# SPDX-License-Identifier: Apache-2.0
"""A table goes back while a whole job trains: all else goes on, the next cuts hold it, and the job's history tells it."""

from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.cluster.coordinator import Coordinator
from oarlock.launch.folder import resume, stored_status


@pytest.fixture
def coordinators(monkeypatch: pytest.MonkeyPatch) -> list[Coordinator]:
    """The coordinators that were made."""
    made: list[Coordinator] = []
    original = Coordinator.open

    def opened(self: Coordinator) -> None:
        made.append(self)
        original(self)

    monkeypatch.setattr(Coordinator, "open", opened)
    return made


class Asking:
    """Asks for a roll back to cut 1 once there are two, and has the job stop once a cut was made after it."""

    def __init__(self, coordinators: list[Coordinator], table: str, folder: Path) -> None:
        self._coordinators, self._table = coordinators, table
        self._path = str(folder / "checkpoints" / "cut-000001")
        self.number = self.generation = 0

    def __call__(self, status: dict[str, Any]) -> bool:
        if not self.number and status["phase"] == "training" and len(status["checkpoints"]) >= 2:
            self.generation = status["generation"]
            self.number = self._coordinators[0].rollbacks.ask(self._table, self._path)
        assert "failed" not in status["rollback"], status["rollback"]
        return any(event["gate"] < status["checkpoints"][-1]["cut"] for event in status["events"])


def rows_of(folder: Path, table: str, cut: int) -> dict[int, bytes]:
    store = LocalStore(folder / "checkpoints")
    manifest = store.load_manifest(cut)
    images = [store.load_block(manifest, e) for e in manifest.blocks if (e.kind, e.name) == ("rows", table)]
    return {
        key: weights.tobytes() + state.tobytes()
        for image in images
        for key, weights, state in zip(image.keys.tolist(), image.weights, image.state, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_a_table_goes_back_in_the_midst_of_training(
    start: Any, run_job: Any, coordinators: list[Coordinator], mode: str
) -> None:
    spec, folder = start(epochs=500, servers=3, workers=2, checkpoints_kept=9999, mode=mode)
    names = [table.name for table in spec.tables]
    asked = Asking(coordinators, names[0], folder)
    status = run_job(spec, folder, stop_when=asked)
    assert (status["phase"], status["reason"]) == ("stopped", "interrupted")
    assert asked.number == 1
    assert all(result["samples"] == status["history"][0]["samples"] for result in status["history"]), "each sample once"
    (event,) = status["events"]
    assert (event["event"], event["table"], event["cut"]) == ("rollback", names[0], 1)
    assert event["rows"] == len(rows_of(folder, names[0], 1))
    store = LocalStore(folder / "checkpoints")
    manifest = store.load_manifest()
    store.verify(manifest)
    assert manifest.metrics["events"] == status["events"]
    assert event["gate"] not in store.cuts(), "its number is used up"
    # The job goes on from a cut after it.
    done = len(status["history"])
    spec, path = resume(folder, {"epochs": done + 1})
    status = run_job(spec, folder, path)
    assert (status["phase"], len(status["history"])) == ("done", done + 1)
    assert [e["event"] for e in stored_status(folder)["events"]] == ["rollback", "restore"]


def test_rows_that_workers_keep_go_back_too(start: Any, run_job: Any, coordinators: list[Coordinator]) -> None:
    """A new generation of the placement empties what they keep."""
    cache = {"user": {"rows": 50, "bound": 3}}
    spec, folder = start(epochs=500, servers=2, workers=2, checkpoints_kept=9999, cache=cache)
    asked = Asking(coordinators, "user", folder)
    status = run_job(spec, folder, stop_when=asked)
    assert status["phase"] == "stopped"
    assert [e["event"] for e in status["events"]] == ["rollback"]
    assert status["generation"] == asked.generation + 1
