# SPDX-License-Identifier: Apache-2.0
"""A tool that is no member asks for rows: the right shards, in few requests, and nothing twice."""

import asyncio

import numpy as np
import pytest
import rig
from rows_rig import RAW, array, ask, asked, client, job_message, job_of, keys_of, train

from oarlock.client import rows
from oarlock.proto.errors import DeadlineExceeded, Malformed, Unavailable, WrongJob, WrongRun
from oarlock.proto.shard_pb2 import EXPORT, GET, UNDO, RowsRequest


@pytest.fixture
def job():
    return job_of()


def test_rows_of_many_shards_are_those_that_a_worker_pulls():
    job = job_of(shards=3)
    train(job, 0)
    keys = np.array([*RAW, 99, (1 << 64) - 1], np.uint64)[::-1].copy()

    found, weights = asked(job, lambda tool: tool.get("user", keys))
    assert found.tolist() == [int(k) < 40 for k in keys]
    assert np.array_equal(weights, job.rows("user", keys))
    assert weights[found].std() > 0
    # What is absent reads as its first value, and stays absent.
    assert weights[~found].any()
    assert sum(s.tables[0].rows for s in job.shards.values()) == 40


def test_one_request_a_shard_unless_there_are_too_many_keys(monkeypatch):
    job = job_of(shards=3)
    spy = rig.Spy(job.transport)
    asked(job, lambda tool: tool.get("user", np.arange(4000, dtype=np.uint64)), spy)
    assert sorted(call[0] for call in spy.sent("Shard.Rows")) == ["shard-0", "shard-1", "shard-2"]
    spy = rig.Spy(job.transport)
    found, _ = asked(job, lambda tool: tool.get("user", np.arange(20000, dtype=np.uint64)), spy)
    assert len(found) == 20000
    assert 5 <= len(spy.sent("Shard.Rows")) <= 8


def test_an_explanation_says_where_the_row_is_and_what_it_holds():
    job = job_of(shards=3)
    for group in range(2):
        train(job, group)
    facts = asked(job, lambda tool: tool.explain("user", array(7, 1000)))
    there, absent = facts
    shard = there["shard"]
    block = there["block"]
    assert job.owners[block] == shard
    assert there["address"] == f"shard-{shard}"
    assert (there["key"], there["present"], there["table"]) == (7, True, "user")
    assert np.array_equal(np.array(there["weights"], np.float32), job.rows("user", [7])[0])
    assert there["undo_kept"] == 2
    assert there["version"] == job.shards[shard].operations(block) == 2
    assert there["generation"] == 1
    # The job's step came along: the row's age follows from it.
    assert there["age"] == 12 - there["last_update"]
    assert (absent["present"], absent["admission"]["kind"]) == (False, "always")


@pytest.mark.parametrize("kind", [DeadlineExceeded, Unavailable])
def test_a_client_whose_answer_was_lost_undoes_once(kind):
    job = job_of(shards=2)
    for group in range(3):
        train(job, group)
    spy = rig.Spy(job.transport)
    lost = {"left": 2}

    def lose(address, method, request):
        if method == "Shard.Rows" and request.verb == UNDO and lost["left"]:
            lost["left"] -= 1
            job.services[int(address[-1])].rows(request)
            return kind("nobody heard it")
        return None

    spy.answers.append(lose)
    done = asked(job, lambda tool: tool.undo("user", np.array(RAW, np.uint64), 1), spy)
    assert done.tolist() == [1] * 40
    kept = asked(job, lambda tool: tool.explain("user", np.array(RAW, np.uint64)))
    assert {facts["undo_kept"] for facts in kept} == {2}


def test_a_block_that_moved_is_asked_where_it_is():
    job = job_of(shards=2)
    train(job, 0)
    keys = np.array(RAW, np.uint64)

    async def body():
        tool = client(job)
        await tool.open()
        for number in range(8):
            job.move(number, 1 - int(job.owners[number]))
        job.coordinator.message = job_message(job)
        return await tool.get("user", keys)

    found, weights = rig.run(body())[0]
    assert found.all()
    assert np.array_equal(weights, job.rows("user", keys))


def test_a_job_that_was_restored_meanwhile_is_said_so():
    job = job_of(shards=2)

    async def body():
        tool = client(job)
        await tool.open()
        for number in range(8):
            job.move(number, 1 - int(job.owners[number]))
        job.coordinator.message, job.coordinator.run = job_message(job), 2
        return await tool.get("user", np.arange(9, dtype=np.uint64))

    with pytest.raises(WrongRun, match="restored from a checkpoint meanwhile"):
        rig.run(body())


def test_another_job_is_not_taken_for_this_one():
    with pytest.raises(WrongJob, match="another job answers at coordinator"):
        asked(job_of(), lambda tool: tool.get("user", array(1)), job=bytes(16))


def test_a_block_without_an_owner_is_unavailable():
    job = job_of(shards=2)
    job.owners[:] = -1
    job.coordinator.message = job_message(job)
    with pytest.raises(Unavailable, match="belongs to no shard yet"):
        asked(job, lambda tool: tool.get("user", array(1)))


def test_what_was_refused_is_counted_with_a_sample_of_keys():
    job = job_of(shards=3)
    train(job, 0)
    train(job, 1, raw=[3, 5, 7], value=float("nan"))
    train(job, 2, raw=[5], value=float("inf"))
    refused, sample = asked(job, lambda tool: tool.quarantine("user"))
    assert (refused, sample.tolist()) == (4, [3, 5, 7])
    refused, sample = asked(job, lambda tool: tool.quarantine("item"))
    assert (refused, sample.tolist()) == (0, [])


def test_a_wide_table_is_asked_in_pieces_that_fit(monkeypatch):
    job = job_of(shards=2)
    monkeypatch.setattr(rows, "MESSAGE_BYTES", 240)
    spy = rig.Spy(job.transport)
    found, _ = asked(job, lambda tool: tool.get("user", np.arange(60, dtype=np.uint64)), spy)
    sizes = [len(RowsRequest.FromString(data).keys.keys.data) // 8 for _, _, data, _ in spy.sent("Shard.Rows")]
    assert (len(found), sum(sizes), max(sizes)) == (60, 60, 10)


def test_answers_for_other_keys_are_malformed(job):
    spy = rig.Spy(job.transport)
    short = ask(job, GET, keys_of(job, [1]))
    spy.answers.append(lambda a, method, r: short if method == "Shard.Rows" else None)
    with pytest.raises(Malformed, match="answered for 1 keys of 2"):
        asked(job, lambda tool: tool.get("user", array(1, 2)), spy)


def test_a_page_that_leads_back_is_malformed(job):
    spy = rig.Spy(job.transport)
    train(job, 0)
    reply = ask(job, EXPORT, keys_of(job, [1]))
    reply.more, reply.next = True, 1

    async def body(tool):
        return [part async for part in tool.export_block("user", 0)]

    spy.answers.append(lambda a, method, r: reply if method == "Shard.Rows" else None)
    with pytest.raises(Malformed, match="ends before it begins"):
        asked(job, body, spy)


def test_nobody_waits_long_for_a_coordinator_that_is_not_there(job):
    job.transport.stop("coordinator")
    begin = asyncio.new_event_loop()
    try:
        with pytest.raises(Unavailable, match="nothing answers"):
            begin.run_until_complete(client(job).open())
    finally:
        begin.close()
