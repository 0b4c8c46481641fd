# SPDX-License-Identifier: Apache-2.0
"""What a shard answers to people's tools about single rows, and what it refuses."""

import json

import numpy as np
import pytest
import rig
from rows_rig import RAW, array, ask, job_of, keys_of, train

from oarlock.embedding.policy import Admission
from oarlock.embedding.spec import TableSpec
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack, unpack
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, StalePlacement, UnknownTable
from oarlock.proto.shard_pb2 import EXPLAIN, EXPORT, GET, QUARANTINE, UNDO, TableKeys
from oarlock.ps import rows as shard_rows


@pytest.fixture
def job():
    return job_of()


def present(job, raw, name="user"):
    reply = ask(job, GET, keys_of(job, raw, name))
    return unpack(reply.present, np.int32, "present").tolist()


def exported(job, name="user", **fields):
    number = job.layout.table_index[name]
    found = {}
    for block in range(job.layout.tables[number].blocks):
        least, more = 0, True
        while more:
            reply = ask(job, EXPORT, TableKeys(table=number), block=block, least=least)
            keys = unpack(reply.keys, np.uint64, "keys")
            assert np.all(keys[1:] > keys[:-1])
            weights = unpack(reply.weights, np.float32, "weights", dims=2)
            state = unpack(reply.state, np.float32, "state", dims=2)
            for key, row, columns in zip(keys.tolist(), weights, state, strict=True):
                assert key not in found
                found[key] = (row.tolist(), columns.tolist())
            least, more = reply.next, reply.more
    return found


def test_explanations_are_json_also_of_what_is_no_number(job):
    assert json.loads(json.dumps(shard_rows.plain({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}}))) == {
        "a": ["nan", 1.5],
        "b": {"c": "-inf"},
    }
    (text,) = ask(job, EXPLAIN, keys_of(job, [5])).facts
    assert json.loads(text)["present"] is False


def test_an_export_is_the_whole_table_page_by_page(job, monkeypatch):
    train(job, 0, raw=range(500))
    whole = exported(job)
    assert sorted(whole) == list(range(500))
    rows = job.rows("user", np.arange(500))
    assert all(whole[key][0] == rows[key].tolist() for key in range(500))
    assert all(len(columns) == job.shards[0].tables[0].state_columns for _, columns in whole.values())
    monkeypatch.setattr(shard_rows, "PAGE_BYTES", 100)
    calls = []
    answer = shard_rows.Rows.answer
    monkeypatch.setattr(shard_rows.Rows, "answer", lambda self, r: calls.append(r) or answer(self, r))
    assert exported(job) == whole
    assert len(calls) > 100


def test_a_key_that_is_there_throughout_comes_once_however_the_block_grows(job, monkeypatch):
    monkeypatch.setattr(shard_rows, "PAGE_BYTES", 200)
    train(job, 0, raw=range(0, 4000, 4))
    answer = shard_rows.Rows.answer
    grown = iter(range(1, 200))

    def growing(self, request):
        group = next(grown, None)
        if group is not None:
            train(job, group, raw=range(group * 97, group * 97 + 60))
        return answer(self, request)

    monkeypatch.setattr(shard_rows.Rows, "answer", growing)
    # exported asserts that none comes twice.
    assert set(exported(job)) >= set(range(0, 4000, 4))


def test_the_export_of_keys_leaves_absent_ones_out(job):
    train(job, 0)
    reply = ask(job, EXPORT, keys_of(job, [3, 5, 99]))
    keys = unpack(reply.keys, np.uint64, "keys")
    assert sorted(keys.tolist()) == [3, 5]
    assert np.array_equal(unpack(reply.weights, np.float32, "weights", dims=2), job.rows("user", keys))
    assert not reply.more


def test_waiting_keys_are_no_rows():
    tables = (TableSpec("user", 2, rig.SGD, rig.ZEROS, 4, admission=Admission("count", occurrences=3)),)
    job = job_of(tables=tables)
    train(job, 0, raw=[1, 2])
    assert present(job, [1, 2]) == [0, 0]
    assert exported(job) == {}
    assert len(unpack(ask(job, EXPORT, keys_of(job, [1])).keys, np.uint64, "keys")) == 0
    (text,) = ask(job, EXPLAIN, keys_of(job, [1])).facts
    assert json.loads(text)["admission"] == {"kind": "count", "occurrences": 1, "needed": 3}


def test_an_undo_takes_back_updates_and_is_an_operation_of_the_block(job):
    train(job, 0)
    before, sequence = job.rows("user", RAW), job.shards[0].sequence.copy()
    train(job, 1)
    reply = ask(job, UNDO, keys_of(job, [3, 99]), steps=1, number=5)
    undone = dict(
        zip(
            unpack(keys_of(job, [3, 99]).keys, np.uint64, "k").tolist(),
            unpack(reply.undone, np.int32, "u"),
            strict=True,
        )
    )
    assert undone == {3: 1, 99: 0}
    rows = job.rows("user", RAW)
    assert np.array_equal(rows[3], before[3])
    assert (rows != before).any(axis=1).sum() == 39
    block = json.loads(ask(job, EXPLAIN, keys_of(job, [3])).facts[0])["block"]
    changed = np.flatnonzero(job.shards[0].sequence - sequence == 2)
    assert changed.tolist() == [block]


def test_an_undo_that_is_sent_again_is_done_once(job):
    for group in range(3):
        train(job, group)
    first = ask(job, UNDO, keys_of(job, [3]), steps=1, number=5)
    state = rig.state(job)
    assert ask(job, UNDO, keys_of(job, [3]), steps=1, number=5) == first
    assert rig.state(job) == state
    with pytest.raises(InvalidArgument, match="undo 5 was another one"):
        ask(job, UNDO, keys_of(job, [4]), steps=1, number=5)
    assert rig.state(job) == state
    for number in range(100, 100 + shard_rows.ANSWERS_KEPT):
        ask(job, UNDO, keys_of(job, [1000]), steps=1, number=number)
    assert len(job.services[0]._rows._answers) == shard_rows.ANSWERS_KEPT


REFUSED = {
    "no verb": (lambda j: (0, None, {}), InvalidArgument, "verb 0 of rows: this shard knows 5"),
    "an unknown verb": (lambda j: (6, None, {}), InvalidArgument, "verb 6"),
    "an unknown table": (lambda j: (GET, TableKeys(table=2), {}), UnknownTable, "names table 2, this job has 2"),
    "a page of an unknown table": (lambda j: (EXPORT, TableKeys(table=9), {}), UnknownTable, "names table 9"),
    "an unknown quarantine": (lambda j: (QUARANTINE, TableKeys(table=9), {}), UnknownTable, "names table 9"),
    "too many keys": (
        lambda j: (GET, keys_of(j, range(4097)), {}),
        InvalidArgument,
        "4097 keys asked for, at most 4096",
    ),
    "a block out of range": (lambda j: (EXPORT, None, {"block": 8}), Malformed, "block 8 is outside 0 to 7"),
    "a huge block": (lambda j: (EXPORT, None, {"block": (1 << 32) - 1}), Malformed, "is outside 0 to 7"),
    "a key of another block": (
        lambda j: (
            GET,
            TableKeys(
                keys=pack(array(1, 2)), blocks=pack(np.array([0], np.int32)), counts=pack(np.array([2], np.int32))
            ),
            {},
        ),
        Malformed,
        "does not hash to the block",
    ),
    "an undo without a number": (lambda j: (UNDO, keys_of(j), {"steps": 1}), InvalidArgument, "needs a number"),
    "an undo of nothing": (lambda j: (UNDO, keys_of(j), {"number": 1}), InvalidArgument, "steps = 0: give 1 to 65535"),
    "an undo of too much": (
        lambda j: (UNDO, keys_of(j), {"number": 1, "steps": 65536}),
        InvalidArgument,
        "steps = 65536: give 1 to 65535",
    ),
    "an undo where nothing is kept": (
        lambda j: (UNDO, keys_of(j, name="item"), {"number": 1, "steps": 1}),
        InvalidArgument,
        "keeps no old values: set guard.undo",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_changes_nothing(job, name):
    make, kind, text = REFUSED[name]
    train(job, 0)
    before = rig.state(job)
    verb, keys, fields = make(job)
    with pytest.raises(kind, match=text):
        ask(job, verb, keys, **fields)
    assert rig.state(job) == before


def test_a_key_twice_is_undone_not_even_once(job):
    train(job, 0)
    found = keys_of(job, [3])
    twice = TableKeys(keys=pack(array(3, 3)), blocks=found.blocks, counts=pack(np.array([2], np.int32)))
    with pytest.raises(Malformed, match="comes twice"):
        ask(job, UNDO, twice, steps=1, number=3)
    assert job.rows("user", [3]).tolist() != job_of().rows("user", [3]).tolist()


@pytest.mark.parametrize("verb", [GET, EXPLAIN, EXPORT, UNDO])
def test_keys_that_are_elsewhere_are_stale(verb):
    job = job_of(shards=2).place([1] * 17)
    with pytest.raises(StalePlacement, match="is not on this shard"):
        ask(job, verb, keys_of(job), steps=1, number=1)
    with pytest.raises(StalePlacement, match="block 0 is not on this shard"):
        ask(job, EXPORT, block=0)


@pytest.mark.parametrize("verb", [GET, EXPLAIN, EXPORT])
def test_an_answer_that_no_message_holds_is_refused_before_memory_is_taken(verb):
    job = job_of(tables=(TableSpec("wide", 65536, rig.SGD, rig.ZEROS, 8),))
    over = MAX_MESSAGE_BYTES // (4 * 65536) + 1
    with pytest.raises(OutOfMemory, match="over the limit"):
        ask(job, verb, keys_of(job, range(over), "wide"))
