# SPDX-License-Identifier: Apache-2.0
"""The pure decoders, each given what hypothesis thinks of and a few thousand changes of a good input: a value or a PSError."""

import json
import math
import random
from pathlib import Path

import grpc
import mutate
import numpy as np
import pytest
import rig
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.checkpoint import block_file
from oarlock.checkpoint import manifest as manifests
from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.closed import ClosedSet
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.router import ShardAddress, pack_placement, unpack_changes, unpack_placement
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack, unpack
from oarlock.proto.common_pb2 import Array, ClosedSplits, Failure, Member, Placement
from oarlock.proto.errors import CorruptCheckpoint, Internal, PSError, Unavailable, VersionMismatch
from oarlock.proto.rpc import from_status
from oarlock.proto.rpc.status import failure_of, from_failure
from oarlock.ps import view

CHANGES = 3000
LAYOUT = Layout(rig.spec_of().tables, rig.spec_of().dense)
SPEC = rig.spec_of(files=({"path": "a", "rows": 3},), config={"rate": 0.5}).to_json()

numbers32, numbers64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
small = st.integers(0, 5)
shapes = st.lists(small | numbers32, max_size=6)
arrays = st.builds(Array, data=st.binary(max_size=64), dtype=st.integers(-1, 6), shape=shapes)
dtypes = st.sampled_from([np.uint64, np.int32, np.float32, np.uint32])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
odd = st.sampled_from(
    [math.inf, -math.inf, math.nan, 1e308, 0, -1, 1 << 63, 1 << 64, True, "", "x", [], {}, [[]], None]
)


def outcome(decode, *values):
    """Return what ``decode`` returns, or the PSError that it raises; let anything else through."""
    try:
        return decode(*values)
    except PSError as error:
        refusal = error
    assert type(refusal) is not Internal
    assert len(refusal.message) < 20_000
    return refusal


@given(arrays, dtypes, st.integers(1, 5), st.none() | small)
@settings(max_examples=1000)
def test_an_array_is_what_its_bytes_say_or_nothing(message, dtype, dims, columns):
    columns = columns if dims > 1 else None
    got = outcome(lambda: unpack(message, dtype, "x", dims=dims, columns=columns))
    if not isinstance(got, PSError):
        assert got.dtype == dtype
        assert got.ndim == dims
        assert columns is None or got.shape[-1] == columns
        assert got.nbytes == len(message.data) <= MAX_MESSAGE_BYTES
        assert got.tobytes() == message.data


@given(numbers64, st.binary(max_size=200))
@settings(max_examples=500)
def test_a_closed_set_can_be_sent_on(floor, bitmap):
    got = outcome(ClosedSet.unpack, ClosedSplits(floor=floor, bitmap=bitmap))
    if not isinstance(got, PSError):
        sent = got.pack().SerializeToString()
        again = ClosedSet.unpack(ClosedSplits.FromString(sent))
        assert (again.floor, again.above) == (got.floor, got.above)
        assert all(floor + i in got for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1)


members = st.builds(Member, id=small | numbers32, address=st.text(max_size=5), incarnation=numbers64)
owners = st.lists(st.integers(-2, 3), min_size=15, max_size=19).map(lambda v: pack(np.array(v, np.int32)))
whole_owners = st.lists(st.sampled_from([-1, 0, 1]), min_size=17, max_size=17).map(
    lambda v: pack(np.array(v, np.int32))
)
placements = st.builds(
    Placement, generation=numbers64, owners=owners | whole_owners | arrays, shards=st.lists(members, max_size=4)
)


@given(placements)
@settings(max_examples=500)
def test_a_placement_gives_every_block_to_somebody_that_it_lists(message):
    got = outcome(unpack_placement, LAYOUT, message)
    if not isinstance(got, PSError):
        assert len(got.owners) == LAYOUT.blocks
        assert set(got.owners.tolist()) <= {-1, *got.shards}
        for rank, table in zip(got.ranks, LAYOUT.tables, strict=True):
            assert sorted(rank.tolist()) == list(range(table.blocks))


few = st.lists(st.integers(-1, 4), max_size=3).map(lambda v: pack(np.array(v, np.int32)))
copy_sets = st.lists(st.lists(st.integers(-1, 2), min_size=2, max_size=2), max_size=3).map(
    lambda v: pack(np.array(v, np.int32).reshape(-1, 2))
)
changed = st.builds(
    Placement,
    generation=small | numbers64,
    since=small | numbers64,
    blocks=few | arrays,
    owners=few | arrays,
    generations=st.none()
    | st.lists(st.integers(0, 9), max_size=3).map(lambda v: pack(np.array(v, np.uint64)))
    | arrays,
    members=st.none() | copy_sets | arrays,
    shards=st.lists(members, max_size=4),
)


@given(changed | placements)
@settings(max_examples=1000)
def test_a_change_of_a_placement_is_taken_whole_or_not_at_all(message):
    got = outcome(unpack_changes, LAYOUT, message)
    if not isinstance(got, PSError):
        known = unpack_placement(LAYOUT, pack_placement(3, np.zeros(17, np.int32), {0: ShardAddress(0, "a:1", 5)}))
        for complete in (False, True):
            after = known.after(got, complete=complete)
            assert set(after.owners.tolist()) <= {-1, *after.shards}
            assert (after.generations >= known.generations).all()
            assert after.generation in (known.generation, got.generation)


@given(st.sampled_from(sorted(json.loads(SPEC))), json_values | odd)
@settings(max_examples=700)
def test_a_job_with_one_field_that_is_anything(name, value):
    whole = {**json.loads(SPEC), name: value}
    got = outcome(JobSpec.from_json, json.dumps(whole))
    if not isinstance(got, PSError):
        assert math.isfinite(got.lease_seconds)
        assert JobSpec.from_json(got.to_json()) == got


@given(st.text(max_size=50) | json_values.map(json.dumps))
@settings(max_examples=300)
def test_a_job_that_is_none(text):
    assert isinstance(outcome(JobSpec.from_json, text), PSError)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_a_job_that_is_deep_or_long(text):
    assert isinstance(outcome(JobSpec.from_json, text), PSError)


@pytest.mark.parametrize("name", ["lease_seconds", "heartbeat_seconds"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e308 * 10])
def test_a_lease_that_never_ends(name, value):
    assert isinstance(outcome(JobSpec.from_json, json.dumps({**json.loads(SPEC), name: value})), PSError)


@given(st.builds(Failure, code=small | numbers32, message=st.text(), details=st.text() | json_values.map(json.dumps)))
@settings(max_examples=500)
def test_a_failure_is_always_an_error_and_can_be_sent_on(message):
    got = from_failure(message)
    assert isinstance(got, PSError)
    assert got.message == message.message
    assert len(failure_of(got).SerializeToString()) < 8192


@given(st.sampled_from(list(grpc.StatusCode)), st.text(), st.none() | st.binary(max_size=100))
@settings(max_examples=500)
def test_a_status_is_always_an_error(status, text, failure):
    got = from_status(status, text, failure, address="a:1", method="Shard.Pull")
    assert isinstance(got, PSError)
    assert failure_of(got).SerializeToString()


def test_thousands_of_changed_bytes_of_messages(seed):
    rng = random.Random(seed)
    good = ClosedSet(5, [7, 9]), pack_placement(3, np.zeros(17, np.int32), {0: ShardAddress(0, "a:1", 5)})
    wanted = {
        ClosedSplits: (good[0].pack().SerializeToString(), ClosedSet.unpack),
        Placement: (good[1].SerializeToString(), lambda m: unpack_placement(LAYOUT, m)),
        Array: (pack(np.eye(3, dtype=np.float32)).SerializeToString(), lambda m: unpack(m, np.float32, "x", dims=2)),
        Failure: (
            failure_of(Unavailable("not yet", shard=1)).SerializeToString(),
            lambda m: failure_of(from_failure(m)),
        ),
    }
    for kind, (data, decode) in wanted.items():
        reached = 0
        while reached < CHANGES // 4:
            try:
                message = kind.FromString(mutate.bytes_of(rng, data))
            except DecodeError:
                continue
            reached += 1
            outcome(decode, message)


def test_thousands_of_changed_bytes_of_a_job(seed):
    rng = random.Random(seed)
    kept = 0
    for _ in range(CHANGES):
        data = mutate.bytes_of(rng, SPEC.encode())
        got = outcome(JobSpec.from_json, data.decode("utf-8", "replace"))
        kept += isinstance(got, JobSpec)
        assert not isinstance(got, JobSpec) or JobSpec.from_json(got.to_json()) == got
    assert 0 < kept < CHANGES // 2


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A committed cut of a shard with rows, marks and dense values; (manifest bytes, block files by kind)."""
    folder = tmp_path_factory.mktemp("cut")
    job = rig.Job(rig.spec_of(), shards=1).place()
    job.services[0].push(rig.request_of(job, 1, 0))
    store = LocalStore(folder)
    entries = list(view.View(job.shards[0], 1, {}).write(store).values())
    values = json.loads(SPEC)
    manifest = Manifest(
        job=rig.JOB,
        run=1,
        cut=1,
        created="2024-01-01T00:00:00+00:00",
        seed=7,
        tables=tuple(values["tables"]),
        dense=tuple(values["dense"]),
        recipe="none:none",
        config={},
        files=(),
        closed=manifests.ClosedSet(0, (3,)),
        open_splits=(1,),
        epoch=0,
        step=0,
        metrics={},
        best={},
        blocks=tuple(entries),
    )
    store.commit(manifest)
    files = {e.kind: Path(folder, "cut-000001", e.file).read_bytes() for e in entries}
    return Path(folder, "cut-000001", "manifest.json").read_bytes(), files


def test_thousands_of_changed_manifests(cut, seed):
    """A change of any byte breaks the checksum; a manifest forged with a right one still has to make sense."""
    rng = random.Random(seed)
    data, _ = cut
    for _ in range(CHANGES):
        changed = mutate.bytes_of(rng, data)
        got = outcome(Manifest.decode, changed)
        assert isinstance(got, CorruptCheckpoint | VersionMismatch) or changed == data


@given(name=st.sampled_from(sorted(Manifest.__dataclass_fields__)), value=json_values)
@settings(max_examples=300)
def test_a_manifest_forged_with_a_right_checksum(cut, name, value):
    document = json.loads(cut[0])
    document.pop("checksum")
    document[name] = value
    try:
        document["checksum"] = manifests._checksum(document)
        data = manifests._render(document)
    except ValueError:
        return
    got = outcome(Manifest.decode, data)
    assert isinstance(got, Manifest | CorruptCheckpoint | VersionMismatch)
    if isinstance(got, Manifest):
        assert Manifest.decode(got.encode()) == got


@pytest.mark.parametrize("kind", ["rows", "dense"])
def test_thousands_of_changed_block_files(cut, kind, seed):
    """The store's checksum would refuse them; the decoder on its own must not fall over either."""
    rng = random.Random(seed)
    data = cut[1][kind]
    refused = 0
    for _ in range(CHANGES):
        got = outcome(block_file.decode, mutate.bytes_of(rng, data))
        refused += not isinstance(got, BlockImage)
        if isinstance(got, BlockImage):
            assert np.isfinite(got.weights).all()
            assert np.isfinite(got.state).all()
            assert (got.keys[1:] > got.keys[:-1]).all()
            assert all(0 <= group < 1 << 63 for group in got.marks.values())
    assert refused > CHANGES // 4
