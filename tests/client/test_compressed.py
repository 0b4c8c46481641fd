# SPDX-License-Identifier: Apache-2.0
"""What travels packed: what arrives is what was sent, once, and with error feedback a split's groups add up to what was given."""

import asyncio
import random

import numpy as np
import pytest
import rig

from oarlock.client.client import Client
from oarlock.client.compression import DENSE, WireSpec
from oarlock.client.feedback import SplitFeedback
from oarlock.client.forms import Forms
from oarlock.client.packed import decode_dense, encode_dense, encode_rows
from oarlock.client.push import RowGradients
from oarlock.client.retry import Retry
from oarlock.embedding.spec import DenseSpec, TableSpec
from oarlock.proto.errors import InvalidArgument, Malformed
from oarlock.proto.shard_pb2 import PullRequest, PushRequest

PATIENT = Retry(deadline_seconds=10000.0)
KEYS = 300
GROUPS = 6
TABLES = (TableSpec("user", 8, rig.SGD, rig.ZEROS, 8), TableSpec("item", 5, rig.SGD, rig.ZEROS, 4))
DENSES = (DenseSpec("w", (30, 30), rig.SGD, rig.ZEROS, slice=300), DenseSpec("b", (5,), rig.SGD, rig.ZEROS, slice=3))
LOSSY = ("float16", "bfloat16", "int8")
KEPT = ("float16+feedback", "bfloat16+feedback", "int8+feedback", "topk:0.3")


def job_of(push="float32", pull="float32", *, zstd=False, shards=3, names=("user", "item", DENSE)):
    wire = {name: WireSpec(pull, push, zstd) for name in names}
    return rig.Job(rig.spec_of(TABLES, DENSES, compression=wire), shards)


def group(job, client, split, number, seed=0):
    """Return the gradients of a group, a pure function of its name: some keys of both tables, and all dense blocks."""
    rng = np.random.default_rng([seed, split, number])
    rows = {}
    for table in job.layout.tables:
        raw = rng.choice(KEYS, 80, replace=False).astype(np.uint64)
        keyset = rig.group_keys(job.layout, client.routes, table.name, raw)
        size = np.exp2(rng.uniform(-6, 6, KEYS))[keyset.keys.astype(int), None]
        values = np.random.default_rng([seed, split, number, table.dim]).normal(size=(KEYS, table.dim)) * 1.0
        rows[table.name] = RowGradients(keyset, (values[keyset.keys.astype(int)] * size).astype(np.float32), 1.0)
    return rows, rng.normal(size=job.layout.dense_size).astype(np.float32)


async def train(job, client, split, *, groups=GROUPS, kept=None, drained=True):
    """Push a split's groups as a worker does; ``kept`` and ``drained`` are for planted bugs. Return what was given."""
    given = {t.name: np.zeros((KEYS, t.dim)) for t in job.layout.tables}
    given[DENSE] = np.zeros(job.layout.dense_size)
    feedback = client.new_feedback() if kept is None else kept
    for number in range(groups):
        rows, dense = group(job, client, split, number)
        for name, part in rows.items():
            given[name][part.keys.keys.astype(int)] += part.gradients
        given[DENSE] += dense
        last = drained and number == groups - 1
        waiting = client.push(split, number, rows, dense=dense, dense_rate=1.0, feedback=feedback, last=last)
        for part in rows.values():
            part.gradients[:] = np.nan
        dense[:] = np.nan
        assert (await waiting).refused == 0
    return given


def held(job):
    """Return what the shards were given: the rows of all keys and the dense values, with their sign turned."""
    found = {t.name: -job.rows(t.name, np.arange(KEYS, dtype=np.uint64)) for t in job.layout.tables}
    return {**found, DENSE: -job.dense()}


def off(job, given):
    """Return how far off the shards are from what was given, as a part of the largest of it."""
    found = held(job)
    return max(float(np.abs(found[n] - given[n]).max() / np.abs(given[n]).max()) for n in given)


def push_all(job, transport=None, splits=1, **more):
    async def body():
        client = Client(job.member(transport, retry=PATIENT))
        return await asyncio.gather(*(train(job, client, split, **more) for split in range(splits)))

    parts, _ = rig.run(body())
    return {name: sum(part[name] for part in parts) for name in parts[0]}


# What is sent


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("push", LOSSY)
def test_a_push_changes_rows_by_what_its_form_makes_of_the_gradients(push, zstd):
    job = job_of(push, zstd=zstd).place()
    given = push_all(job, groups=1)
    error = {"float16": 0.001, "bfloat16": 0.01, "int8": 0.01}[push]
    assert 0 < off(job, given) < error
    # A group that is computed again is rounded alike.
    again = job_of(push, zstd=zstd).place()
    push_all(again, groups=1)
    assert all(np.array_equal(a, b) for a, b in zip(held(job).values(), held(again).values(), strict=True))


def bytes_of(spy, method):
    return sum(len(data) for _, _, data, _ in spy.sent(method))


def test_packed_gradients_take_the_bytes_of_their_form_and_the_shards_count_them():
    sizes, saved, values = {}, {}, 2 * (80 * 13 + 905)
    for push in ("float32", *LOSSY, "int8+feedback"):
        job = job_of(push).place()
        spy = rig.Spy(job.transport)
        push_all(job, spy, groups=2)
        sizes[push] = bytes_of(spy, "Shard.Push")
        stats = [shard.stats() for shard in job.shards.values()]
        saved[push] = sum(s["push_bytes_saved"] for s in stats)
        # The last group brings what is kept of keys that it has not.
        told = sum(s["push_bytes"] for s in stats) + saved[push]
        assert told > 4 * values if push == "int8+feedback" else told == 4 * values
    assert saved["float32"] == 0
    for push in LOSSY:
        # Beside the values only a few bytes a part are new.
        assert 0 <= sizes[push] - (sizes["float32"] - saved[push]) < 2 * 3 * 3 * 30
    # Two bytes a value; a byte a value and one scale a row. Rows of odd width have padding.
    assert saved["float16"] == saved["bfloat16"]
    assert 0.95 * 2 * values < saved["float16"] < 2 * values
    assert 0.8 * 3 * values < saved["int8"] < 3 * values
    assert 2 * saved["int8+feedback"] == saved["int8"]


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("pull", LOSSY)
def test_a_pull_brings_what_its_form_makes_of_the_rows(pull, zstd):
    job = job_of(pull=pull, zstd=zstd).place()
    push_all(job)
    forms = Forms(job.layout, job.spec.compression, job.spec.seed)
    spy = rig.Spy(job.transport)

    async def body(lossless):
        client = Client(job.member(spy))
        keys = {t.name: rig.group_keys(job.layout, client.routes, t.name, range(KEYS)) for t in job.layout.tables}
        rows = {t.name: np.full((KEYS, t.dim), np.nan, np.float32) for t in job.layout.tables}
        dense = np.full(job.layout.dense_size, np.nan, np.float32)
        await client.pull(keys, rows, dense=dense, lossless=lossless)
        return {t.name: rows[t.name][keys[t.name].inverse] for t in job.layout.tables}, dense

    (whole, dense), _ = rig.run(body(True))
    (rough, rough_dense), _ = rig.run(body(False))
    for number, table in enumerate(job.layout.tables):
        stored = job.rows(table.name, np.arange(KEYS, dtype=np.uint64))
        assert np.array_equal(whole[table.name], stored)
        form = forms.pulls[number]
        want = np.empty_like(stored)
        form.rows(table.dim).decode(encode_rows(form, stored).reshape(-1), want)
        assert np.array_equal(rough[table.name], want)
        assert not np.array_equal(want, stored)
    assert np.array_equal(dense, job.dense())
    lengths = [block.length for block in job.layout.dense_blocks]
    want = np.empty_like(dense)
    decode_dense(forms.pull_dense, encode_dense(forms.pull_dense, job.dense(), lengths), lengths, want)
    assert np.array_equal(rough_dense, want)
    assert 0 < np.abs(want - dense).max() < 0.02 * np.abs(dense).max()


def test_a_shard_that_knows_no_codecs_is_understood():
    job = job_of(pull="int8").place()

    def forget(address, method, request):
        # An older shard skips the fields that it does not know.
        message = request.message if hasattr(request, "message") else request
        if isinstance(message, PullRequest):
            message.ClearField("codecs")
            message.ClearField("dense_codec")

    spy = rig.Spy(job.transport)
    spy.answers.append(forget)
    push_all(job)

    async def body():
        client = Client(job.member(spy))
        keys = {"user": rig.group_keys(job.layout, client.routes, "user", range(KEYS))}
        rows = {"user": np.full((KEYS, 8), np.nan, np.float32)}
        dense = np.full(job.layout.dense_size, np.nan, np.float32)
        await client.pull(keys, rows, dense=dense, lossless=False)
        return rows["user"][keys["user"].inverse], dense

    (rows, dense), _ = rig.run(body())
    assert np.array_equal(rows, job.rows("user", np.arange(KEYS, dtype=np.uint64)))
    assert np.array_equal(dense, job.dense())


@pytest.mark.parametrize("wrong", ["codec", "values", "payload", "fewer"])
def test_an_answer_that_is_not_what_was_asked_for_is_malformed(wrong):
    job = job_of(pull="float16", shards=1).place()
    service = job.services[0]
    right = service.pull

    def pull(request):
        reply = right(request)
        message = reply.message if hasattr(reply, "message") else reply
        if wrong == "codec":
            message.packed[0].codec.codec = 2
        elif wrong == "values":
            message.packed[0].values -= 1
        elif wrong == "payload":
            message.packed_dense.payload.shape[0] += 4
        else:
            del message.packed[1]
        return reply

    service.pull = pull

    async def body():
        client = Client(job.member())
        keys = {t.name: rig.group_keys(job.layout, client.routes, t.name, range(KEYS)) for t in job.layout.tables}
        rows = {t.name: np.zeros((KEYS, t.dim), np.float32) for t in job.layout.tables}
        await client.pull(keys, rows, dense=np.zeros(job.layout.dense_size, np.float32), lossless=False)

    with pytest.raises(Malformed):
        rig.run(body())


# What error feedback promises


@pytest.mark.parametrize(("push", "zstd"), [*((push, False) for push in KEPT), ("int8+feedback", True)])
def test_what_a_split_sent_adds_up_to_what_it_was_given(push, zstd):
    job = job_of(push, zstd=zstd).place()
    given = push_all(job, splits=2)
    assert off(job, given) < 1e-6


def test_without_feedback_it_does_not():
    job = job_of("int8").place()
    assert off(job, push_all(job, splits=3)) > 1e-4


@pytest.mark.parametrize("push", ["int8", "int8+feedback"])
def test_a_wire_with_faults_and_blocks_that_move_change_nothing(push, seed):
    """One split, so that its groups come in one order: the shards hold the same to the bit as without faults."""
    quiet = job_of(push).place()
    push_all(quiet, groups=10)
    job = job_of(push).place()
    rng = random.Random(seed)
    wire = rig.FaultyWire(job.transport, rng, lose=0.1, deaf=0.15, late=0.2, slow=0.2)

    async def body():
        client = Client(job.member(wire, retry=PATIENT, seed=seed))
        training = asyncio.ensure_future(train(job, client, 0, groups=10))
        while not training.done():
            job.move(rng.randrange(job.layout.blocks), rng.randrange(3))
            await asyncio.sleep(rng.random() * 5)
        await wire.drain()
        return await training

    given, _ = rig.run(body())
    assert job.generation > 5
    assert sum(wire.happened.values()) > 10
    assert all(np.array_equal(a, b) for a, b in zip(held(job).values(), held(quiet).values(), strict=True))
    assert push == "int8" or off(job, given) < 1e-6


@pytest.mark.parametrize("zstd", [False, True])
def test_blocks_that_live_elsewhere_take_their_own_bytes_along(zstd):
    """Every block moved after the messages were made: all of it is cut anew, out of what was packed."""
    quiet = job_of("int8+feedback", zstd=zstd).place()
    push_all(quiet)
    job = job_of("int8+feedback", zstd=zstd).place()
    spy = rig.Spy(job.transport)

    async def body():
        client = Client(job.member(spy, retry=PATIENT))
        for number in range(job.layout.blocks):
            job.move(number, (int(job.owners[number]) + 1) % 3)
        return await train(job, client, 0)

    rig.run(body())
    assert len(spy.sent("Shard.Push")) > GROUPS * 3
    assert all(np.array_equal(a, b) for a, b in zip(held(job).values(), held(quiet).values(), strict=True))


# Bugs that would be seen


def test_a_last_group_that_is_not_whole_is_seen():
    job = job_of("int8+feedback").place()
    assert off(job, push_all(job, drained=False)) > 1e-4


def test_a_rest_that_goes_along_twice_is_seen(monkeypatch):
    """A retry that encodes again, instead of sending what was made."""
    job = job_of("int8+feedback").place()
    monkeypatch.setattr(SplitFeedback, "begin", lambda self, group: None)
    once = SplitFeedback.rows

    def twice(self, table, form, part):
        once(self, table, form, part)
        return once(self, table, form, part)

    monkeypatch.setattr(SplitFeedback, "rows", twice)
    assert off(job, push_all(job)) > 1e-4


def test_a_group_goes_through_once_and_in_order():
    job = job_of("int8+feedback").place()

    async def body():
        client = Client(job.member())
        rows, dense = group(job, client, 0, 0)
        feedback = client.new_feedback()
        client.push(0, 1, rows, dense=dense, feedback=feedback)
        for number in (1, 0):
            with pytest.raises(InvalidArgument, match=f"group {number} of a split after group 1"):
                client.push(0, number, rows, dense=dense, feedback=feedback)
        with pytest.raises(InvalidArgument, match="push with what its split has kept"):
            client.push(0, 2, rows, dense=dense)

    rig.run(body())


def test_a_rest_of_another_split_is_seen():
    job = job_of("int8+feedback").place()

    async def body():
        client = Client(job.member())
        other = client.new_feedback()
        rows, dense = group(job, client, 5, 0)
        client.push(5, 0, rows, dense=dense, feedback=other)
        other._next = 0
        return await train(job, client, 0, kept=other)

    given, _ = rig.run(body())
    assert off(job, given) > 1e-4


# What is refused where it arrives


@pytest.mark.parametrize("push", ["float16", "int8", "int8+feedback", "topk:0.3"])
def test_a_gradient_that_is_no_number_is_refused_and_the_rest_arrives(push):
    job = job_of(push).place()

    async def body():
        client = Client(job.member())
        feedback = client.new_feedback()
        for number in range(3):
            rows, dense = group(job, client, 0, number)
            if number == 1:
                rows["user"].gradients[0, 1] = np.nan
                dense[4] = np.inf
            counts = await client.push(
                0, number, rows, dense=dense, dense_rate=1.0, feedback=feedback, last=number == 2
            )
            assert counts.refused == (2 if number == 1 else 0)

    rig.run(body())
    assert all(np.isfinite(values).all() for values in held(job).values())


def test_what_is_kept_of_a_key_survives_a_gradient_that_is_refused():
    job = job_of("int8+feedback", names=("user",)).place()
    total = np.zeros(8)

    async def body():
        client = Client(job.member())
        feedback = client.new_feedback()
        keyset = rig.group_keys(job.layout, client.routes, "user", [7])
        for number, value in enumerate((np.pi, np.nan, np.e)):
            gradient = (np.arange(1, 9) * value).astype(np.float32)[None]
            total[:] += np.nan_to_num(gradient[0])
            part = {"user": RowGradients(keyset, gradient, 1.0)}
            await client.push(0, number, part, feedback=feedback, last=number == 2)

    rig.run(body())
    assert np.allclose(-job.rows("user", [7])[0], total, rtol=1e-6)


def test_a_push_of_old_is_as_it_was():
    """Without compression no message has a new field."""
    job = rig.Job(rig.spec_of(TABLES, DENSES)).place()
    spy = rig.Spy(job.transport)
    push_all(job, spy)
    for _, _, data, _ in spy.sent("Shard.Push"):
        request = PushRequest.FromString(data)
        assert not any(part.HasField("packed") for part in (*request.tables, *request.dense))
