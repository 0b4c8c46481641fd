# SPDX-License-Identifier: Apache-2.0
"""The digest of a job that trains is that of the cut of the same moment."""

import json
from pathlib import Path
from typing import Any

import pytest

from oarlock.checkpoint.store import LocalStore
from oarlock.cli.digest import digest_of
from oarlock.client.job import TRAINING, WRITING
from oarlock.cluster import cutting
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.cuts import Cuts
from oarlock.proto.errors import InvalidArgument, Unavailable


@pytest.mark.parametrize(("mode", "ranks"), [("async", 0), ("sync", 2), ("hybrid", 2)])
def test_it_is_that_of_a_cut_at_the_same_moment(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch, mode: str, ranks: int
) -> None:
    """After an epoch nobody trains until its cut has begun: one that is asked for then is of the same rows."""
    spec, folder = start(epochs=3, servers=3, workers=2, checkpoints_kept=9, mode=mode, ranks=ranks)
    found: list[dict[str, Any]] = []
    original, digest = Cuts.due, cutting.digest_now
    epochs: set[int] = set()

    def due(self: Cuts) -> bool:
        c = self._c
        if not original(self) or c.phase != WRITING or c.work.epoch in epochs:
            return original(self)
        epochs.add(c.work.epoch)
        c.live_digest.wanted = True
        return False

    async def digest_now(c: Coordinator, *arguments: Any) -> None:
        await digest(c, *arguments)
        found.append(c.live_digest.found)

    monkeypatch.setattr(Cuts, "due", due)
    monkeypatch.setattr(cutting, "digest_now", digest_now)
    status = run_job(spec, folder)
    assert (status["phase"], len(found)) == ("done", 3)
    store = LocalStore(folder / "checkpoints")
    assert len(store.cuts()) == 3
    for each, cut in zip(found, store.cuts(), strict=True):
        manifest = store.load_manifest(cut)
        assert each["number"] == cut - 1, "its number is used up"
        assert (each["step"], each["epoch"]) == (manifest.step, manifest.epoch)
        assert each["digest"] == str(digest_of(store, manifest))
        blocks = [store.load_block(manifest, e) for e in manifest.blocks if e.kind == "rows"]
        assert each["rows"] == sum(len(block.keys) for block in blocks)
    assert len({each["digest"] for each in found}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), [("async", 0), ("ssp", 0), ("sync", 2), ("hybrid", 2)])
def test_in_the_midst_of_training_it_changes_nothing(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch, mode: str, ranks: int
) -> None:
    spec, folder = start(epochs=500, servers=2, workers=2, mode=mode, ranks=ranks)
    made: list[Coordinator] = []
    original = Coordinator.open

    def opened(self: Coordinator) -> None:
        made.append(self)
        original(self)

    monkeypatch.setattr(Coordinator, "open", opened)
    found: dict[int, dict[str, Any]] = {}

    def ask(status: dict[str, Any]) -> bool:
        if status["digest"]:
            found[status["digest"]["number"]] = status["digest"]
        if status["phase"] == TRAINING:
            made[0].live_digest.wanted = True
        return sum("digest" in each for each in found.values()) >= 3 and len(status["checkpoints"]) >= 2

    status = run_job(spec, folder, stop_when=ask)
    assert (status["phase"], status["reason"]) == ("stopped", "interrupted")
    assert all(result["samples"] == status["history"][0]["samples"] for result in status["history"])
    assert not set(LocalStore(folder / "checkpoints").cuts()) & set(found)
    store = LocalStore(folder / "checkpoints")
    store.verify(store.load_manifest())


def test_of_a_job_that_is_over_there_is_a_checkpoint(start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from oarlock.cluster.service import CoordinatorService
    from oarlock.proto.coordinator_pb2 import LiveDigestRequest

    spec, folder = start(epochs=1, servers=1, workers=1)
    services: list[CoordinatorService] = []
    original = CoordinatorService.__init__

    def init(self: CoordinatorService, coordinator: Coordinator) -> None:
        original(self, coordinator)
        services.append(self)

    monkeypatch.setattr(CoordinatorService, "__init__", init)
    assert run_job(spec, folder)["phase"] == "done"
    with pytest.raises(InvalidArgument, match="job job is done: its last checkpoint has all that it holds"):
        services[0].live_digest(LiveDigestRequest())


def test_the_command_says_where_to_look_instead(start: Any, run_job: Any, tmp_path: Path) -> None:
    from oarlock.cli.digest import digest
    from oarlock.cli.options import build_parser

    spec, folder = start(epochs=1, servers=1, workers=1)
    assert json.loads(spec.to_json())["name"] == "job"
    with pytest.raises(Unavailable, match="without --live its newest checkpoint is read"):
        digest(build_parser().parse_args(["digest", str(folder), "--live"]))
