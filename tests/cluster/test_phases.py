# SPDX-License-Identifier: Apache-2.0
"""Phases in a trace: an epoch's end is seen whole, whenever somebody looks."""

import threading
from types import SimpleNamespace
from typing import Any, cast

from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.phases import Phases
from oarlock.telemetry.trace import Track


class Busy:
    """A coordinator whose epoch another thread is ending: what is read without its lock is half of the change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._phase, self._epoch = "training", 0
        self.half = False

    def _read(self, whole: Any, half: Any) -> Any:
        taken = self.lock._is_owned()  # type: ignore[attr-defined]
        return half if self.half and not taken else whole

    @property
    def phase(self) -> str:
        return cast(str, self._read(self._phase, "training"))

    @property
    def work(self) -> SimpleNamespace:
        return SimpleNamespace(epoch=self._read(self._epoch, 1))

    def end_epoch(self) -> None:
        self._phase, self._epoch = "writing", 1


class Heard:
    """A track that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def complete(self, kind: str, begin: int, end: int, args: dict[str, int], *, name: str) -> None:
        assert kind == "phase"
        assert begin <= end
        self.events.append((name, args["epoch"]))


def test_the_end_of_an_epoch_is_one_change() -> None:
    coordinator, track = Busy(), Heard()
    phases = Phases(cast(Coordinator, coordinator), cast(Track, track))
    # Between the two halves of the change, and after it.
    coordinator.half = True
    phases.look()
    assert not track.events
    coordinator.half = False
    coordinator.end_epoch()
    phases.look()
    phases.look()
    assert track.events == [("training", 0)]
    phases.end()
    assert track.events == [("training", 0), ("writing", 1)]
