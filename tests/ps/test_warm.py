# SPDX-License-Identifier: Apache-2.0
"""Warm start on shards: every converted row beside plain numpy, on any number of shards and whatever the files are cut into."""

from dataclasses import replace

import numpy as np
import pytest
import rig

from oarlock.checkpoint.block_file import BlockImage
from oarlock.checkpoint.manifest import ClosedSet, Manifest
from oarlock.checkpoint.store import LocalStore
from oarlock.client.warm import WarmStart
from oarlock.embedding.hashing import blocks_of, table_salt
from oarlock.embedding.make import make_table
from oarlock.embedding.policy import Eviction
from oarlock.embedding.spec import CacheSpec, DenseSpec, Initializer, OptimizerSpec, Part, TableSpec, to_json
from oarlock.proto.errors import CorruptCheckpoint, NotFound, SpecMismatch
from oarlock.ps.view import image_of
from oarlock.ps.warm import counter_names, first_values, scales

ADAM, ADAGRAD, SGD, FTRL = (OptimizerSpec(name) for name in ("adam", "adagrad", "sgd", "ftrl"))
NORMAL = Initializer("normal", 0.5, 2.0)
COUNTED = {"eviction": Eviction(occurrences=1, age=1000, score=0.5)}
USER = TableSpec("user", 4, ADAM, NORMAL, blocks=4)
KEYS = 300


def columns_of(spec):
    return {"sgd": 0, "adagrad": spec.dim, "ftrl": 2 * spec.dim, "adam": 2 * spec.dim + 1}[spec.optimizer.name]


class Written:
    """A checkpoint of one table and one dense parameter, of random rows."""

    def __init__(self, root, rng, spec=USER, dense=None, *, job="a" * 32):
        self.spec = spec
        self.dense_spec = dense or DenseSpec("w", (5, 3), ADAM, slice=4)
        self.store = LocalStore(root)
        self.keys = np.sort(rng.choice(1 << 40, KEYS, replace=False).astype(np.uint64))
        self.weights = (rng.standard_normal((KEYS, spec.dim)) * 10 ** rng.uniform(-3, 3, (KEYS, 1))).astype(np.float32)
        columns = sum(columns_of(TableSpec(spec.name, p.width, p.optimizer)) for p in spec.all_parts)
        self.state = rng.random((KEYS, columns), np.float32)
        self.counters = np.zeros((KEYS, len(counter_names(spec))), np.uint32)
        for column, name in enumerate(counter_names(spec)):
            values = rng.integers(1, 99, KEYS).astype(np.uint32)
            if name in ("shows", "clicks"):
                values = values.astype(np.float32).view(np.uint32)
            self.counters[:, column] = values % 2 if name == "expanded" else values
        if spec.expand_score:
            self.weights[self.counters[:, -1] == 0, spec.parts[0].width :] = 0
        where = np.empty(KEYS, np.int32)
        blocks_of(self.keys, table_salt(spec.name), spec.blocks.bit_length() - 1, where)
        entries = []
        for block in range(spec.blocks):
            at = where == block
            state = self.state[at]
            if spec.dtype == "int8":
                state = np.concatenate([state, scales(self.weights[at])[:, None]], 1)
            counters = self.counters[at] if self.counters.size else np.zeros((0, 0), np.uint32)
            image = BlockImage("rows", spec.name, block, 9, {2: 5}, self.keys[at], self.weights[at], state, counters)
            entries.append(self.store.write_block(3, image))
        self.dense = rng.standard_normal(self.dense_spec.size).astype(np.float32)
        self.dense_state = {}
        for block in range(self.dense_spec.blocks):
            part = self.dense[block * self.dense_spec.slice : (block + 1) * self.dense_spec.slice]
            columns = {"sgd": 0, "adam": 2 * len(part) + 1}[self.dense_spec.optimizer.name]
            self.dense_state[block] = rng.random((1, columns), np.float32)
            image = BlockImage(
                "dense", "w", block, 9, {2: 5}, np.empty(0, np.uint64), part[None], self.dense_state[block]
            )
            entries.append(self.store.write_block(3, image))
        self.manifest = Manifest(
            job=job,
            run=4,
            cut=3,
            created="2026-01-31T12:00:00Z",
            seed=77,
            tables=(to_json(spec),),
            dense=(to_json(self.dense_spec),),
            recipe="none:none",
            config={},
            files=(),
            closed=ClosedSet(2),
            open_splits=(2,),
            epoch=1,
            step=40,
            metrics={},
            best={},
            blocks=tuple(entries),
        )
        self.store.commit(self.manifest)
        self.path = f"{root}/cut-000003"


def begin(written, spec, *, shards=2, dense=None, **warm):
    """Return a job whose table ``spec`` begins with the only one of ``written``, and its rows in order of key."""
    chosen = {"tables": {spec.name: written.spec.name}, **warm}
    dense = dense or DenseSpec("w", (5, 3), ADAM, slice=4)
    job_spec = rig.spec_of(tables=(spec,), dense=(dense,), warm_start=WarmStart(written.path, **chosen), servers=shards)
    return rig.Job(job_spec, shards=shards).place()


def test_counters_are_those_of_a_table():
    for spec in (USER, replace(USER, cache=CacheSpec(rows=10), **COUNTED), replace(USER, usage=True)):
        assert len(counter_names(spec)) == make_table(spec, seed=1).counters
    parts = (Part(1, ADAM), Part(3, ADAGRAD))
    spec = TableSpec("user", 4, blocks=4, parts=parts, expand_score=1.0)
    assert len(counter_names(spec)) == make_table(spec, seed=1).counters


def rows_in(job):
    """Return keys, weights, state and counters of all rows of the first table, in order of key."""
    images = [
        image_of(s, n) for s in job.shards.values() for n in np.flatnonzero(s.owned[: job.layout.dense_base]).tolist()
    ]
    for image in images:
        assert (image.seq, image.marks, len(image.waiting), image.sketch) == (0, {}, 0, b"")
    keys = np.concatenate([i.keys for i in images])
    order = np.argsort(keys)
    rest = (np.concatenate([getattr(i, name) for i in images])[order] for name in ("weights", "state", "counters"))
    return keys[order], *rest


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("blocks", [1, 4, 16])
@pytest.mark.parametrize("name", ["user", "member"])
def test_keys_keep_their_rows_whatever_the_blocks_the_shards_and_the_name(tmp_path, rng, shards, blocks, name):
    written = Written(tmp_path / "c", rng)
    keys, weights, state, counters = rows_in(begin(written, replace(USER, name=name, blocks=blocks), shards=shards))
    assert keys.tolist() == written.keys.tolist()
    assert weights.tobytes() == written.weights.tobytes()
    assert state.tobytes() == written.state.tobytes()
    assert counters.size == 0


def test_never_seen_keys_read_as_in_a_job_that_began_cold(tmp_path, rng):
    job = begin(Written(tmp_path / "c", rng), USER)
    never = np.arange(10, dtype=np.uint64) + (1 << 50)
    cold = rig.Job(rig.spec_of(tables=(USER,), dense=(DenseSpec("w", (5, 3), ADAM, slice=4),)), shards=1).place()
    assert job.rows("user", never).tobytes() == cold.rows("user", never).tobytes()
    assert first_values(USER, job.spec.seed, never).tobytes() == cold.rows("user", never).tobytes()


@pytest.mark.parametrize(("optimizer", "begins"), [(ADAGRAD, ADAGRAD.initial), (SGD, 0.0), (FTRL, 0.0)])
def test_another_optimizer_keeps_weights_and_begins_its_state_anew(tmp_path, rng, optimizer, begins):
    written = Written(tmp_path / "c", rng)
    spec = replace(USER, optimizer=optimizer)
    _, weights, state, _ = rows_in(begin(written, spec))
    assert weights.tobytes() == written.weights.tobytes()
    assert state.shape == (KEYS, columns_of(spec))
    assert (state == np.float32(begins)).all()


def test_other_constants_of_an_optimizer_change_no_row(tmp_path, rng):
    written = Written(tmp_path / "c", rng)
    _, _, state, _ = rows_in(begin(written, replace(USER, optimizer=replace(ADAM, beta1=0.5, clip_norm=1.0))))
    assert state.tobytes() == written.state.tobytes()


def test_parts_are_compared_one_by_one(tmp_path, rng):
    old = TableSpec("user", 5, blocks=4, parts=(Part(2, ADAM), Part(3, ADAGRAD)))
    written = Written(tmp_path / "c", rng, old)
    _, weights, state, _ = rows_in(begin(written, replace(old, parts=(Part(2, ADAM), Part(3, SGD)))))
    assert weights.tobytes() == written.weights.tobytes()
    assert state.tobytes() == np.ascontiguousarray(written.state[:, :5]).tobytes()
    _, _, state, _ = rows_in(begin(written, replace(old, parts=(Part(2, ADAGRAD), Part(3, ADAGRAD)))))
    assert (state[:, :2] == np.float32(ADAGRAD.initial)).all()
    assert state[:, 2:].tobytes() == np.ascontiguousarray(written.state[:, 5:]).tobytes()
    # Cut elsewhere: nothing of the state fits.
    _, weights, state, _ = rows_in(begin(written, replace(old, parts=(Part(3, ADAM), Part(2, ADAGRAD)))))
    assert weights.tobytes() == written.weights.tobytes()
    assert (state[:, :7] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_another_dtype_is_rounded_to_nearest(tmp_path, rng, dtype):
    written = Written(tmp_path / "c", rng)
    _, weights, state, _ = rows_in(begin(written, replace(USER, dtype=dtype)))
    if dtype == "float16":
        expected = written.weights.astype(np.float16).astype(np.float32)
    elif dtype == "bfloat16":
        bits = written.weights.view(np.uint32).astype(np.uint64)
        expected = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    else:
        scale = np.abs(written.weights).max(1) / np.float32(127)
        expected = np.rint(written.weights / scale[:, None]).astype(np.float32) * scale[:, None]
        assert state[:, -1].tobytes() == scale.tobytes()
        state = np.ascontiguousarray(state[:, :-1])
    assert weights.tobytes() == expected.tobytes()
    assert state.tobytes() == written.state.tobytes()


def test_a_dtype_that_is_left_comes_as_it_is(tmp_path, rng):
    written = Written(tmp_path / "c", rng, replace(USER, dtype="int8"))
    _, weights, state, _ = rows_in(begin(written, USER))
    assert weights.tobytes() == written.weights.tobytes()
    assert state.tobytes() == written.state.tobytes()


def test_what_a_dtype_cannot_hold_becomes_its_largest(tmp_path, rng):
    written = Written(tmp_path / "c", rng)
    written.weights[0] = [1e30, -1e30, 1e-30, 7.0]
    image = BlockImage("rows", "user", 0, 9, {}, written.keys[:1], written.weights[:1], written.state[:1])
    from oarlock.ps.warm import Converter

    converter = Converter(USER, replace(USER, dtype="int8"), 7)
    rows = converter.rows(image, np.array([0]))
    assert np.isfinite(rows.state).all()
    assert rows.state[0, -1] == np.float32(1e30) / np.float32(127)


@pytest.mark.parametrize(("dim", "dimension"), [(2, "truncate"), (7, "pad")])
def test_another_dim_is_converted_when_asked_for(tmp_path, rng, dim, dimension):
    written = Written(tmp_path / "c", rng)
    spec = replace(USER, dim=dim)
    with pytest.raises(SpecMismatch, match=f'has dim {dim}, user in the checkpoint 4: give dimension = "{dimension}"'):
        begin(written, spec)
    wrong = "pad" if dimension == "truncate" else "truncate"
    with pytest.raises(SpecMismatch, match=f'give dimension = "{dimension}"'):
        begin(written, spec, dimension=wrong)
    job = begin(written, spec, dimension=dimension)
    keys, weights, state, _ = rows_in(job)
    same = min(dim, 4)
    assert weights[:, :same].tobytes() == np.ascontiguousarray(written.weights[:, :same]).tobytes()
    assert (
        weights[:, same:].tobytes() == np.ascontiguousarray(first_values(spec, job.spec.seed, keys)[:, same:]).tobytes()
    )
    assert dimension == "truncate" or len(np.unique(weights[:, same:])) > KEYS, "first values, not zeros"
    assert (state == 0).all()


def test_counts_are_kept_and_steps_begin_anew(tmp_path, rng):
    old = replace(USER, cache=CacheSpec(rows=10), **COUNTED)
    assert counter_names(old) == ["occurrences", "updated", "shows", "clicks", "version"]
    written = Written(tmp_path / "c", rng, old)
    _, _, _, counters = rows_in(begin(written, old))
    expected = written.counters.copy()
    expected[:, [1, 4]] = 0
    assert counters.tobytes() == expected.tobytes()
    # A table that keeps less takes less, and one that keeps more begins at nothing.
    _, _, _, counters = rows_in(begin(written, replace(USER, usage=True)))
    assert counters.tobytes() == np.ascontiguousarray(expected[:, :2]).tobytes()
    _, _, _, counters = rows_in(begin(Written(tmp_path / "d", rng), replace(USER, **COUNTED)))
    assert (counters.shape, int(counters.sum())) == ((KEYS, 4), 0)


def test_rows_that_grow(tmp_path, rng):
    parts = (Part(1, ADAM), Part(3, ADAGRAD, NORMAL))
    plain = TableSpec("user", 4, blocks=4, parts=parts)
    grows = replace(plain, expand_score=1.0)
    written = Written(tmp_path / "c", rng, grows)
    grown = written.counters[:, -1] == 1
    assert 0 < grown.sum() < KEYS
    _, weights, _, counters = rows_in(begin(written, grows))
    assert weights.tobytes() == written.weights.tobytes()
    assert counters[:, -1].tolist() == grown.astype(int).tolist()
    # Into a table of whole rows: what had not grown is as in a new row.
    job = begin(written, plain)
    keys, weights, state, counters = rows_in(job)
    expected = written.weights.copy()
    expected[~grown, 1:] = first_values(plain, job.spec.seed, keys)[~grown, 1:]
    assert weights.tobytes() == expected.tobytes()
    assert (state[~grown, 3:] == np.float32(ADAGRAD.initial)).all()
    assert state[grown].tobytes() == written.state[grown].tobytes()
    assert counters.size == 0
    # And from whole rows: all have grown.
    whole = Written(tmp_path / "d", rng, plain)
    _, weights, _, counters = rows_in(begin(whole, grows))
    assert weights.tobytes() == whole.weights.tobytes()
    assert (counters[:, -1] == 1).all()


@pytest.mark.parametrize(("slice_", "optimizer", "kept"), [(4, ADAM, True), (6, ADAM, False), (4, SGD, False)])
@pytest.mark.parametrize("shards", [1, 2])
def test_dense_parameters(tmp_path, rng, slice_, optimizer, kept, shards):
    written = Written(tmp_path / "c", rng)
    spec = DenseSpec("bias", (5, 3), optimizer, slice=slice_)
    job = begin(written, replace(USER, name="other"), dense=spec, shards=shards, tables={})
    assert job.dense().tobytes() != written.dense.tobytes()
    warm = {"tables": {}, "dense": {"bias": "w"}}
    job_spec = rig.spec_of(tables=(USER,), dense=(spec,), warm_start=WarmStart(written.path, **warm))
    job = rig.Job(job_spec, shards=shards).place()
    assert job.dense().tobytes() == written.dense.tobytes()
    for block in range(spec.blocks):
        number = job.layout.dense_base + block
        image = image_of(job.shards[int(job.owners[number])], number)
        assert (image.seq, image.marks) == (0, {})
        if kept:
            assert image.state.tobytes() == written.dense_state[block].tobytes()
        else:
            assert not image.state.any()


def test_a_restore_takes_the_cut_and_not_the_warm_start_again(tmp_path, rng):
    written = Written(tmp_path / "c", rng)
    job = begin(written, USER, shards=1)
    other = rig.Job(job.spec, shards=1)
    other.place(restore=written.path)
    assert image_of(other.shards[0], 0).seq == 9


def test_what_is_not_there_or_is_damaged_leaves_the_shard_as_it_was(tmp_path, rng):
    written = Written(tmp_path / "c", rng)
    with pytest.raises(NotFound, match="has no table 'usr'; did you mean 'user'"):
        begin(written, USER, tables={"user": "usr"})
    file = next((tmp_path / "c" / "cut-000003").glob("rows-*"))
    file.write_bytes(file.read_bytes()[:-5])
    job_spec = rig.spec_of(
        tables=(USER,),
        dense=(DenseSpec("w", (5, 3), ADAM, slice=4),),
        warm_start=WarmStart(written.path, {"user": "user"}),
    )
    job = rig.Job(job_spec, shards=1)
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        job.place()
    assert not job.shards[0].owned.any()
    assert job.shards[0].tables[0].rows == 0
