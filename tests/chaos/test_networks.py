# SPDX-License-Identifier: Apache-2.0
"""A job over hosts whose links are cut, one way or both, slow, or lossy: it counts exactly, and all are back soon after.

Each process runs on a host of its own, a network namespace. That no block ever had two owners that both acknowledged shows in the
counting table: what only one of them has is missing in the end. What was measured is printed.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from network_hosts import Hosts, lacking
from network_job import (
    COORDINATOR,
    LEASE_SECONDS,
    SHARDS,
    WORKERS,
    NetworkJob,
    all_members,
    all_there,
    all_train,
    batches,
)
from network_switch import CUT, LOST, SEEN, Rule

FREE = Rule()
BACK_SECONDS = 15.0
LONG = 2.5 * LEASE_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def privilege() -> None:
    if missing := lacking():
        pytest.skip(f"network namespaces cannot be made here: {missing}")


@dataclass
class Scene:
    """A running job, what happened to it, and how long it took to be back."""

    job: NetworkJob
    hosts: Hosts
    told: list[str]

    def cut(self, a: str, b: str, *, both: bool) -> None:
        self.hosts.link(a, b, Rule(cut=True), both=both)

    def heal(self, what: str) -> None:
        """Let all links be as they were, and wait until everybody is back and trains.

        How long a process takes that has to be started again is the machine's business: what counts is how soon it ended, and how
        soon all was well once it had joined.
        """
        job, again = self.job, len(self.job.begun_again)
        before, healed = batches(job.status), time.monotonic()
        self.hosts.all_links(FREE)
        job.until(all_members, f"all are members after {what}")
        joined = time.monotonic()
        job.until(lambda s: all_there(s) and all_train(s, before), f"all is well after {what}")
        well = time.monotonic()
        if len(job.begun_again) == again:
            self.told.append(f"{what}: back {well - healed:.1f} s after it healed")
            assert well - healed < BACK_SECONDS, self.told[-1]
            return
        ended = max(job.begun_at[again:]) - healed
        self.told.append(
            f"{what}: {', '.join(job.begun_again[again:])} ended {ended:.1f} s after it healed, was a member again after "
            f"{joined - healed:.1f} s, and all was well {well - joined:.1f} s later"
        )
        assert max(ended, well - joined) < BACK_SECONDS, self.told[-1]

    def others_train(self, what: str) -> None:
        """Wait until somebody has trained more since."""
        before = batches(self.job.status)
        took = self.job.until(
            lambda s: sum(batches(s).values()) > sum(before.values()) + 10, f"somebody trains: {what}"
        )
        self.told.append(f"{what}: ten batches more after {took:.1f} s")


@pytest.fixture
def scene(privilege: None, tmp_path: Path, seed: int, monkeypatch: Any, capsys: Any) -> Iterator[Scene]:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parents[1] / 'src'}")
    with Hosts([COORDINATOR, *SHARDS, *WORKERS], seed=seed) as hosts:
        told: list[str] = []
        try:
            with NetworkJob(hosts, tmp_path, seed=seed % 1000, rows=100_000, epochs=6) as job:
                job.until(lambda s: s["phase"] == "training" and all_there(s) and all_train(s, {}), "all train")
                yield Scene(job, hosts, told)
                hosts.all_links(FREE)
                count = job.end()
                assert count.exact, count
                assert count.samples_exact
                assert count.evaluation_exact
        finally:
            with capsys.disabled():
                counts = {kind: hosts.packets(kind) for kind in (SEEN, CUT, LOST)}
                print("", *told, f"packets: {counts}", sep="\n  ")


WAYS = ("both", "there", "back")


def ends(a: str, b: str, way: str) -> tuple[str, str]:
    return (b, a) if way == "back" else (a, b)


def test_a_worker_that_cannot_reach_a_shard_waits_and_goes_on(scene: Scene) -> None:
    for way in WAYS:
        scene.cut(*ends(WORKERS[0], SHARDS[0], way), both=way == "both")
        # The first one is long enough for TCP to have all but given up.
        scene.job.rest(13.0 if way == "both" else LONG)
        assert scene.hosts.packets(CUT) > 0
        scene.heal(f"worker and shard cut, {way}")
    assert scene.job.begun_again == [], "nobody's lease ended"
    assert scene.job.status["lost"] == []


def test_a_shard_that_the_coordinator_cannot_reach_is_replaced_by_its_copies(scene: Scene) -> None:
    for number, way in enumerate(WAYS):
        lost = len(scene.job.status["lost"])
        scene.cut(*ends(SHARDS[number], COORDINATOR, way), both=way == "both")
        scene.job.until(lambda s, lost=lost: len(s["lost"]) > lost, "it is struck off")
        # Promoted, and copied anew, while it is away.
        took = scene.job.until(lambda s: not s["incomplete"] and not s["ownerless"], "all blocks have copies again")
        scene.told.append(
            f"shard and coordinator cut, {way}: complete on the two others {took:.1f} s after it was struck off"
        )
        scene.others_train(f"shard and coordinator cut, {way}")
        scene.heal(f"shard and coordinator cut, {way}")
        assert scene.job.begun_again.count(SHARDS[number]) == 1
    assert {r["kind"] for r in scene.job.status["recoveries"]} == {"promotion", "re-replication"}


def test_an_owner_that_cannot_reach_a_copy_does_without_it(scene: Scene) -> None:
    for way in WAYS:
        generation = scene.job.status["generation"]
        scene.cut(*ends(SHARDS[0], SHARDS[1], way), both=way == "both")
        took = scene.job.until(lambda s, g=generation: s["generation"] > g, "the copy leaves the set")
        scene.told.append(f"owner and copy cut, {way}: the set is smaller after {took:.1f} s")
        scene.others_train(f"owner and copy cut, {way}")
        scene.heal(f"owner and copy cut, {way}")
    assert scene.job.begun_again == [], "both have their leases"
    assert scene.job.status["lost"] == []


@pytest.mark.parametrize(
    "rule", [Rule(delay=0.2), Rule(loss=0.05), Rule(delay=0.05, loss=0.02)], ids=["200ms", "5percent", "both"]
)
def test_slow_and_lossy_links_only_make_it_slow(scene: Scene, rule: Rule) -> None:
    scene.hosts.all_links(rule)
    for _ in range(3):
        before = dict(batches(scene.job.status))
        took = scene.job.until(lambda s, before=before: all_train(s, before), "every worker trains")
        scene.told.append(f"{rule}: every worker got a batch further in {took:.1f} s")
        scene.job.rest(3.0)
    assert all_there(scene.job.status)
    scene.heal(str(rule))
    assert scene.job.begun_again == [], "nobody's lease ended"
    assert scene.job.status["lost"] == []


def test_links_drawn_at_random(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4):
        weather = Rule(delay=rng.choice((0.0, 0.02, 0.1)), loss=rng.choice((0.0, 0.02, 0.05)))
        scene.hosts.all_links(weather)
        drawn = []
        for _ in range(rng.choice((1, 1, 2))):
            a, b = rng.sample(scene.hosts.names, 2)
            both = rng.random() < 0.5
            scene.cut(a, b, both=both)
            drawn.append(f"{a} {'<>' if both else '>'} {b}")
        seconds = rng.uniform(1.0, 2 * LONG)
        scene.job.rest(seconds)
        scene.heal(f"{', '.join(drawn)} for {seconds:.1f} s in {weather}")
