# SPDX-License-Identifier: Apache-2.0
"""What a worker has trained, and the job's step as it knows it.

Invariant: no group counts twice towards the step, and it never goes back. One event loop.
"""

from collections import Counter
from dataclasses import dataclass, field

from oarlock.client.membership import Membership
from oarlock.telemetry.histogram import Histogram
from oarlock.telemetry.stages import Stages


@dataclass
class Progress:
    """Counts of one worker. ``refused``: gradients that shards did not take; ``residuals_lost``: keys of closed splits whose
    rest error feedback could not keep."""

    member: Membership
    stages: Stages = field(default_factory=Stages)
    pull_seconds: Histogram = field(default_factory=Histogram)
    push_seconds: Histogram = field(default_factory=Histogram)
    batches: int = 0
    samples: int = 0
    refused: int = 0
    residuals_lost: int = 0
    # Groups taken up to be computed: of splits that the coordinator does not count yet, and of all since this worker came.
    _ahead: Counter[int] = field(default_factory=Counter)
    _own: int = 0
    _joined_at: int = field(init=False)

    def __post_init__(self) -> None:
        self._joined_at = self.member.step

    def begins(self, split: int) -> None:
        """Note that a group of ``split`` is computed from now on."""
        self._ahead[split] += 1
        self._own += 1

    def closes(self, split: int) -> None:
        """Note that from now on the coordinator may count the split's groups."""
        del self._ahead[split]

    def step(self) -> int:
        """Return the groups that all workers have trained, as far as known here.

        The coordinator tells it with a heartbeat, now and then. What this worker did itself it knows at once: a worker that is
        alone always knows the step, so that its results do not depend on when heartbeats come, nor acknowledgements.
        """
        return max(self.member.step + self._ahead.total(), self._joined_at + self._own)
