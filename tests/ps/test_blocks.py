# SPDX-License-Identifier: Apache-2.0
"""Blocks that a shard takes, writes and restores: whole or not at all, on any number of shards."""

import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest
import rig

from oarlock.checkpoint.manifest import BlockEntry, Manifest
from oarlock.checkpoint.manifest import ClosedSet as ClosedRecord
from oarlock.checkpoint.store import LocalStore
from oarlock.checkpoint.writing import write_blocks
from oarlock.client.closed import ClosedSet
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec, to_json
from oarlock.proto.arrays import pack
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, NotFound, PSError, SpecMismatch, StalePlacement
from oarlock.proto.shard_pb2 import PullRequest, TableKeys
from oarlock.ps.view import TRAINING_NICENESS

ADAM = OptimizerSpec("adam")
TABLES = (TableSpec("user", 2, ADAM, blocks=8), TableSpec("item", 3, OptimizerSpec("adagrad"), blocks=4))
DENSE = (DenseSpec("w", (3, 3), ADAM, Initializer("normal"), slice=4), DenseSpec("b", (5,), rig.SGD, slice=3))
SPEC = rig.spec_of(tables=TABLES, dense=DENSE)
RAW = range(60)


def train(job, rng, *, splits=(0, 3), groups=3):
    for split in splits:
        for group in range(groups):
            gradients = {}
            for table in job.layout.tables:
                keyset = rig.group_keys(job.layout, job.routes(), table.name, rng.choice(60, 25, replace=False))
                values = rng.standard_normal((60, table.dim)).astype(np.float32)
                gradients[table.name] = RowGradients(keyset, values[keyset.keys.astype(np.int64)], 0.1)
            flat = rng.standard_normal(job.layout.dense_size).astype(np.float32)
            for message in cut_push(job.layout, job.routes(), PushIdentity(split, group), gradients, flat, 0.1):
                message.request.header.CopyFrom(job.header(message.shard.id))
                job.services[message.shard.id].push(message.bulk)


def checkpoint(job, root, *, cut=1, tables=TABLES, dense=DENSE):
    """Have all shards write, and commit; return the cut's folder."""
    entries = []
    for s in job.services:
        reply = job.write(s, cut, root)
        entries += [BlockEntry(**e) for e in json.loads(reply.entries)]
    manifest = Manifest(
        job=rig.JOB,
        run=1,
        cut=cut,
        created=datetime.now(UTC).isoformat(),
        seed=SPEC.seed,
        tables=tuple(to_json(t) for t in tables),
        dense=tuple(to_json(d) for d in dense),
        recipe="none:none",
        config={},
        files=(),
        closed=ClosedRecord(0, ()),
        open_splits=(),
        epoch=0,
        step=0,
        metrics={},
        best={},
        blocks=tuple(entries),
    )
    LocalStore(root).commit(manifest)
    return root / f"cut-{cut:06d}"


def contents(job):
    """Return every block's content, marks and seq by number, rows in order of their keys."""
    out = {}
    for shard in job.shards.values():
        for number in np.flatnonzero(shard.owned).tolist():
            name, local = job.layout.name(number)
            assert number not in out
            if number >= job.layout.dense_base:
                parameter = shard.dense[job.layout.dense_blocks[number - job.layout.dense_base].parameter]
                block = parameter.export_block(local)
                rows = [block.weights.tobytes(), block.state.tobytes()]
            else:
                block = shard.tables[job.layout.table_index[name]].export_block(local)
                order = np.argsort(block.keys)
                waiting = np.argsort(block.waiting)
                rows = [a[order].tobytes() for a in (block.keys, block.weights, block.state)]
                rows += [block.counters[order].tobytes() if block.counters.size else b""]
                rows += [block.waiting[waiting].tobytes(), block.waited[waiting].tobytes(), bytes(block.sketch)]
            out[number] = (rows, shard.marks.of_block(number), int(shard.sequence[number]))
    return out


def assert_empty(shard):
    """Nothing is owned, stored or marked."""
    assert not shard.owned.any()
    assert (shard.generation, int(shard.sequence.sum())) == (0, 0)
    assert all(len(each.owned) == 0 for each in (*shard.tables, *shard.dense))
    assert shard.next_groups([0, 3]) == [0, 0]
    assert shard.closed == ClosedSet()


@pytest.fixture
def trained(rng):
    job = rig.Job(SPEC, shards=3).place()
    train(job, rng)
    return job


def test_what_is_adopted_starts_at_first_values():
    one, three = rig.Job(SPEC, shards=1).place(), rig.Job(SPEC, shards=3).place()
    assert contents(one) == contents(three)
    assert one.dense().any()
    assert np.array_equal(one.rows("user", RAW), three.rows("user", RAW))
    assert [int(s.owned.sum()) for s in three.shards.values()] != [17, 0, 0]
    for job in (one, three):
        assert all(s.stats()["rows"] == 0 for s in job.shards.values())


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_a_checkpoint_is_restored_on_any_number_of_shards(trained, tmp_path, shards):
    path = checkpoint(trained, tmp_path)
    before = contents(trained)
    again = rig.Job(SPEC, shards=shards, run=2)
    again.place(restore=str(path), closed=ClosedSet(0, [2]).pack())
    assert contents(again) == before
    assert sum(s.stats()["rows"] for s in again.shards.values()) == sum(
        s.stats()["rows"] for s in trained.shards.values()
    )
    assert {max(s.next_groups([sp])[0] for s in again.shards.values()) for sp in (0, 3)} == {3}
    assert all(s.closed == ClosedSet(0, [2]) for s in again.shards.values())
    # They go on alike, to the bit.
    for job in (trained, again):
        train(job, np.random.default_rng(5), splits=(3, 9), groups=5)
    assert contents(again) == contents(trained)


def test_a_checkpoint_of_one_shard_is_restored_on_three(rng, tmp_path):
    one = rig.Job(SPEC, shards=1).place()
    train(one, rng)
    path = checkpoint(one, tmp_path)
    assert contents(rig.Job(SPEC, shards=3).place(restore=str(path))) == contents(one)
    # The folder of checkpoints means its newest.
    assert contents(rig.Job(SPEC, shards=3).place(restore=str(tmp_path))) == contents(one)


def test_marks_of_closed_splits_are_not_restored(trained, tmp_path):
    path = checkpoint(trained, tmp_path)
    again = rig.Job(SPEC, shards=2).place(restore=str(path), closed=ClosedSet(1).pack())
    assert max(s.next_groups([0])[0] for s in again.shards.values()) == 0
    assert max(s.next_groups([3])[0] for s in again.shards.values()) == 3


def test_a_cut_that_is_written_again_is_still_of_its_instant(trained, tmp_path):
    before = contents(trained)
    first = [trained.write(s, 1, tmp_path).entries for s in trained.services]
    train(trained, np.random.default_rng(1), splits=(4,))
    assert contents(trained) != before
    assert [trained.write(s, 1, tmp_path).entries for s in trained.services] == first
    path = checkpoint(trained, tmp_path)
    assert contents(rig.Job(SPEC, shards=1).place(restore=str(path))) == before


@pytest.mark.parametrize(("alone", "niceness"), [(True, 0), (False, TRAINING_NICENESS)])
def test_who_trains_meanwhile_comes_first(trained, tmp_path, monkeypatch, alone, niceness):
    found = []

    def noted(*arguments, **named):
        found.append((named["threads"] > 1, named["niceness"]))
        return write_blocks(*arguments, **named)

    monkeypatch.setattr("oarlock.ps.view.write_blocks", noted)
    trained.write(0, 1, tmp_path, alone=alone)
    assert found == [(alone, niceness)]


def test_a_folder_that_cannot_be_written_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgument, match=r"a checkpoint cannot be written to .*file"):
        trained.write(0, 1, tmp_path / "file")
    # The shard goes on.
    train(trained, np.random.default_rng(1), splits=(4,))


def damage(path, how):
    victim = sorted(path.glob("*w*"))[0] if how != "manifest" else path / "manifest.json"
    data = bytearray(victim.read_bytes())
    if how == "gone":
        victim.unlink()
    elif how == "short":
        victim.write_bytes(data[:-8])
    else:
        data[len(data) // 2] ^= 0x40
        victim.write_bytes(data)
    return victim, bytes(data)


@pytest.mark.parametrize("how", ["gone", "short", "altered", "manifest"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_half_loaded(trained, tmp_path, how):
    path = checkpoint(trained, tmp_path)
    kept = {f: f.read_bytes() for f in path.iterdir()}
    victim, _ = damage(path, how)
    again = rig.Job(SPEC, shards=1)
    for _ in range(2):
        again.generation = 0
        with pytest.raises(CorruptCheckpoint, match=victim.name):
            again.place(restore=str(path), closed=ClosedSet(2).pack())
        assert_empty(again.shards[0])
        with pytest.raises(StalePlacement):
            again.rows("user", RAW)
    # The same order succeeds once the file is whole again.
    victim.write_bytes(kept[victim])
    again.generation = 0
    again.place(restore=str(path))
    assert contents(again) == contents(trained)


def test_an_order_that_fails_at_any_block_can_be_repeated(trained, tmp_path, monkeypatch):
    path = checkpoint(trained, tmp_path)
    again = rig.Job(SPEC, shards=1)
    real = LocalStore.load_block
    for victim in range(17):
        loaded = 0

        def load(store, manifest, entry, *, checked=False, victim=victim):
            nonlocal loaded
            loaded += 1
            if loaded == victim + 1:
                raise MemoryError if victim % 2 else OSError(5, "Input/output error")
            return real(store, manifest, entry)

        again.generation = 0
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "load_block", load)
            with pytest.raises(MemoryError if victim % 2 else InvalidArgument):
                again.place(restore=str(path))
        assert_empty(again.shards[0])
    again.generation = 0
    again.place(restore=str(path))
    assert contents(again) == contents(trained)


def test_an_order_that_fails_leaves_owned_blocks_as_they_were(trained, tmp_path):
    before = contents(trained)
    with pytest.raises(NotFound):
        trained.place([0] * 17, restore=str(tmp_path / "nothing"))
    assert contents(trained) == before
    assert [s.generation for s in trained.shards.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            rig.spec_of(tables=(TableSpec("user", 4, ADAM, blocks=8), TABLES[1]), dense=DENSE),
            "user: the checkpoint has a table of dim 2 in 8 .*wants a table of dim 4",
        ),
        (
            rig.spec_of(tables=(TableSpec("user", 2, ADAM, blocks=16), TABLES[1]), dense=DENSE),
            "wants a table of dim 2 in 16 blocks",
        ),
        (
            rig.spec_of(tables=(TableSpec("user", 2, rig.SGD, blocks=8), TABLES[1]), dense=DENSE),
            "under adam, this job wants .* under sgd",
        ),
        (
            rig.spec_of(tables=(*TABLES, TableSpec("more", 2)), dense=DENSE),
            "more: the checkpoint has nothing of that name",
        ),
        (
            rig.spec_of(tables=TABLES, dense=(DenseSpec("w", (9,), ADAM, slice=4), DENSE[1])),
            "of shape \\(3, 3\\) .* of shape \\(9,\\)",
        ),
        (
            rig.spec_of(tables=TABLES, dense=(DenseSpec("w", (3, 3), ADAM, slice=5), DENSE[1])),
            "in blocks of 4 .*in blocks of 5",
        ),
        (
            rig.spec_of(tables=(*TABLES, TableSpec("w", 3, ADAM)), dense=(DENSE[1],)),
            "w: the checkpoint has a dense parameter",
        ),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(trained, tmp_path, spec, text):
    path = checkpoint(trained, tmp_path)
    other = rig.Job(spec, shards=1)
    with pytest.raises(SpecMismatch, match=text):
        other.place(restore=str(path))
    assert_empty(other.shards[0])


def test_constants_of_an_optimizer_may_change_between_runs(trained, tmp_path):
    path = checkpoint(trained, tmp_path)
    warmer = (TableSpec("user", 2, OptimizerSpec("adam", beta1=0.8), blocks=8), TABLES[1])
    again = rig.Job(rig.spec_of(tables=warmer, dense=DENSE), shards=1).place(restore=str(path))
    assert contents(again) == contents(trained)


def test_the_same_order_twice_is_done_once(trained):
    """The answer to the first one was lost."""
    before = contents(trained)
    for s, service in trained.services.items():
        reply = service.adopt(trained.adoption(s))
        assert (reply.generation, reply.rows) == (1, trained.shards[s].stats()["rows"])
    assert contents(trained) == before


def test_an_older_generation_is_refused(trained):
    before = contents(trained)
    late = trained.adoption(0)
    trained.place(trained.owners)
    trained.generation = 1
    for message in (late, trained.adoption(0)):
        with pytest.raises(InvalidArgument, match="generation 1 is older than this shard's 2"):
            trained.services[0].adopt(message)
    assert contents(trained) == before


def test_a_newer_generation_keeps_what_stays_and_drops_what_goes(trained):
    before = contents(trained)
    mine = np.flatnonzero(trained.owners == 0).tolist()
    keep = [*mine[:2], mine[-1]]
    trained.place([0 if n in keep else -1 for n in range(17)])
    assert contents(trained) == {n: before[n] for n in keep}
    shard = trained.shards[0]
    assert sum(len(t.owned) for t in (*shard.tables, *shard.dense)) == len(keep)
    # Given again, a block that was dropped starts anew.
    trained.place([0] * 17)
    gone = mine[2]
    assert (trained.shards[0].marks.of_block(gone), int(shard.sequence[gone])) == ({}, 0)


def test_a_newer_generation_of_the_same_blocks_needs_no_checkpoint(trained, tmp_path):
    """The run began from a cut that is collected by now; a coordinator is started again while a table goes back."""
    path = checkpoint(trained, tmp_path)
    again = rig.Job(SPEC, shards=3, run=2).place(restore=str(path))
    before = contents(again)
    shutil.rmtree(path)
    again.place(again.owners, restore=str(path))
    assert contents(again) == before
    assert {s.generation for s in again.shards.values()} == {again.generation}


def test_a_placement_that_does_not_fit_the_job_changes_nothing(trained):
    before = contents(trained)
    order = trained.adoption(0)
    order.placement.generation = 9
    order.placement.owners.shape[0] = 16
    order.placement.owners.data = order.placement.owners.data[:64]
    with pytest.raises(PSError, match="names 16 blocks, the job has 17"):
        trained.services[0].adopt(order)
    assert contents(trained) == before
    assert trained.shards[0].generation == 1


def test_closed_splits_come_with_the_placement():
    job = rig.Job(SPEC, shards=1).place(closed=ClosedSet(2, [4]).pack())
    train(job, np.random.default_rng(0), splits=(0, 1, 4, 5))
    assert job.shards[0].next_groups([0, 1, 4, 5]) == [0, 0, 0, 3]
    job.place(job.owners, closed=ClosedSet(0, [5]).pack())
    assert job.shards[0].closed == ClosedSet(2, [4, 5])
    assert job.shards[0].next_groups([5]) == [0]


def test_pulls_and_pushes_during_an_order_see_whole_blocks_only(trained, tmp_path, monkeypatch):
    """While blocks are created and filled, they are not yet here."""
    path = checkpoint(trained, tmp_path)
    again = rig.Job(SPEC, shards=1)
    seen = []
    real = LocalStore.load_block

    def load(store, manifest, entry, *, checked=False):
        with pytest.raises(StalePlacement):
            again.services[0].pull(request)
        seen.append(entry)
        return real(store, manifest, entry)

    keyset = rig.group_keys(trained.layout, trained.routes(), "user", [1])
    keys = TableKeys(keys=pack(keyset.keys), blocks=pack(keyset.blocks), counts=pack(keyset.counts))
    request = PullRequest(header=again.header(0), tables=[keys])
    monkeypatch.setattr(LocalStore, "load_block", load)
    again.place(restore=str(path))
    assert len(seen) == 17
    assert len(again.services[0].pull(request).rows) == 1
