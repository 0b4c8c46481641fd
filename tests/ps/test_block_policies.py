# SPDX-License-Identifier: Apache-2.0
"""Blocks of tables with policies, written, restored and moved: counters, waiting keys, sketches and cold rows come along."""

import dataclasses
import json

import numpy as np
import pytest
import rig

from oarlock.checkpoint.manifest import BlockEntry
from oarlock.checkpoint.store import LocalStore
from oarlock.client.push import PushIdentity, RowGradients, cut_push
from oarlock.embedding.spec import Admission, CacheSpec, Eviction, Guard, Initializer, OptimizerSpec, Part, TableSpec
from oarlock.proto.errors import Malformed, SpecMismatch
from tests.conftest import load_shared

shared = load_shared("ps/test_blocks.py", "_blocks")

ADAM, ADAGRAD, SGD = OptimizerSpec("adam"), OptimizerSpec("adagrad"), rig.SGD
PARTS = (Part(1, ADAGRAD), Part(3, ADAM, Initializer("uniform", scale=0.5)))
EVERYTHING = Eviction(age=50, occurrences=1, score=0.01)
TABLES = {
    "float16": TableSpec("user", 3, ADAM, blocks=4, dtype="float16", usage=True),
    "bfloat16": TableSpec("user", 3, ADAM, blocks=4, dtype="bfloat16"),
    "int8": TableSpec("user", 3, ADAGRAD, blocks=4, dtype="int8", eviction=EVERYTHING),
    "parts": TableSpec("user", 4, parts=PARTS, blocks=4, eviction=EVERYTHING, guard=Guard(undo=2)),
    "count": TableSpec("user", 2, ADAM, blocks=4, admission=Admission("count", occurrences=3)),
    "sketch": TableSpec("user", 2, SGD, blocks=4, admission=Admission("sketch", occurrences=3, capacity=400)),
    "score": TableSpec("user", 2, SGD, blocks=4, admission=Admission("score", click=0.5)),
    "spill": TableSpec("user", 8, ADAM, blocks=4, memory_bytes=1, usage=True),
    "expanding": TableSpec("user", 4, parts=PARTS, blocks=4, expand_score=0.4),
    "cached": TableSpec("user", 2, ADAM, blocks=4, cache=CacheSpec(100, 3)),
}


def job_of(table, shards=1):
    return rig.Job(rig.spec_of(tables=(table,), dense=()), shards=shards)


def train(job, rng, groups, *, keys=600, count=250):
    table = job.layout.tables[0]
    for group in groups:
        keyset = rig.group_keys(job.layout, job.routes(), "user", rng.choice(keys, count, replace=False))
        # By key: on another number of shards they stand in another order.
        values = rng.standard_normal((keys, table.dim)).astype(np.float32)
        beside = rng.integers(1, 3, keys, np.uint32), rng.integers(0, 2, keys).astype(np.float32)
        part = RowGradients(keyset, values[keyset.keys.astype(int)], 0.1, *(v[keyset.keys.astype(int)] for v in beside))
        for message in cut_push(
            job.layout, job.routes(), PushIdentity(3, group, step=group), {"user": part}, None, 0.1
        ):
            message.request.header.CopyFrom(job.header(message.shard.id))
            job.services[message.shard.id].push(message.bulk)


def checkpoint(job, root, table):
    return shared.checkpoint(job, root, tables=(table,), dense=())


def close(*jobs):
    for job in jobs:
        for service in job.services.values():
            service.end()


@pytest.mark.parametrize("name", TABLES)
def test_a_job_that_was_restored_goes_on_as_the_one_that_never_stopped(name, tmp_path):
    """Bit for bit, on another number of shards: whatever was lost on the way would show in what the same pushes do."""
    table = TABLES[name]
    one, rng = job_of(table).place(), np.random.default_rng(1)
    train(one, rng, range(6))
    path = checkpoint(one, tmp_path, table)
    two = job_of(table, shards=2).place(restore=str(path))
    assert shared.contents(two) == shared.contents(one)
    seed = rng.integers(1 << 40)
    for job in (one, two):
        train(job, np.random.default_rng(seed), range(6, 12))
    after = shared.contents(one)
    assert shared.contents(two) == after
    # Another cut after it, and back on one shard.
    three = job_of(table).place(restore=str(checkpoint(two, tmp_path / "later", table)))
    assert shared.contents(three) == after
    assert three.shards[0].stats()["rows"] > 0
    for what in ("waiting", "spilled"):
        known = {"count": "waiting", "spill": "spilled"}.get(name)
        assert (what in one.shards[0].stats()) == (what == known)
    close(one, two, three)


@pytest.mark.parametrize("name", TABLES)
def test_a_block_that_moves_takes_all_of_it_along(name):
    table = TABLES[name]
    job = job_of(table, shards=2).place()
    train(job, np.random.default_rng(2), range(4))
    before = shared.contents(job)
    for number in range(4):
        job.move(number, 1 - int(job.owners[number]))
    assert shared.contents(job) == before
    close(job)


def test_second_files_are_named_by_the_manifest(tmp_path):
    for name, table in TABLES.items():
        job = job_of(table).place()
        train(job, np.random.default_rng(3), range(2))
        reply = job.write(0, 1, tmp_path / name)
        entries = [BlockEntry(**e) for e in json.loads(reply.entries)]
        assert [bool(e.waiting_bytes) for e in entries] == [name in ("count", "sketch")] * 4
        close(job)


ADMITTED = TABLES["count"]
REFUSED = {
    "another dtype": (TABLES["float16"], {"dtype": "bfloat16"}, "stored as float16, keeping .* stored as bfloat16"),
    "no dtype": (TABLES["bfloat16"], {"dtype": "float32"}, "under adam, stored as bfloat16, this job wants .* adam: "),
    "other parts": (
        TABLES["parts"],
        {"parts": (Part(2, ADAGRAD), Part(2, ADAM))},
        "in parts of 1 under adagrad and 3 under adam.*wants .* 2 under adagrad and 2 under adam",
    ),
    "another optimizer of a part": (TABLES["parts"], {"parts": (Part(1, SGD), PARTS[1])}, "wants .* 1 under sgd and 3"),
    "no parts": (TABLES["parts"], {"parts": (), "optimizer": ADAM}, "wants a table of dim 4 in 4 blocks under adam"),
    "more counters": (
        TABLES["bfloat16"],
        {"eviction": Eviction(age=5)},
        "this job wants .* keeping steps of last updates",
    ),
    "versions of rows": (TABLES["bfloat16"], {"cache": CacheSpec(9)}, "this job wants .* keeping versions of rows"),
    "no versions of rows": (TABLES["cached"], {"cache": None}, "has .* keeping versions of rows, this job wants"),
    "fewer counters": (TABLES["score"], {"admission": Admission()}, "has .* keeping shows and clicks, this job wants"),
    "no admission": (
        ADMITTED,
        {"admission": Admission(), "usage": False},
        "keeping occurrences, that counts the keys it does not admit, this job wants",
    ),
    "another admission": (
        ADMITTED,
        {"admission": Admission("sketch", occurrences=3)},
        "that counts the keys .* wants .* sketches the keys it does not admit, 10000000 in each of 4 windows",
    ),
    "another sketch": (
        TABLES["sketch"],
        {"admission": Admission("sketch", occurrences=3, capacity=401)},
        "400 in each of 4 windows, this job wants .* 401 in each of 4",
    ),
    "rows that expand": (TABLES["expanding"], {"expand_score": 0.0}, "whose rows expand, this job wants"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_rows_depend_on_cannot_change_at_a_restore(name, tmp_path):
    table, changes, text = REFUSED[name]
    job = job_of(table).place()
    train(job, np.random.default_rng(4), range(2))
    path = checkpoint(job, tmp_path, table)
    other = job_of(dataclasses.replace(table, **changes))
    with pytest.raises(SpecMismatch, match=f"user: the checkpoint has {text}" if text.startswith("a ") else text):
        other.place(restore=str(path))
    assert not other.shards[0].owned.any()
    close(job, other)


ALLOWED = {
    "thresholds of eviction": ("int8", {"eviction": Eviction(age=7, occurrences=2, norm=0.1, score=0.5, decay=0.5)}),
    "thresholds of admission": ("count", {"admission": Admission("count", occurrences=9)}),
    "a chance": ("bfloat16", {"admission": Admission("probability", probability=0.5)}),
    "undo": ("parts", {"guard": Guard(limit=10.0, sample=3)}),
    "a memory budget": ("spill", {"memory_bytes": 0}),
    "constants": ("float16", {"optimizer": OptimizerSpec("adam", beta1=0.5), "initializer": Initializer("zeros")}),
    "absent": ("bfloat16", {"absent": "zeros"}),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_no_row_depends_on_may_change_at_a_restore(name, tmp_path):
    kind, changes = ALLOWED[name]
    table = TABLES[kind]
    job = job_of(table).place()
    train(job, np.random.default_rng(5), range(3))
    path = checkpoint(job, tmp_path, table)
    other = job_of(dataclasses.replace(table, **changes)).place(restore=str(path))
    assert shared.contents(other) == shared.contents(job)
    train(other, np.random.default_rng(6), range(3, 5))
    close(job, other)


def test_a_sketch_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    table = TABLES["sketch"]
    job = job_of(table).place()
    train(job, np.random.default_rng(7), range(2))
    path = checkpoint(job, tmp_path, table)
    real = LocalStore.load_block

    def load(store, manifest, entry, *, checked=False):
        image = real(store, manifest, entry)
        return dataclasses.replace(image, sketch=image.sketch[:-8]) if entry.block == 3 else image

    other = job_of(table)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "load_block", load)
        with pytest.raises(Malformed, match="a sketch's state of"):
            other.place(restore=str(path))
    assert not other.shards[0].owned.any()
    assert len(other.shards[0].tables[0].owned) == 0
    other.generation = 0
    assert shared.contents(other.place(restore=str(path))) == shared.contents(job)
