# SPDX-License-Identifier: Apache-2.0
"""Shards compact their chains beside training: cuts stay increments and exact, and nothing that goes wrong harms them."""

import threading

import pytest
from compacting_rig import LINKS, Job, by_block, chains

from oarlock.checkpoint.files import Calls
from oarlock.ps.view import View


class Quick(Calls):
    """Without waiting for the disk."""

    def sync(self, descriptor):
        pass

    def sync_folder(self, path):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("oarlock.checkpoint.files.Calls", Quick)


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path / "checkpoints")
    made.push(range(40))
    yield made
    made.end()


def test_cuts_are_increments_that_follow_on_what_was_compacted(job):
    assert chains(job.make(1)) == [["cut-000001"]] * 2
    for cut in range(2, 5):
        job.compact()
        job.make(cut)
    assert {len(chain) for chain in chains(job.store.latest())} == {4}
    before = {service.compacting.told()["blocks"] for service in job.services.values()}
    job.compact()
    assert before == {0}
    assert chains(job.make(5)) == [["compact-000004", "cut-000005"]] * 2
    told = job.services[0].told()["compaction"]
    assert told["blocks"] == 1
    written = sum(path.stat().st_size for path in job.root.glob("compact-000004/*"))
    assert sum(service.compacting.told()["bytes"] for service in job.services.values()) == written
    for cut in range(6, 15):
        job.compact()
        job.make(cut)
    assert max(map(len, chains(job.store.latest()))) <= LINKS
    # What no chain needs any more is gone: two cuts stay, and the chains that they are made of.
    named = {file.path for cut in job.store.cuts() for e in job.store.load_manifest(cut).blocks for li in e.links
             for file in li.files}  # fmt: skip
    there = {path.relative_to(job.root).as_posix() for path in job.root.rglob("*.arrow")}
    assert named <= there
    assert {path.split("/")[0] for path in there - named} <= {"compact-000013"}


def test_fat_chains_are_compacted_and_increments_as_large_as_their_block_are_none(tmp_path):
    job = Job(tmp_path, links=100)
    try:
        job.push(range(40))
        job.make(1)
        job.make(2, keys=range(30))
        assert {len(chain) for chain in chains(job.store.latest())} == {2}
        job.compact()
        assert not list(tmp_path.glob("compact-*"))
        job.make(3, keys=range(30))
        job.compact()
        assert {chain[0] for chain in chains(job.make(4))} == {"compact-000003"}
        assert chains(job.make(5, keys=range(40))) == [["cut-000005"]] * 2
    finally:
        job.end()


def test_where_compaction_falls_behind_blocks_are_written_whole_at_last(job, monkeypatch):
    monkeypatch.setattr("oarlock.checkpoint.chain.HARD_LINKS", 6)
    for cut in range(1, 7):
        job.make(cut)
    assert {len(chain) for chain in chains(job.store.latest())} == {6}
    assert {len(chain) for chain in chains(job.make(7))} == {1}


def test_a_cut_that_came_to_nothing_is_not_compacted(job):
    for cut in range(1, 4):
        job.make(cut)
    job.push()
    manifest = job.write_cut(4)
    job.compact()
    assert not list(job.root.glob("compact-*"))
    job.committed = 3
    assert {chain[-1] for chain in chains(job.make(5))} == {"cut-000005"}
    job.compact()
    assert {chain[0] for chain in chains(job.make(6))} == {"compact-000005"}
    assert manifest.cut == 4


def test_a_cut_that_is_written_meanwhile_keeps_its_increment(job):
    """The view begins before compaction ends: the cut has the long chain, the one after it the short one."""
    for cut in range(1, 5):
        job.make(cut)
    for service in job.services.values():
        service.compacting.committed(4)
    job.push()
    manifest = job.write_cut(5)
    job.compact()
    job.store.commit(manifest)
    job.store.keep_last(1)
    job.check(manifest)
    job.committed = 5
    assert {len(chain) for chain in chains(manifest)} == {5}
    assert chains(job.make(6)) == [["compact-000004", "cut-000005", "cut-000006"]] * 2


def test_what_was_compacted_is_restored_on_another_number_of_shards(job):
    for cut in range(1, 5):
        job.make(cut)
    job.compact()
    job.make(5)
    for shards in (1, 3):
        other = Job(job.root, shards, restore=f"{job.root}@5", run=2)
        try:
            assert by_block(other) == job.wanted
            # Its first cut follows on none: numbers go on, and so do files of the run before.
            other.group = 100
            assert {len(chain) for chain in chains(other.make(6 + shards))} == {1}
        finally:
            other.end()


def test_it_waits_while_a_cut_is_written_and_ends_at_once(job):
    for cut in range(1, 5):
        job.make(cut)
    compacting = job.services[0].compacting
    compacting.committed(4)
    asked = threading.Event()
    turn = compacting._pass
    compacting._pass = lambda: None
    waits = compacting._changed.wait_for

    def wait_for(condition):
        asked.set()
        return waits(condition)

    compacting._store.files._turn = turn
    compacting._changed.wait_for = wait_for
    for stops in (False, True):
        if stops:
            compacting._queue.append((0, job.store.load_manifest(4).blocks[0]))
        with compacting.writing():
            thread = threading.Thread(target=compacting.step)
            thread.start()
            assert asked.wait(30)
            asked.clear()
            assert compacting.told()["blocks"] == int(stops)
            if stops:
                compacting.stop()
                thread.join(30)
                assert not thread.is_alive()
        thread.join(30)
        assert not thread.is_alive()
    assert compacting.told()["blocks"] == 1
    assert not compacting.trouble
    assert not compacting.due


def test_a_shard_tells_how_far_the_writing_of_a_cut_is(tmp_path, monkeypatch):
    job = Job(tmp_path, 1)
    service, seen = job.services[0], []
    original = View._told

    def note(self, done, total):
        original(self, done, total)
        seen.append(service.told()["writing"])

    monkeypatch.setattr(View, "_told", note)
    try:
        assert service.writing is None
        job.push(range(40))
        job.make(1)
        assert len(seen) == 3
        assert {each["cut"] for each in seen} == {1}
        done = [each["written_bytes"] for each in seen]
        assert done == sorted(done)
        assert seen[-1]["written_bytes"] == seen[-1]["bytes"] > done[0]
        assert "writing" not in service.told()
    finally:
        job.end()
