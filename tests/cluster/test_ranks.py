# SPDX-License-Identifier: Apache-2.0
"""How ranks are leased, moved and given back, and which workers a sync job takes in."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oarlock.cluster.ranks import RankWork
from oarlock.proto import coordinator_pb2 as pb
from oarlock.proto.errors import InvalidArgument

SIGNATURE = {"architecture": "x86_64", "blas": "openblas 1", "numba": "1"}


def hosted(work: RankWork, worker: int) -> list[int]:
    return sorted(rank for (kind, rank), holder in work.leases.items() if kind == "rank" and holder == worker)


def test_ranks_are_shared_out_evenly_and_given_up_to_who_comes() -> None:
    living = [1]
    work = RankWork(6, 2, 2, ("hr",), ranks=5, hosts=lambda: len(living))
    assert work.grant(1, 1).splits == (0, 1, 2, 3, 4)
    living.append(2)
    # Nothing is free yet: the first one does not know.
    assert work.grant(2, 1).splits == ()
    assert work.grant(1, 1).splits == (0, 1, 2)
    # It says what it still holds, and the others are free.
    work.keep_only(1, {("rank", r) for r in range(3)})
    assert work.grant(2, 1).splits == (3, 4)
    assert work.grant(1, 1).splits == (0, 1, 2)
    # A dead one's go to others.
    for kind, rank in work.leased_to(1):
        assert work.release(1, kind, rank, "")
    living.remove(1)
    assert work.grant(2, 1).splits == (0, 1, 2, 3, 4)
    assert hosted(work, 2) == [0, 1, 2, 3, 4]


def test_a_report_of_a_split_is_taken_from_anybody_once() -> None:
    work = RankWork(4, 0, 1, ("hr",), ranks=2, hosts=lambda: 1)
    assert work.close(7, 3, 10, 1.0, 2)
    assert not work.close(8, 3, 10, 1.0, 2)
    assert (work.samples, work.steps) == (10, 2)


def test_a_split_that_three_workers_met_an_error_with_ends_the_job() -> None:
    work = RankWork(4, 0, 2, ("hr",), ranks=2, hosts=lambda: 1)
    for worker, goes_on in ((1, True), (2, True), (3, False)):
        assert work.grant(worker, 1).splits == (0, 1)
        # Split 7 is at position 3 of its epoch, and so of rank 1.
        assert work.release(worker, "train", 7, "bad") is goes_on
        assert hosted(work, worker) == [0]
        assert work.release(worker, "rank", 0, "")


def test_ranks_stay_with_their_hosts_while_an_epoch_is_evaluated() -> None:
    work = RankWork(1, 1, 2, ("hr",), ranks=2, hosts=lambda: 1)
    work.grant(1, 1)
    work.close(1, 0, 10, 1.0, 2)
    assert work.grant(1, 1).kind == "evaluate"
    assert hosted(work, 1) == [0, 1]
    work.evaluate(1, 0, [1.0, 0.5])
    work.finish_epoch()
    assert work.grant(1, 1).splits == (0, 1)


@pytest.fixture
def sync(cluster: Any, tmp_path: Path) -> Iterator[Any]:
    """A sync job of three ranks that trains."""
    made = type(cluster)(tmp_path / "sync.sqlite", spec=replace(cluster.spec, mode="sync", ranks=3)).start()
    for number in range(2):
        made.join("shard", f"127.0.0.1:{number + 1}")
    for number in range(2):
        made.coordinator.has_adopted(number, made.coordinator.generation)
    yield made
    made.kill()


def ask(made: Any, sender: int, number: int, ranks: list[int]) -> Any:
    return made.service.lease(pb.LeaseRequest(header=made.header(sender), wanted=1, number=number, ranks=ranks))


def test_workers_are_told_all_their_ranks_and_a_restarted_coordinator_hears_of_them(sync: Any) -> None:
    first, second = (sync.join("worker", signature=json.dumps(SIGNATURE)).incarnation for _ in range(2))
    reply = ask(sync, first, 1, [])
    assert (reply.work, list(reply.ranks), reply.epoch, list(reply.splits)) == (pb.TRAIN, [0, 1], 0, [])
    assert list(ask(sync, second, 1, []).ranks) == [2]
    sync.restart()
    # Nothing is leased before both have told what they host; what they tell they keep.
    assert list(ask(sync, first, 2, [0, 1]).ranks) == []
    assert ask(sync, second, 2, [2]).work == pb.TRAIN
    assert list(ask(sync, first, 3, [0, 1]).ranks) == [0, 1]
    assert list(ask(sync, second, 3, [2]).ranks) == [2]
    with pytest.raises(InvalidArgument, match=r"ranks \[3\] are held; this job has 3"):
        ask(sync, first, 4, [3])


def test_a_worker_of_another_signature_is_refused_by_the_part_that_differs(sync: Any) -> None:
    assert sync.join("worker", signature=json.dumps(SIGNATURE)).incarnation
    sync.restart()
    assert sync.join("worker", signature=json.dumps(dict(reversed(SIGNATURE.items())))).incarnation
    with pytest.raises(InvalidArgument, match="compute with blas = 'openblas 1', this one with 'mkl'") as refused:
        sync.join("worker", signature=json.dumps({**SIGNATURE, "blas": "mkl"}))
    assert refused.value.details["part"] == "blas"
    with pytest.raises(InvalidArgument, match="numba = '1', this one with None"):
        sync.join("worker", signature=json.dumps({k: v for k, v in SIGNATURE.items() if k != "numba"}))


@pytest.mark.parametrize("signature", ["", "{", "[]", "{}", '{"a": 1}', '"a"', "[" * 4000, "{}" + " " * 5000])
def test_what_is_no_signature_is_refused(sync: Any, signature: str) -> None:
    with pytest.raises(InvalidArgument):
        sync.join("worker", signature=signature)
    assert sync.store.fact("signature") is None


def test_other_modes_ask_for_no_signature(cluster: Any) -> None:
    assert cluster.join("worker", signature="{").incarnation
