# SPDX-License-Identifier: Apache-2.0
"""A malformed message is refused by name, and marks and changes nothing, wherever in it the fault is."""

import numpy as np
import pytest
import rig

from oarlock.proto.arrays import pack
from oarlock.proto.errors import InvalidArgument, Malformed, StalePlacement, UnknownTable
from oarlock.proto.shard_pb2 import DenseGradients, PullRequest, PushRequest, TableGradients, TableKeys

RAW = tuple(range(40))


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def push(job, request):
    return job.services[0].push(request)


def keys_of(job, name, raw):
    keyset = rig.group_keys(job.layout, job.routes(), name, raw)
    return keyset.keys, keyset.blocks, keyset.counts


def table(job, name="item", *, raw=RAW, number=None, keys=None, blocks=None, counts=None, gradients=None, rate=1.0):
    """Return one table's part, by default a right one."""
    right = keys_of(job, name, raw)
    keys, blocks, counts = (
        r if c is None else np.asarray(c, r.dtype) for r, c in zip(right, (keys, blocks, counts), strict=True)
    )
    dim = job.layout.tables[job.layout.table_index[name]].dim
    gradients = np.ones((len(keys), dim), np.float32) if gradients is None else gradients
    number = job.layout.table_index[name] if number is None else number
    return TableGradients(
        keys=TableKeys(table=number, keys=pack(keys), blocks=pack(blocks), counts=pack(counts)),
        gradients=pack(gradients),
        rate=rate,
    )


def dense(blocks, values, rate=1.0):
    return DenseGradients(
        blocks=pack(np.array(blocks, np.int32)), gradients=pack(np.array(values, np.float32)), rate=rate
    )


def changed(message, **fields):
    """Return a part with some of its arrays replaced."""
    for name, value in fields.items():
        part = message.keys if name in ("keys", "blocks", "counts") else message
        getattr(part, name).CopyFrom(value)
    return message


MALFORMED = {
    "unknown table": (lambda j: table(j, number=2), UnknownTable, "names table 2, this job has 2"),
    "huge table": (lambda j: table(j, number=(1 << 32) - 1), UnknownTable, "this job has 2"),
    "keys of a wrong dtype": (
        lambda j: changed(table(j), keys=pack(np.zeros(40, np.int32))),
        Malformed,
        "keys of item: dtype int32",
    ),
    "keys of two dimensions": (
        lambda j: changed(table(j), keys=pack(np.zeros((20, 2), np.uint64))),
        Malformed,
        "keys of item: 2 dim",
    ),
    "counts of a wrong dtype": (
        lambda j: changed(table(j), counts=pack(np.zeros(4, np.float32))),
        Malformed,
        "counts of item: dtype",
    ),
    "more blocks than counts": (
        lambda j: changed(table(j), counts=pack(np.array([40], np.int32))),
        Malformed,
        "4 blocks but 1 counts",
    ),
    "a block out of range": (lambda j: table(j, blocks=[0, 1, 2, 4]), Malformed, "outside 0 to 3"),
    "a negative block": (lambda j: table(j, blocks=[0, 1, 2, -1]), Malformed, "outside 0 to 3"),
    "an empty block": (lambda j: table(j, counts=[0, 10, 10, 20]), Malformed, "has 0 keys"),
    "a negative count": (lambda j: table(j, counts=[-10, 10, 10, 30]), Malformed, "has -10 keys"),
    "counts that overflow": (lambda j: table(j, counts=[2**31 - 1] * 4), Malformed, "counts add up to 8589934588"),
    "counts that do not add up": (
        lambda j: table(j, counts=[1, 1, 1, 1]),
        Malformed,
        "counts add up to 4, 40 keys came",
    ),
    "a block twice": (lambda j: table(j, blocks=[0, 1, 2, 2]), Malformed, "comes twice"),
    "keys of other blocks": (lambda j: table(j, blocks=[3, 2, 1, 0]), Malformed, "does not hash to the block"),
    "a key twice": (
        lambda j: table(
            j, keys=np.where(np.arange(40) == 1, keys_of(j, "item", RAW)[0][0], keys_of(j, "item", RAW)[0])
        ),
        Malformed,
        "comes twice in a push",
    ),
    "too few gradients": (
        lambda j: changed(table(j), gradients=pack(np.ones((39, 3), np.float32))),
        Malformed,
        "39 gradients for 40 keys",
    ),
    "narrow gradients": (
        lambda j: changed(table(j), gradients=pack(np.ones((40, 2), np.float32))),
        Malformed,
        "2 columns, wanted 3",
    ),
    "no gradients": (
        lambda j: changed(table(j), gradients=pack(np.ones((0, 3), np.float32))),
        Malformed,
        "0 gradients for 40 keys",
    ),
    "a negative rate": (lambda j: table(j, rate=-1), InvalidArgument, "learning rate -1"),
    "an infinite rate": (lambda j: table(j, rate=float("inf")), InvalidArgument, "learning rate inf"),
    "no rate": (lambda j: table(j, rate=float("nan")), InvalidArgument, "learning rate nan"),
    "a rate beyond float32": (lambda j: table(j, rate=1e300), InvalidArgument, "learning rate 1e"),
    "a dense block of a table": (lambda j: dense([11], [1, 1, 1]), Malformed, "outside 12 to 16"),
    "a dense block out of range": (lambda j: dense([17], [1]), Malformed, "outside 12 to 16"),
    "a dense block twice": (lambda j: dense([12, 12], [1] * 8), Malformed, "named twice"),
    "too few dense values": (lambda j: dense([12, 13], [1] * 7), Malformed, "7 dense gradients came for blocks of 8"),
    "an infinite dense rate": (lambda j: dense([12], [1] * 4, rate=float("inf")), InvalidArgument, "learning rate inf"),
    "a table twice": (lambda j: table(j, "user"), Malformed, "block 0 comes twice in one push"),
    "dense blocks in two parts": (lambda j: dense([14], [1]), Malformed, "block 14 comes twice in one push"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_part_marks_and_changes_nothing(job, name):
    """The malformed part is the last one: all of the others are right, and come before it."""
    make, kind, text = MALFORMED[name]
    part = make(job)
    request = PushRequest(header=job.header(0), split=3, group=1)
    request.tables.append(table(job, "user"))
    request.dense.append(dense([14, 15], [1] * 4))
    (request.tables if isinstance(part, TableGradients) else request.dense).append(part)
    push(job, rig.request_of(job, 3, 0))
    before = rig.state(job)
    with pytest.raises(kind, match=text):
        push(job, request)
    assert rig.state(job) == before
    assert job.shards[0].next_groups([3]) == [1]
    # It is the part that was wrong: without it, the push is taken.
    (request.tables if isinstance(part, TableGradients) else request.dense).pop()
    assert push(job, request).applied == 10


def test_a_pull_of_what_is_elsewhere_is_stale():
    job = rig.Job(rig.spec_of(), shards=2).place([0] * 17)
    keys, blocks, counts = keys_of(job, "user", RAW)
    tables = [TableKeys(table=0, keys=pack(keys), blocks=pack(blocks), counts=pack(counts))]
    assert len(job.services[0].pull(PullRequest(header=job.header(0), tables=tables)).rows) == 1
    with pytest.raises(StalePlacement, match="block 0 is not on this shard"):
        job.services[1].pull(PullRequest(header=job.header(1), tables=tables))
    with pytest.raises(StalePlacement, match="block 12 is not on this shard"):
        job.services[1].pull(PullRequest(header=job.header(1), dense=pack(np.array([12], np.int32))))
