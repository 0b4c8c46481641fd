# SPDX-License-Identifier: Apache-2.0
"""Answers of shards that are not what they should be: an error by name, nothing torn, and all is well after the truth."""

import follow_rig
import numpy as np
import pytest

from oarlock.proto.arrays import pack
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import Malformed, PSError
from oarlock.proto.shard_pb2 import ChangesReply, TableChanges

KEYS = np.arange(100, dtype=np.uint64)
LIES = 400


@pytest.fixture
def followed(tmp_path):
    job = follow_rig.Job()
    following = job.follower(tmp_path)
    job.train(range(80))
    job.catch_up(following)
    yield job, following
    following.close()


def arrays_of(message):
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in value if field.is_repeated else [value]:
            if isinstance(each, Array):
                yield each
            else:
                yield from arrays_of(each)


def lie(reply, rng):
    """Change one thing of an answer."""
    parts, found = list(reply.tables), list(arrays_of(reply))
    kind = rng.integers(0, 7)
    if kind == 0 and parts:
        parts[rng.integers(0, len(parts))].table = int(rng.integers(0, 5))
    elif kind == 1 and parts:
        part = parts[rng.integers(0, len(parts))]
        part.whole = not part.whole
    elif kind == 2 and found:
        array = found[rng.integers(0, len(found))]
        if array.data:
            data = bytearray(array.data)
            data[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
            array.data = bytes(data)
    elif kind == 3 and found:
        found[rng.integers(0, len(found))].dtype = int(rng.integers(0, 7))
    elif kind == 4 and found:
        array = found[rng.integers(0, len(found))]
        array.shape[:] = [int(n) for n in rng.integers(0, 1 << 20, rng.integers(0, 3))]
    elif kind == 5 and found:
        array = found[rng.integers(0, len(found))]
        array.CopyFrom(pack(rng.integers(-5, 1 << 20, rng.integers(0, 20)).astype(np.int32)))
    else:
        field = ("moved", "whole")[rng.integers(0, 2)]
        getattr(reply, field).CopyFrom(pack(rng.integers(-3, 30, 3).astype(np.int32)))


@pytest.mark.parametrize("seed", range(3))
def test_a_lie_is_refused_or_mended(followed, monkeypatch, seed):
    job, following = followed
    rng, honest, refused = np.random.default_rng(seed), job.call, 0
    lying = True

    def call(address, method, request, *, timeout_seconds):
        reply = honest(address, method, request, timeout_seconds=timeout_seconds)
        if lying and isinstance(reply, ChangesReply):
            lie(reply, rng)
        return reply

    monkeypatch.setattr(following, "_call", call)
    for _ in range(LIES):
        job.clock.now += 1.0
        job.train(np.unique(rng.integers(0, 100, 20)), float(rng.normal()))
        for shard in list(following._routes.shards.values()):
            try:
                following.poll(shard)
            except PSError:
                refused += 1
        assert follow_rig.served(following, "user", KEYS)[1] <= len(KEYS)
    assert refused > LIES // 20
    lying = False
    # What a lie made of rows that it did not make malformed is gone once blocks are told anew.
    for table in job.inner.shards.values():
        table.feed._ring_bytes = 1
    job.train(range(100))
    for table in job.inner.shards.values():
        table.feed.take()
    following.live._forget(list(range(len(following.live.sequences))))
    following.look()
    job.catch_up(following, 100)
    found, _ = follow_rig.served(following, "user", KEYS)
    assert found.tobytes() == job.inner.rows("user", KEYS).tobytes()


def test_pages_of_a_block_that_go_nowhere_are_refused(followed):
    """Else one that lies could go on with the same block for ever, and all of it would be kept."""
    job, following = followed
    live, shard = following.live, following._routes.shards[0]
    numbers = np.flatnonzero(job.inner.owners[:12] == 0).astype(np.int32)
    table = live.tables["user"]
    block = next(b for b in range(8) if job.inner.owners[b] == 0 and len(table.keys_of(b)) > 3)
    keys = np.sort(table.keys_of(block))

    def page(some, following_key):
        rows = np.zeros((len(some), table.row_bytes), np.uint8)
        one = pack(np.array([block], np.int32))
        after = pack(np.array([5], np.uint64))
        return ChangesReply(
            more=1,
            tables=[
                TableChanges(whole=True, blocks=one, after=after, keys=pack(some), rows=pack(rows), next=following_key)
            ],
        )

    live._forget([block])
    for some, following_key, match in (
        (keys[:2], int(keys[1]), "ends nowhere"),
        (keys[:0], 7, "ends nowhere"),
        (keys[:2], int(keys[1]) + 1, ""),
        (keys[:2], int(keys[1]) + 1, "keys of the page before"),
        (keys[1:3], int(keys[2]) + 1, "keys of the page before"),
        (keys[:0], int(keys[1]) + 1, "ends nowhere"),
        (keys[2:], 0, ""),
    ):
        if match:
            with pytest.raises(Malformed, match=match):
                live.apply(shard, numbers, page(some, following_key), job.clock.now)
        else:
            live.apply(shard, numbers, page(some, following_key), job.clock.now)
    assert np.concatenate(live._arriving[block].keys).tolist() == keys.tolist()
    assert live._arriving[block].all_here


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (TableChanges(table=7), "table 7"),
        (TableChanges(blocks=pack(np.array([9], np.int32))), "is not one of 8"),
        (TableChanges(blocks=pack(np.array([1], np.int32))), "0 sequences of 1"),
        (TableChanges(whole=True), "0 blocks in one page"),
        (
            TableChanges(
                blocks=pack(np.array([1, 1], np.int32)),
                before=pack(np.zeros(2, np.uint64)),
                after=pack(np.ones(2, np.uint64)),
            ),
            "each once",
        ),
    ],
)
def test_each_part_is_checked(followed, part, match):
    job, following = followed
    before = follow_rig.served(following, "user", KEYS)[0]
    shard = following._routes.shards[0]
    numbers = np.flatnonzero(job.inner.owners[:12] == 0).astype(np.int32)
    with pytest.raises(Malformed, match=match):
        following.live.apply(shard, numbers, ChangesReply(tables=[part]), job.clock.now)
    assert follow_rig.served(following, "user", KEYS)[0].tobytes() == before.tobytes()
