# SPDX-License-Identifier: Apache-2.0
"""A table of a shard goes back to a cut in the midst of training: exactly, once, and nothing else does."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Event

import numpy as np
import pytest
import rig

from oarlock.checkpoint.manifest import BlockEntry, ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.embedding.spec import CacheSpec, DenseSpec, Initializer, OptimizerSpec, TableSpec, to_json
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, LeaseLost, NotFound, SpecMismatch
from oarlock.proto.shard_pb2 import ReplaceRequest
from oarlock.ps.view import image_of

ADAGRAD = OptimizerSpec("adagrad")
TABLES = (
    TableSpec("user", 2, ADAGRAD, Initializer("normal"), blocks=8),
    TableSpec("item", 3, ADAGRAD, blocks=4, cache=CacheSpec(rows=10, bound=1)),
)
DENSE = (DenseSpec("w", (3, 3), ADAGRAD, slice=4),)
SPEC = rig.spec_of(tables=TABLES, dense=DENSE, servers=2)


@pytest.fixture
def job():
    return rig.Job(SPEC, shards=1).place()


def push(job, split, group, *, raw=tuple(range(40)), value=1.0, **header):
    request = rig.request_of(job, split, group, raw=raw, value=value)
    request.header.CopyFrom(job.header(0, **header))
    return job.services[0].push(request)


def commit(job, root, cut, tables=TABLES):
    """Write a cut and commit it; return its path and the entries."""
    reply = job.write(0, cut, root)
    entries = [BlockEntry(**e) for e in json.loads(reply.entries)]
    manifest = Manifest(
        job=rig.JOB,
        run=1,
        cut=cut,
        created=datetime.now(UTC).isoformat(),
        seed=SPEC.seed,
        tables=tuple(to_json(t) for t in tables),
        dense=tuple(to_json(d) for d in DENSE),
        recipe="none:none",
        config={},
        files=(),
        closed=ClosedSet(),
        open_splits=(),
        epoch=0,
        step=0,
        metrics={},
        best={},
        blocks=tuple(entries),
    )
    LocalStore(root).commit(manifest)
    return f"{root}/cut-{cut:06d}", entries


def replace(job, path, number=0, *, table="user", workers=(9,), generation=5):
    request = ReplaceRequest(
        header=job.header(0),
        table=table,
        path=path,
        number=number,
        workers=workers,
        generation=generation if number else 0,
    )
    rows = job.services[0].replace(request).rows
    job.cut = max(job.cut, number)
    return rows


def contents(job, table):
    """Return (keys, weights, state, counters) by block, in order of key."""
    shard, base = job.shards[0], job.layout.table_base[job.layout.table_index[table]]
    out = {}
    for block in range(job.layout.tables[job.layout.table_index[table]].blocks):
        image = image_of(shard, base + block)
        order = np.argsort(image.keys)
        out[block] = [np.asarray(a)[order].tobytes() for a in (image.keys, image.weights, image.state)]
    return out


def test_the_table_goes_back_and_all_else_goes_on(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    saved = contents(job, "user")
    push(job, 0, 1, raw=range(60), value=3.0)
    item, dense, sequence = contents(job, "item"), job.dense().tobytes(), job.shards[0].sequence.copy()
    assert contents(job, "user") != saved
    assert replace(job, path) == 40
    assert contents(job, "user") != saved, "only read so far"
    assert replace(job, path, 2) == 40
    assert contents(job, "user") == saved
    assert (contents(job, "item"), job.dense().tobytes()) == (item, dense)
    shard = job.shards[0]
    users = slice(job.layout.table_base[0], job.layout.table_base[0] + 8)
    assert (shard.sequence[users] == sequence[users] + 1).all(), "an operation of each block"
    assert (np.delete(shard.sequence, np.r_[users]) == np.delete(sequence, np.r_[users])).all()
    assert shard.next_groups([0]) == [2], "marks stay"
    assert shard.generation == 5


def test_groups_of_before_are_not_applied_again_and_later_ones_once(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    push(job, 0, 1, value=3.0)
    replace(job, path)
    replace(job, path, 2)
    saved = contents(job, "user")
    for group in (0, 1):
        reply = push(job, 0, group, value=3.0)
        assert reply.applied == 0
    assert contents(job, "user") == saved
    push(job, 0, 2, value=0.5)
    push(job, 0, 2, value=0.5)
    other = rig.Job(SPEC, shards=1).place()
    push(other, 0, 0)
    push(other, 0, 2, value=0.5)
    assert contents(job, "user") == contents(other, "user"), "as if group 1 had never been"


def test_the_same_order_again_is_answered_and_not_done_again(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    replace(job, path)
    assert replace(job, path, 2) == 40
    push(job, 0, 1)
    before, sequence = contents(job, "user"), job.shards[0].sequence.copy()
    assert replace(job, path, 2) == 40
    assert contents(job, "user") == before
    assert (job.shards[0].sequence == sequence).all()
    # Another attempt has another number: it goes back again, once it was read again.
    with pytest.raises(InvalidArgument, match="were not read before"):
        replace(job, path, 3)
    replace(job, path)
    replace(job, path, 3)
    assert contents(job, "user") != before
    with pytest.raises(InvalidArgument, match=r"cut 3 is the newest|were not read"):
        replace(job, path, 2)


def test_the_next_increment_knows_that_all_has_changed(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    push(job, 0, 1, raw=range(60))
    commit(job, tmp_path, 2)
    replace(job, path)
    replace(job, path, 3)
    views = job.services[0]._cutting._views
    views._committed = views._last
    _, entries = commit(job, tmp_path, 4)
    user = [e for e in entries if e.name == "user"]
    assert all(not e.base and e.folder == "cut-000004" for e in user), "whole files"
    store = LocalStore(tmp_path)
    manifest = store.load_manifest(4)
    written = {e.block: store.load_block(manifest, e) for e in manifest.blocks if e.name == "user"}
    assert sum(len(image.keys) for image in written.values()) == 40
    for block, image in written.items():
        assert contents(job, "user")[block][:2] == [image.keys.tobytes(), image.weights.tobytes()]


def test_what_is_asked_for_while_it_happens_is_read_again(job, tmp_path, monkeypatch):
    """A coordinator dies while a shard carries out its order; the next one has all shards read before it decides anew."""
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    replace(job, path)
    table, begun, go_on = job.shards[0].tables[0], Event(), Event()
    put = table.import_block

    def import_block(*arguments, **options):
        begun.set()
        assert go_on.wait(10)
        return put(*arguments, **options)

    monkeypatch.setattr(table, "import_block", import_block)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(replace, job, path, 2)
        assert begun.wait(10)
        waits = job.services[0]._replacing._reading.locked()
        again = pool.submit(replace, job, path)
        if not waits:
            again.result()
        go_on.set()
        assert (first.result(), again.result()) == (40, 40)
    assert replace(job, path, 3) == 40


def test_a_push_of_before_its_gate(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    replace(job, path)
    replace(job, path, 2)
    with pytest.raises(LeaseLost, match="before cut 2"):
        push(job, 0, 1, sender=8, cut=1)
    assert push(job, 0, 1, sender=9, cut=1).applied > 0


def test_a_gate_that_was_given_up_or_passed_over_changes_nothing(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 5)
    push(job, 0, 1)
    before = contents(job, "user")
    replace(job, path)
    with pytest.raises(InvalidArgument, match="cut 5 is the newest one here"):
        replace(job, path, 4)
    assert contents(job, "user") == before


def test_what_cannot_be_read_changes_nothing(job, tmp_path):
    push(job, 0, 0)
    path, entries = commit(job, tmp_path, 1)
    push(job, 0, 1)
    before = contents(job, "user")
    for table, where, error, match in (
        ("usr", path, NotFound, "no table 'usr'; did you mean 'user'"),
        ("user", str(tmp_path / "cut-000009"), NotFound, "no committed cut 9"),
        ("user", "relative", InvalidArgument, "give an absolute path"),
    ):
        with pytest.raises(error, match=match):
            replace(job, where, table=table)
    entry = next(e for e in entries if e.name == "user")
    file = tmp_path / "cut-000001" / entry.file
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        replace(job, path)
    with pytest.raises(InvalidArgument, match="were not read before"):
        replace(job, path, 2)
    assert contents(job, "user") == before
    assert push(job, 0, 2).applied > 0


def test_rows_of_another_kind_are_refused(job, tmp_path):
    other = rig.Job(
        rig.spec_of(tables=(TableSpec("user", 4, ADAGRAD, blocks=8), TABLES[1]), dense=DENSE), shards=1
    ).place()
    path, _ = commit(other, tmp_path, 1, tables=other.spec.tables)
    with pytest.raises(SpecMismatch, match=r"has a table of dim 4 .* this job has a table of dim 2"):
        replace(job, path)


def test_jobs_of_steps_refuse_it():
    spec = rig.spec_of(tables=TABLES[:1], dense=DENSE, mode="sync", ranks=2)
    job = rig.Job(spec, shards=1).place()
    with pytest.raises(InvalidArgument, match="mode sync and the roll back of one table contradict each other"):
        replace(job, "/somewhere/cut-000001")


def test_a_cut_begun_meanwhile_lets_go_what_was_read(job, tmp_path):
    push(job, 0, 0)
    path, _ = commit(job, tmp_path, 1)
    replace(job, path)
    commit(job, tmp_path, 2)
    with pytest.raises(InvalidArgument, match="were not read before"):
        replace(job, path, 3)


def test_the_digest_of_a_view_is_that_of_its_files_whatever_is_pushed_since(job, tmp_path):
    from oarlock.cli.digest import digest_of
    from oarlock.proto.shard_pb2 import AbortRequest, CutRequest, DigestRequest

    push(job, 0, 0)
    service = job.services[0]
    path, _ = commit(job, tmp_path, 1)
    store = LocalStore(tmp_path)
    expected = digest_of(store, store.load_manifest(1)).value
    service.cut(CutRequest(header=job.header(0), cut=2, workers=[9], committed=1))
    job.cut = 2
    push(job, 0, 1, raw=range(60), value=3.0)
    replace(job, path)
    for _ in range(2):
        reply = service.digest(DigestRequest(header=job.header(0), cut=2))
        assert (int.from_bytes(reply.digest, "big"), reply.rows, reply.torn) == (expected, 80, False)
    service.abort(AbortRequest(header=job.header(0), cut=2))
    with pytest.raises(InvalidArgument, match="no view of cut 2"):
        service.digest(DigestRequest(header=job.header(0), cut=2))
    service.cut(CutRequest(header=job.header(0), cut=3, workers=[9], committed=1))
    push(job, 0, 2, sender=9, cut=2)
    assert service.digest(DigestRequest(header=job.header(0), cut=3)).torn
