# SPDX-License-Identifier: Apache-2.0
"""What a shard's metrics say is what was done to it; and asking for them is no harm to what goes on beside it."""

import threading

import numpy as np
import rig

from oarlock.client.client import Client
from oarlock.embedding.spec import Admission, TableSpec
from oarlock.ps.marks import Marks
from oarlock.ps.telemetry import shard_source
from oarlock.telemetry.exposition import exposition
from oarlock.telemetry.registry import FAILURES, Registry


def said(job):
    """Return what the only shard's source says, having seen that the registry takes all of it."""
    source = shard_source(job.services[0], job.shards[0])
    registry = Registry()
    registry.add(source, shard="0")
    found = {f.metric.name: f.samples for f in registry.collect()}
    assert found[FAILURES] == {(): 0}
    return source()


def push(job, split, group, **changes):
    job.services[0].push(rig.request_of(job, split, group, **changes))


def test_pushes_and_pulls_are_counted_by_table():
    job = rig.Job(rig.spec_of(), shards=1).place()
    before = said(job)
    assert before["oarlock_table_rows"] == before["oarlock_table_pulled_rows_total"] == {"user": 0, "item": 0}
    assert sum(before["oarlock_shard_push_seconds"].counts) == 0
    push(job, 0, 0)
    push(job, 0, 1, tables=("user",), raw=range(10))
    push(job, 1, 0, tables=("item",), raw=range(5))
    push(job, 1, 0, tables=("item",), raw=range(5))
    rig.run(rig.pull_all(Client(job.member()), job, raw=range(60)))
    after = said(job)
    assert after["oarlock_table_rows"] == {"user": 40, "item": 40}
    assert after["oarlock_table_pushed_rows_total"] == {"user": 50, "item": 45}
    assert after["oarlock_table_pulled_rows_total"] == {"user": 60, "item": 60}
    assert after["oarlock_shard_pushes_total"] == 3
    assert after["oarlock_shard_pulls_total"] == 1
    # A repetition changes nothing, but takes its time.
    assert sum(after["oarlock_shard_push_seconds"].counts) == 4
    assert sum(after["oarlock_shard_pull_seconds"].counts) == 1
    assert after["oarlock_shard_push_seconds"].sum > 0
    assert after["oarlock_shard_open_splits"] == 2
    assert after["oarlock_shard_marks_bytes"] == 2 * 4 * job.layout.blocks
    assert (after["oarlock_shard_blocks"], after["oarlock_shard_generation"]) == (job.layout.blocks, 1)
    user, _ = job.shards[0].tables
    assert after["oarlock_table_bytes"]["user"] == user.nbytes > 0
    assert after["oarlock_shard_dense_bytes"] == sum(d.nbytes for d in job.shards[0].dense) > 0


def test_refusals_and_waiting_keys_are_counted_by_table():
    tables = (
        TableSpec("user", 2, rig.SGD, rig.ZEROS, 8),
        TableSpec("item", 3, rig.SGD, rig.ZEROS, 4, admission=Admission("count", occurrences=5)),
    )
    job = rig.Job(rig.spec_of(tables), shards=1).place()
    push(job, 0, 0, tables=("user",), raw=range(7), value=np.nan, dense=np.inf)
    push(job, 0, 1, tables=("item",), raw=range(6), dense=None)
    found = said(job)
    assert found["oarlock_table_refused_gradients_total"] == {"user": 7, "item": 0}
    assert found["oarlock_shard_refused_dense_gradients_total"] == len(job.layout.dense_blocks)
    assert found["oarlock_table_waiting_keys"] == {"user": 0, "item": 6}
    assert found["oarlock_shard_not_admitted_gradients_total"] == 6
    assert found["oarlock_table_rows"]["item"] == 0


def test_staleness_is_told_by_powers_of_two():
    job = rig.Job(rig.spec_of(), shards=1).place()
    for pushes in (0, 0, 1, 2, 3, 4, 7, 8, 1 << 15, 1 << 20):
        job.shards[0].staleness.note(pushes)
    found = said(job)["oarlock_shard_push_staleness"]
    below = {bound: sum(found.counts[: i + 1]) for i, bound in enumerate(found.bounds)}
    assert {bound: below[bound] for bound in (0, 1, 3, 7, 15, (1 << 15) - 1)} == {
        0: 2,
        1: 3,
        3: 5,
        7: 7,
        15: 8,
        32767: 8,
    }
    assert found.counts[-1] == 2
    assert found.sum == 25 + (1 << 15) + (1 << 20)


def test_the_memory_of_marks_may_be_asked_for_while_a_split_is_opened():
    marks = Marks(4)

    class Opening:
        """Marks of a split, beside whose reading a push opens another one."""

        @property
        def nbytes(self):
            marks.open(100 + len(marks._marks))
            return 0

    marks.open(0)
    marks._marks[1] = marks._marks[2] = Opening()
    assert marks.nbytes == 16
    assert marks.splits == 5


def test_pages_are_made_while_others_push():
    job = rig.Job(rig.spec_of(splits=600), shards=1).place()
    registry = Registry()
    registry.add(shard_source(job.services[0], job.shards[0]), shard="0")
    requests = [rig.request_of(job, split, 0, raw=range(split, split + 20)) for split in range(60)]
    over = threading.Event()
    counts = []

    def scrape():
        while not over.is_set():
            exposition(registry.collect())
            counts.append(1)

    scraping = threading.Thread(target=scrape)
    scraping.start()
    try:
        threads = [
            threading.Thread(target=lambda part=requests[i::4]: [job.services[0].push(r) for r in part])
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        over.set()
        scraping.join()
    assert counts
    found = {f.metric.name: f.samples for f in registry.collect()}
    assert found[FAILURES] == {(): 0}
    assert found["oarlock_shard_pushes_total"] == {(("shard", "0"),): 60}
    assert found["oarlock_table_pushed_rows_total"][("shard", "0"), ("table", "user")] == 1200
