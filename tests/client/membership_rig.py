# SPDX-License-Identifier: Apache-2.0
"""A coordinator of a few lines, for the tests of who joins it. A conftest loads it as ``membership_rig``."""

import asyncio
import random

import rig

from oarlock.client.membership import Membership
from oarlock.client.retry import Retry
from oarlock.client.router import pack_placement
from oarlock.proto.common_pb2 import Empty
from oarlock.proto.coordinator_pb2 import WORKER, HeartbeatReply, JoinReply


class Coordinator:
    """``failing`` holds errors that are raised first, one a call."""

    def __init__(self):
        self.job = rig.Job(rig.spec_of())
        self.failing = []
        self.joins, self.beats, self.asked, self.left = [], [], 0, []
        self.phase, self.generation = "training", 0
        self.minimum = 0

    def _maybe_fail(self):
        if self.failing:
            raise self.failing.pop(0)

    def join(self, request):
        self.joins.append(request)
        self._maybe_fail()
        return JoinReply(
            job=self.job.spec.job_bytes,
            run=3,
            id=2,
            incarnation=77,
            spec=self.job.spec.to_json(),
            lease_seconds=5,
            heartbeat_seconds=0.5,
        )

    def heartbeat(self, request):
        self.beats.append((asyncio.get_running_loop().time(), request))
        self._maybe_fail()
        return HeartbeatReply(phase=self.phase, generation=self.generation, step=12, minimum=self.minimum)

    def placement(self, request):
        self.asked += 1
        self._maybe_fail()
        return pack_placement(self.generation, self.job.owners, self.job.addresses)

    def leave(self, request):
        self.left.append(request)
        self._maybe_fail()
        return Empty()


def member_of(coordinator):
    """Return one who is about to join."""
    coordinator.job.transport.serve(coordinator, "coordinator")
    return Membership(
        coordinator.job.transport,
        "coordinator",
        WORKER,
        rng=random.Random(1),
        address="a",
        reader="arrow",
        retry=Retry(deadline_seconds=20),
    )
