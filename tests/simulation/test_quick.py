# SPDX-License-Identifier: Apache-2.0
"""What makes a schedule cheap leaves nothing of it out, and nothing behind."""

import gc
from contextlib import nullcontext

import pytest

from oarlock.checkpoint import writing
from oarlock.checkpoint.manifest import Manifest
from oarlock.proto.errors import CorruptCheckpoint
from oarlock.simulation import restored
from oarlock.simulation.campaign import drawn, files
from oarlock.simulation.elastic import ELASTIC
from oarlock.simulation.quick import quick
from oarlock.simulation.world import World

# Cuts, copies, a job that is resumed, and compaction.
SEED = 10_001


def test_every_event_is_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[list[str]] = []
    outcomes = []
    for way in (quick, nullcontext):
        monkeypatch.setattr(restored, "quick", way)
        logs.append([])
        outcomes.append(restored.run(drawn(SEED, (ELASTIC,)), files(), logs[-1]))
    assert outcomes[0].counts["cut committed"], "there is nothing to remember"
    assert logs[0] == logs[1]
    assert outcomes[0] == outcomes[1]


def test_nothing_of_a_schedule_stays_in_memory() -> None:
    gc.collect()
    before = {id(each) for each in gc.get_objects() if isinstance(each, World)}
    restored.run(drawn(SEED, (ELASTIC,)), files())
    # Not looked for again: the next schedule's would not find it either.
    assert not [each for each in gc.get_objects() if isinstance(each, World) and id(each) not in before]


def test_all_is_as_it_was_afterwards() -> None:
    before = writing.in_threads, Manifest.decode.__func__, gc.isenabled()  # type: ignore[attr-defined]
    with quick():
        assert not gc.isenabled()
        # What is refused is refused again, by its own name.
        for file in ("one", "one", "another"):
            with pytest.raises(CorruptCheckpoint, match=f"^{file}:"):
                Manifest.decode(b"{}", file=file)
    assert (writing.in_threads, Manifest.decode.__func__, gc.isenabled()) == before  # type: ignore[attr-defined]
    assert gc.get_freeze_count() == 0
