# SPDX-License-Identifier: Apache-2.0
"""Pulls that say which rows the sender keeps: what a shard answers, and what it refuses."""

import numpy as np
import pytest
import rig

from oarlock.embedding.spec import CacheSpec, TableSpec
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.bulk import Bulk, inlined
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, StalePlacement
from oarlock.proto.shard_pb2 import PullRequest, TableKeys

RAW = tuple(range(1, 41))
BOUND = 4


@pytest.fixture
def job():
    """A shard whose rows of ``user`` have version 3."""
    user = TableSpec("user", 2, rig.SGD, rig.ZEROS, 8, cache=CacheSpec(100, BOUND))
    made = rig.Job(rig.spec_of(tables=(user, TableSpec("item", 3, rig.SGD, rig.ZEROS, 4))), 1).place()
    for group in range(3):
        made.services[0].push(rig.request_of(made, 0, group, raw=RAW))
    return made


def asked(job, name="user", versions=None, bound=0, raw=RAW):
    keys = rig.group_keys(job.layout, job.routes(), name, raw)
    made = TableKeys(
        table=job.layout.table_index[name],
        keys=pack(keys.keys),
        blocks=pack(keys.blocks),
        counts=pack(keys.counts),
        bound=bound,
    )
    if versions is not None:
        made.versions.CopyFrom(pack(versions))
    return made


def pull(job, *tables, generation=None, bulk=False):
    generation = job.generation if generation is None else generation
    request = PullRequest(header=job.header(0, generation=generation), tables=tables)
    return inlined(job.services[0].pull(Bulk(request, []) if bulk else request))


def kept(version, n=40):
    return np.full(n, version, np.uint32)


@pytest.mark.parametrize("bulk", [False, True])
def test_the_rows_that_are_too_old_come_with_their_versions(job, bulk):
    versions = kept(3)
    versions[[0, 5, 39]] = 2, 0, 9
    reply = pull(job, asked(job), asked(job, versions=versions), asked(job, "item"), bulk=bulk)
    assert [len(a.shape) and a.shape[0] for a in reply.rows] == [40, 3, 40]
    assert [a.shape[0] for a in reply.positions] == [a.shape[0] for a in reply.versions] == [0, 3, 0]
    assert unpack(reply.positions[1], np.int32, "").tolist() == [0, 5, 39]
    assert unpack(reply.versions[1], np.uint32, "").tolist() == [3, 3, 3]
    assert np.array_equal(unpack(reply.rows[1], np.float32, "", dims=2), np.full((3, 2), -3))


@pytest.mark.parametrize("bound", [0, 2, 3, BOUND])
def test_who_keeps_nothing_gets_everything(job, bound):
    assert pull(job, asked(job, versions=kept(0), bound=bound)).rows[0].shape[0] == 40


@pytest.mark.parametrize(("version", "bound", "came"), [(1, 1, 40), (1, 2, 0), (2, 0, 40), (3, 0, 0), (4, BOUND, 40)])
def test_the_bound_is_the_senders(job, version, bound, came):
    assert pull(job, asked(job, versions=kept(version), bound=bound)).rows[0].shape[0] == came


def test_without_versions_nothing_is_said_of_them(job):
    reply = pull(job, asked(job), asked(job, "item"))
    assert (len(reply.positions), len(reply.versions)) == (0, 0)


def test_versions_of_before_all_that_is_here_was_made_are_not_believed(job):
    reply = pull(job, asked(job, versions=kept(3), bound=BOUND), generation=0)
    assert unpack(reply.positions[0], np.int32, "").tolist() == list(range(40))
    assert set(unpack(reply.versions[0], np.uint32, "").tolist()) == {3}


def test_what_is_asked_and_what_is_sent_are_counted(job):
    shard = job.shards[0]
    versions = kept(3)
    versions[:7] = 0
    pull(job, asked(job, versions=versions), asked(job, "item"))
    assert (shard.rows_asked, shard.rows_pulled, shard.counters["rows_pulled"]) == ([40, 40], [7, 40], 47)


REFUSED = {
    "no cache": (lambda j: asked(j, "item", kept(0)), InvalidArgument, "table item keeps no versions of rows"),
    "a bound above the table's": (
        lambda j: asked(j, versions=kept(3), bound=BOUND + 1),
        InvalidArgument,
        "bound = 5 is above cache.bound = 4",
    ),
    "the highest bound": (
        lambda j: asked(j, versions=kept(3), bound=(1 << 32) - 1),
        InvalidArgument,
        "bound = 4294967295",
    ),
    "too few": (lambda j: asked(j, versions=kept(3, 39)), Malformed, "39 versions for 40 keys"),
    "too many": (lambda j: asked(j, versions=kept(3, 41)), Malformed, "41 versions for 40 keys"),
    "none": (lambda j: asked(j, versions=kept(3, 0)), Malformed, "0 versions for 40 keys"),
    "another type": (lambda j: asked(j, versions=kept(3).astype(np.int32)), Malformed, "wanted uint32"),
    "two dimensions": (lambda j: asked(j, versions=kept(3)[:, None]), Malformed, "2 dimensions, wanted 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(job, name):
    make, error, problem = REFUSED[name]
    before = rig.state(job)
    with pytest.raises(error, match=problem):
        pull(job, asked(job), make(job))
    assert rig.state(job) == before
    assert job.shards[0].rows_asked == [0, 0]


def test_a_block_that_is_elsewhere_is_named(job):
    job.shards[0].holdings.owned[3] = False
    with pytest.raises(StalePlacement, match="block 3 is not on this shard"):
        pull(job, asked(job, versions=kept(3)))


def test_versions_count_towards_the_size_of_an_answer(job, monkeypatch):
    monkeypatch.setattr("oarlock.ps.pulling.MAX_MESSAGE_BYTES", 40 * 8 + 100)
    pull(job, asked(job))
    with pytest.raises(OutOfMemory, match=r"the rows asked for are 640 bytes"):
        pull(job, asked(job, versions=kept(3)))
