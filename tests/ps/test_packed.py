# SPDX-License-Identifier: Apache-2.0
"""Packed gradients and pulls that are not what they say are refused by name, mark and change nothing, and take no room."""

import numpy as np
import pytest
import rig

from oarlock.client.packed import CHUNK, Form, encode_dense, encode_rows, packed, read_form
from oarlock.embedding.compress import Compression
from oarlock.embedding.spec import Guard, TableSpec
from oarlock.proto.arrays import pack
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory
from oarlock.proto.shard_pb2 import Codec, PullRequest

INT8 = Form(Compression("int8"))
TOPK = Form(Compression("topk", 2))
ZSTD = Form(Compression("float16"), zstd=True)


@pytest.fixture
def job():
    return rig.Job(rig.spec_of(), shards=1).place()


def push_of(job, form=INT8, dense=INT8):
    """Return a push of 40 keys of each table, and of all dense blocks, packed."""
    request = rig.request_of(job, 0, 0, value=0.5, dense=2.0)
    for part in request.tables:
        n, dim = part.gradients.shape
        part.packed.CopyFrom(packed(form, encode_rows(form, np.full((n, dim), 0.5, np.float32)), n * dim, None))
        part.ClearField("gradients")
    for part in request.dense:
        values = np.full(part.gradients.shape[0], 2.0, np.float32)
        lengths = [b.length for b in job.layout.dense_blocks]
        part.packed.CopyFrom(packed(dense, encode_dense(dense, values, lengths), values.size, None))
        part.ClearField("gradients")
    return request


@pytest.mark.parametrize("form", [INT8, ZSTD, Form(Compression("bfloat16")), Form(Compression(), zstd=True)])
def test_what_is_right_is_applied(job, form):
    reply = job.services[0].push(push_of(job, form, form))
    assert (reply.applied, reply.skipped, reply.refused) == (job.layout.blocks, 0, 0)
    assert np.allclose(job.rows("user", range(40)), -0.5, rtol=0.01)
    assert np.allclose(job.dense(), -2.0, rtol=0.01)
    assert job.services[0].push(push_of(job, form, form)).skipped == job.layout.blocks


def changed(job, **fields):
    request = push_of(job, fields.pop("form", INT8))
    part = request.tables[1].packed if fields.pop("table", True) else request.dense[0].packed
    for name, value in fields.items():
        if name in ("codec", "k", "zstd"):
            setattr(part.codec, name, value)
        elif name == "values":
            part.values = value
        else:
            getattr(part, name).CopyFrom(pack(value(np.frombuffer(part.payload.data, np.uint8).copy())))
    return request


def columns(data):
    """Turn the columns of the first row around: they must ascend."""
    data[8], data[9] = 1, 0
    return data


def both(job):
    request = push_of(job)
    request.tables[0].gradients.CopyFrom(pack(np.ones((40, 2), np.float32)))
    return request


def both_dense(job):
    request = push_of(job)
    request.dense[0].gradients.CopyFrom(pack(np.ones(14, np.float32)))
    return request


WRONG = {
    "an unknown codec": (lambda j: changed(j, codec=9), Malformed, "codec 9, there are 0 to 4"),
    "columns without topk": (lambda j: changed(j, k=1), Malformed, "k = 1 under int8"),
    "too many columns": (lambda j: changed(j, form=TOPK, k=4), Malformed, "k = 4 under topk of 3 columns"),
    "no columns": (lambda j: changed(j, form=TOPK, k=0), Malformed, "k = 0 under topk"),
    "columns that do not ascend": (lambda j: changed(j, form=TOPK, payload=columns), Malformed, "ascending"),
    "another codec's bytes": (lambda j: changed(j, codec=1, k=0, form=TOPK), Malformed, "packed bytes came"),
    "too few values": (lambda j: changed(j, values=117), Malformed, "117 packed values for 40 keys"),
    "too many values": (lambda j: changed(j, values=123), Malformed, "123 packed values"),
    "a byte less": (lambda j: changed(j, payload=lambda d: d[:-1]), Malformed, "packed bytes came"),
    "a row more": (lambda j: changed(j, payload=lambda d: np.concatenate([d, d[:8]])), Malformed, "packed bytes"),
    "no bytes": (lambda j: changed(j, payload=lambda d: d[:0]), Malformed, "0 packed bytes"),
    "floats for bytes": (lambda j: changed(j, payload=lambda d: d.view(np.float32)), Malformed, "wanted uint8"),
    "no zstd": (lambda j: changed(j, zstd=True, payload=lambda d: d[:20]), Malformed, "zstd frame"),
    "more than it says in zstd": (lambda j: changed(j, form=ZSTD, codec=0), Malformed, "zstd|bytes"),
    "dense values missing": (lambda j: changed(j, table=False, values=13), Malformed, "13 packed dense gradients"),
    "dense bytes missing": (lambda j: changed(j, table=False, payload=lambda d: d[:-4]), Malformed, "packed bytes"),
    "a dense codec": (lambda j: changed(j, table=False, codec=5), Malformed, "codec 5"),
    "rows twice": (both, Malformed, "gradients of user came twice"),
    "dense twice": (both_dense, Malformed, "dense gradients came twice"),
    "a message within a message": (lambda j: changed(j, values=(1 << 32) - 1), OutOfMemory, "over the limit"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_and_nothing_is_changed(job, what):
    make, kind, words = WRONG[what]
    before = rig.state(job)
    with pytest.raises(kind, match=words):
        job.services[0].push(make(job))
    assert rig.state(job) == before


def test_many_parts_together_may_not_be_larger_than_a_message(job):
    request = push_of(job)
    for part in request.tables:
        part.packed.values = 20 << 20
    with pytest.raises(OutOfMemory, match="packed gradients of"):
        job.services[0].push(request)


def test_values_that_are_no_numbers_are_refused_like_any():
    job = rig.Job(
        rig.spec_of(tables=(TableSpec("user", 2, rig.SGD, rig.ZEROS, 4, guard=Guard(limit=100.0)),)), 1
    ).place()
    form = Form(Compression("float16"), limit=100.0)
    values = np.full((40, 2), 3.0, np.float32)
    values[0, 0], values[1, 1], values[2, 0] = np.nan, np.inf, 100.0
    request = rig.request_of(job, 0, 0, tables=("user",), dense=None)
    request.tables[0].packed.CopyFrom(packed(form, encode_rows(form, values), 80, None))
    request.tables[0].ClearField("gradients")
    assert job.services[0].push(request).refused == 3
    # Bits of such values that no codec of ours wrote.
    payload = np.full((40, 4), 0x7C, np.uint8)
    request.group = 1
    request.tables[0].packed.payload.CopyFrom(pack(payload.reshape(-1)))
    assert job.services[0].push(request).refused == 40


def pull_of(job, codecs, dense=None):
    request = PullRequest(
        header=job.header(0), tables=[part.keys for part in rig.request_of(job, 0, 0).tables], codecs=codecs
    )
    request.dense.CopyFrom(pack(np.arange(job.layout.dense_base, job.layout.blocks, dtype=np.int32)))
    if dense is not None:
        request.dense_codec.CopyFrom(dense)
    return request


def test_a_pull_answers_in_the_form_of_the_request(job):
    reply = job.services[0].pull(pull_of(job, [Codec(codec=1), Codec()], Codec(codec=3)))
    assert len(reply.rows) == 0
    assert [p.codec.codec for p in reply.packed] == [1, 0]
    assert [p.payload.shape[0] for p in reply.packed] == [40 * 4, 40 * 12]
    assert not reply.HasField("dense")
    assert reply.packed_dense.values == job.layout.dense_size
    plain = job.services[0].pull(pull_of(job, []))
    assert len(plain.packed) == 0
    assert not plain.HasField("packed_dense")


@pytest.mark.parametrize(
    ("codecs", "dense", "kind", "words"),
    [
        ([Codec()], None, Malformed, "1 codecs for 2 tables"),
        ([Codec(codec=7), Codec()], None, Malformed, "codec 7"),
        ([Codec(codec=4, k=1), Codec()], None, InvalidArgument, "weights do not travel under topk"),
        ([], Codec(codec=4, k=1), InvalidArgument, "dense values: weights do not"),
        ([], Codec(codec=3, k=1), Malformed, "k = 1 under int8"),
    ],
)
def test_a_pull_in_no_such_form_is_refused(job, codecs, dense, kind, words):
    with pytest.raises(kind, match=words):
        job.services[0].pull(pull_of(job, codecs, dense))


def test_every_form_has_a_message_of_its_own():
    forms = [
        Form(Compression(c, 3 if c == "topk" else 0), z)
        for c in ("none", "float16", "int8", "topk")
        for z in (False, True)
    ]
    assert [read_form(form.message(), CHUNK, "x") for form in forms] == forms
