# SPDX-License-Identifier: Apache-2.0
"""Requests that are nearly right, as hypothesis puts them together: right and wrong keys, blocks, counts and values."""

import coordinator_target
import copies_messages
import numpy as np
import pytest
import rig
import targets
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.common_pb2 import Array
from oarlock.proto.shard_pb2 import Codec, DenseGradients, Packed, PullRequest, PushRequest, TableGradients, TableKeys

EXAMPLES = 400
JOB = rig.Job(targets.small_spec(), shards=1).place()
numbers64 = st.integers(0, (1 << 64) - 1)
anywhere = st.one_of(st.integers(0, 20), numbers64)
few = st.integers(0, 4)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return targets.ShardTarget(0, tmp_path_factory.mktemp("structured") / "shard")


@pytest.fixture(scope="module")
def coordinator():
    made = coordinator_target.CoordinatorTarget(0)
    yield made
    made.close()


def array(dtype, values, **sizes):
    return st.lists(values, **sizes).map(lambda v: pack(np.array(v, dtype)))


int32 = st.one_of(st.integers(-1, 18), st.sampled_from([-(1 << 31), (1 << 31) - 1]))
float32 = st.one_of(st.floats(width=32), st.sampled_from([1.0, float("nan"), float("inf"), 1e15, -3e38]))
odd_array = st.builds(Array, data=st.binary(max_size=12), dtype=st.integers(0, 5), shape=st.lists(few, max_size=3))


codecs = st.builds(Codec, codec=st.integers(0, 5), k=st.sampled_from([0, 0, 1, 2, 4]), zstd=st.booleans())


@st.composite
def packings(draw, values):
    """What may be packed values: of the right number of bytes, or nearly."""
    codec = draw(codecs)
    dim = draw(st.sampled_from([2, 3]))
    row = {0: 4 * dim, 1: 4 * ((dim + 1) // 2), 2: 4 * ((dim + 1) // 2), 3: 8, 4: 4 * codec.k + 4}.get(codec.codec, 4)
    size = max(0, values // dim * row + draw(st.sampled_from([0, 0, 0, -1, 4])))
    payload = pack(np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8))
    values += draw(st.sampled_from([0, 0, 0, 1, -1, 1 << 30]))
    return Packed(codec=codec, payload=draw(st.one_of(st.just(payload), odd_array)), values=max(0, values))


@st.composite
def table_keys(draw):
    """Keys grouped as they should be, of which one thing or nothing is then replaced."""
    number = draw(st.integers(0, 1))
    raw = draw(st.lists(anywhere, min_size=1, max_size=12))
    keyset = rig.group_keys(JOB.layout, JOB.routes(), JOB.layout.tables[number].name, raw)
    right = {"keys": keyset.keys, "blocks": keyset.blocks, "counts": keyset.counts}
    part = TableKeys(table=number, **{name: pack(values) for name, values in right.items()})
    wrong = draw(st.sampled_from(["", "", "table", *right]))
    if wrong == "table":
        part.table = draw(st.one_of(few, st.integers(0, (1 << 32) - 1)))
    elif wrong == "keys":
        part.keys.CopyFrom(draw(st.one_of(array(np.uint64, anywhere, max_size=13), odd_array)))
    elif wrong:
        getattr(part, wrong).CopyFrom(draw(st.one_of(array(np.int32, int32, max_size=5), odd_array)))
    return part, len(keyset.keys), JOB.layout.tables[number].dim


@st.composite
def table_gradients(draw):
    keys, rows, dim = draw(table_keys())
    rows += draw(st.sampled_from([0, 0, 0, 1, -1]))
    values = draw(st.lists(float32, min_size=max(rows, 0) * dim, max_size=max(rows, 0) * dim))
    gradients = pack(np.array(values, np.float32).reshape(max(rows, 0), dim))
    made = TableGradients(
        keys=keys, gradients=gradients, rate=draw(st.sampled_from([0.0, 0.1, 1.0, -1.0, 1e15, float("nan")]))
    )
    if draw(st.booleans()):
        made.packed.CopyFrom(draw(packings(max(rows, 0) * dim)))
        if draw(st.integers(0, 5)):
            made.ClearField("gradients")
    return made


dense_gradients = st.builds(
    DenseGradients,
    blocks=array(np.int32, st.integers(5, 12), max_size=5),
    gradients=array(np.float32, float32, max_size=20),
    rate=st.sampled_from([0.0, 0.1, 1e300]),
    packed=st.one_of(st.none(), st.integers(0, 9).flatmap(packings)),
)
HEADER = JOB.header(0)


@given(
    split=st.one_of(few, st.integers(1000, 1100), numbers64),
    group=st.one_of(few, st.integers(0, (1 << 32) - 1)),
    tables=st.lists(table_gradients(), max_size=3),
    dense=st.lists(dense_gradients, max_size=2),
)
@settings(max_examples=EXAMPLES)
def test_pushes_that_are_nearly_right(shard, split, group, tables, dense):
    request = PushRequest(header=HEADER, split=split, group=group, tables=tables, dense=dense)
    shard.attack("Shard.Push", request.SerializeToString())
    assert rig.state(shard.job)


@st.composite
def kept_keys(draw):
    """Keys with versions of rows that the sender says it keeps, nearly as many as there are keys."""
    keys, rows, _ = draw(table_keys())
    n = max(0, rows + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))
    versions = draw(st.lists(st.one_of(few, st.integers(0, (1 << 32) - 1)), min_size=n, max_size=n))
    keys.versions.CopyFrom(draw(st.one_of(st.just(pack(np.array(versions, np.uint32))), odd_array)))
    keys.bound = draw(st.one_of(few, st.integers(0, (1 << 32) - 1)))
    return keys


@given(tables=st.lists(kept_keys(), max_size=3), generation=st.integers(0, 2))
@settings(max_examples=EXAMPLES // 4)
def test_pulls_with_versions_that_are_nearly_right(shard, tables, generation):
    request = PullRequest(header=JOB.header(0, generation=generation), tables=tables)
    shard.attack("Shard.Pull", request.SerializeToString())


@given(
    tables=st.lists(table_keys(), max_size=3),
    dense=st.one_of(array(np.int32, int32, max_size=5), odd_array),
    asked=st.lists(codecs, max_size=3),
    dense_codec=st.one_of(st.none(), codecs),
)
@settings(max_examples=EXAMPLES)
def test_pulls_that_are_nearly_right(shard, tables, dense, asked, dense_codec):
    request = PullRequest(
        header=HEADER, tables=[keys for keys, _, _ in tables], dense=dense, codecs=asked, dense_codec=dense_codec
    )
    shard.attack("Shard.Pull", request.SerializeToString())


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e100, 1e101, 1e-300, 1.7e308, float("inf"), float("nan")]), st.floats()
)


@given(
    st.lists(
        st.one_of(
            st.builds(
                pb.LeaseRequest, wanted=st.integers(0, 70), number=few, held=st.lists(few), evaluations=st.lists(few)
            ),
            st.builds(pb.CloseSplitRequest, work=few, split=few, samples=anywhere, loss_sum=numbers, groups=anywhere),
            st.builds(pb.CloseSplitRequest, work=st.just(2), split=few, sums=st.lists(numbers, min_size=2, max_size=2)),
            st.builds(pb.CloseSplitRequest, work=st.just(2), split=few, scores=st.binary(max_size=32)),
            st.builds(
                pb.ReleaseRequest, splits=st.lists(few), evaluations=st.lists(few), reason=st.sampled_from(["", "x"])
            ),
            st.builds(pb.HeartbeatRequest, stats=st.sampled_from(["", "{}", '{"a": 1e999}', "[]"])),
        ),
        max_size=12,
    ),
    st.booleans(),
)
@settings(max_examples=EXAMPLES)
def test_a_worker_that_does_what_it_likes(coordinator, requests, first):
    """Sequences: what one message makes possible, the next one uses. At the end the job can still be asked about."""
    coordinator.renew()
    for request in requests:
        request.header.CopyFrom(coordinator.header(coordinator.workers[0 if first else 1]))
        name = type(request).__name__.removesuffix("Request")
        coordinator.attack(f"Coordinator.{name}", request.SerializeToString())


def test_a_shard_is_left_usable(shard):
    """After all of that the same shard takes a good push, and can be pulled from."""
    reply = shard.handler.push(rig.request_of(shard.job, 5, 0))
    elsewhere = unpack(reply.moved, np.int32, "moved").tolist()
    assert elsewhere == [copies_messages.COPIED]
    assert reply.applied + reply.skipped == shard.job.layout.blocks - 1
    dense = pack(np.arange(JOB.layout.dense_base, JOB.layout.blocks, dtype=np.int32))
    values = unpack(shard.handler.pull(PullRequest(header=HEADER, dense=dense)).dense, np.float32, "dense")
    assert np.isfinite(values).all()
