# SPDX-License-Identifier: Apache-2.0
"""Which cores the processes of a job get: all of them used, none twice where that can be, none that is not there."""

import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.client import processors as of_process
from oarlock.client.job import JobSpec
from oarlock.client.processors import Blas, allowed_cores
from oarlock.launch import child, inprocess
from oarlock.launch import processors as planned
from oarlock.launch.child import start_child
from oarlock.launch.config import RunConfig
from oarlock.launch.folder import resume
from oarlock.launch.processors import Processors, processors_of, spread
from oarlock.proto.errors import InvalidArgument
from oarlock.ps import __main__ as shard
from oarlock.worker import __main__ as worker

AUTO = {"server_pin_cores": "auto", "worker_pin_cores": "auto"}


def of(allowed: range | tuple[int, ...], **fields: Any) -> Processors:
    return processors_of(RunConfig(**fields), tuple(allowed))


def test_nothing_is_pinned_unless_it_is_asked_for() -> None:
    found = of(range(8))
    assert (found.network_threads, found.server_cores) == (512, ())
    assert [found.of(role, 1) for role in ("shard", "worker", "coordinator")] == [()] * 3


def test_a_list_is_shared_by_all_processes_of_its_role() -> None:
    found = of(range(8), server_pin_cores="0-1", worker_pin_cores="2-4,6", servers=2, workers=3)
    assert found.servers == ((0, 1),) * 2
    assert found.workers == ((2, 3, 4, 6),) * 3
    assert (found.of("shard", 1), found.of("worker", 2), found.of("coordinator", 0)) == ((0, 1), (2, 3, 4, 6), ())


def test_cores_are_shared_out_by_what_computes_on_them() -> None:
    found = of(range(8), **AUTO, servers=2, workers=2)
    assert (found.workers, found.servers) == (((0, 1), (2, 3)), ((4, 5), (6, 7)))
    found = of(range(8), **AUTO, servers=2, workers=2, compute_threads=3)
    assert (found.workers, found.servers) == (((0, 1, 2), (3, 4, 5)), ((6,), (7,)))


def test_too_few_cores_are_shared() -> None:
    found = of((4, 9), **AUTO, servers=2, workers=2)
    assert (found.workers, found.servers) == (((4,), (9,)),) * 2
    found = of((4, 5, 9), **AUTO, servers=1, workers=3)
    assert (found.workers, found.servers) == (((4,), (5,), (9,)), ((4, 5, 9),))


def test_one_role_goes_where_the_other_is_not() -> None:
    found = of(range(4), server_pin_cores="0", worker_pin_cores="auto", workers=2)
    assert (found.workers, found.servers) == (((1, 2), (3,)), ((0,),) * 2)
    found = of(range(4), server_pin_cores="auto", worker_pin_cores="0-3", servers=2)
    assert found.servers == ((0, 1), (2, 3)), "nothing is left, so cores are shared"
    found = of(range(4), worker_pin_cores="auto", workers=3)
    assert (found.workers, found.server_cores) == (((0, 1), (2,), (3,)), ())


@given(st.sets(st.integers(0, 200), min_size=1, max_size=40), st.lists(st.integers(1, 9), max_size=50))
def test_every_core_is_used_and_none_twice_where_that_can_be(cores: set[int], weights: list[int]) -> None:
    ordered = tuple(sorted(cores))
    shares = spread(ordered, weights)
    assert len(shares) == len(weights)
    assert all(share for share in shares)
    together = [core for share in shares for core in share]
    if len(ordered) < len(weights):
        most = max(together.count(core) for core in ordered)
        assert set(together) == cores
        assert most - min(together.count(core) for core in ordered) <= 1
    elif weights:
        assert together == list(ordered)
        for a, x in zip(weights, shares, strict=True):
            for b, y in zip(weights, shares, strict=True):
                assert a < b or len(x) >= len(y) - (a == b), "who weighs more has no fewer"


def test_cores_that_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"server_pin_cores = '0-3': core 3 cannot be used .* 0-2$"):
        of(range(3), server_pin_cores="0-3")
    with pytest.raises(InvalidArgument, match=r"worker_pin_cores = '7': core 7 cannot be used"):
        of(range(3), server_pin_cores="auto", worker_pin_cores="7")


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "allowed_cores", lambda: (0, 1, 2, 3))


def test_what_is_slow_is_told(start: Any, four_cores: None) -> None:
    spec, _ = start("a", compute_threads=2, blas_threads=2, workers=2)
    assert Processors().warnings(spec) == []
    (words,) = Processors(workers=((0, 1, 2, 3), (3,))).warnings(spec)
    assert "compute_threads = 2 times blas_threads = 2 are 4 threads on 1 core of a worker" in words
    (words,) = Processors(network_threads=16).warnings(start("b", workers=7)[0])
    assert "too few for up to 4 connections of each of 7 workers" in words
    assert words.endswith("give 38")
    for threads, told in ((37, 1), (38, 0)):
        assert len(Processors(network_threads=threads).warnings(start(f"c{threads}", workers=7)[0])) == told


def test_the_user_is_told_in_one_line(start: Any, four_cores: None) -> None:
    blas = Blas("openblas 0.3", "Zen", 1)
    spec, _ = start("a", compute_threads=2)
    assert Processors().described(spec, blas) == (
        "processors: cores 0-3, nothing is pinned; compute_threads 2, blas_threads 1 (openblas 0.3, kernels for Zen), "
        "network_threads 512"
    )
    words = Processors(64, ((0, 1), (2,)), ((3,), (3,))).described(spec, blas)
    assert "cores 0-3, shards on 0-1 | 2; workers share 3; compute_threads" in words
    assert words.endswith("network_threads 64")


def test_processes_are_told_their_cores_and_threads_also_when_they_are_started_again(stage: Any) -> None:
    stage.spec = stage.spec.from_json(stage.spec.to_json().replace('"blas_threads": 1', '"blas_threads": 3'))

    def script(stage: Any) -> Any:
        stage.kill("worker", 1)
        yield from stage.until(lambda: stage.starts("worker") == 3)

    stage.play(script, processors=Processors(40, ((0, 1, 5),), ((), (3,))))
    found = {(role, number): arguments for role, number, arguments in stage.started if role != "coordinator"}
    assert found["shard", 0][-6:-4] == ["--request-memory-bytes", str(1 << 30)]
    assert found["shard", 0][-4:] == ["--network-threads", "40", "--pin-cores", "0-1,5"]
    assert "--pin-cores" not in found["worker", 0]
    again = [arguments[-2:] for role, number, arguments in stage.started if (role, number) == ("worker", 1)]
    assert again == [["--pin-cores", "3"]] * 2
    assert stage.blas_threads == {"coordinator": 1, "shard": 1, "worker": 3}


def test_a_child_begins_with_the_threads_that_it_is_to_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Python a shell that tells its environment."""
    monkeypatch.setattr(child.sys, "executable", "env")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return real(command[:1], **options)

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    for threads in (1, 5):
        started = start_child("worker", threads, "m", [], logs=tmp_path, log_level="info", blas_threads=threads)
        assert started.process.stdin is not None
        started.process.stdin.close()
        assert started.process.wait(30) == 0
        lines = started.log.read_text().splitlines()
        assert f"OPENBLAS_NUM_THREADS={threads}" in lines
        assert "OMP_NUM_THREADS=1" in lines


def test_in_one_process_threads_run_where_they_are_to(
    start: Any, run_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = allowed_cores()
    if len(before) < 2:
        pytest.skip("this process may use one core only")
    seen: dict[str, Any] = {}
    real_worker, real_shard = inprocess.run_worker, inprocess.run_shard
    blas: list[int] = []

    async def working(*arguments: Any, **options: Any) -> Any:
        seen.setdefault("worker", []).append(allowed_cores())
        blas.append(of_process.loaded_blas().threads)
        options_of_reader = arguments[3].submit(allowed_cores).result()
        seen.setdefault("reader", []).append(options_of_reader)
        return await real_worker(*arguments, **options)

    async def serving(*arguments: Any, **options: Any) -> Any:
        seen["shard"] = allowed_cores()
        return await real_shard(*arguments, **options)

    monkeypatch.setattr(inprocess, "run_worker", working)
    monkeypatch.setattr(inprocess, "run_shard", serving)
    spec, folder = start(epochs=1, workers=2, servers=1)
    first, last = before[:1], before[-1:]
    pinned = Processors(512, (first,), ((), last))
    with of_process.limit_blas(2):
        status = inprocess.run_in_process(
            spec, folder, watch=lambda status: True, watch_seconds=0.01, processors=pinned
        )
        assert of_process.loaded_blas().threads == 2
    assert status["phase"] == "done"
    assert seen["shard"] == first
    assert sorted(seen["worker"]) == sorted(seen["reader"]) == sorted([before, last])
    assert blas == [1, 1]
    assert allowed_cores() == before


@pytest.mark.parametrize("threads", ["15", "-1", "65537"])
def test_a_shard_of_too_few_threads(threads: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["oarlock.ps", "--coordinator", "127.0.0.1:1", "--network-threads", threads]
    monkeypatch.setattr(shard.sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        shard.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--network-threads {threads}: give an integer from 16 to 65536" in last


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a worker's entry point does to its process before it joins, which is not done to the tests'."""
    done: list[str] = []
    for name in ("step_back", "warm_up", "keep_what_is_loaded"):
        monkeypatch.setattr(worker, name, lambda name=name: done.append(name))
    monkeypatch.setattr(worker.sys, "setswitchinterval", lambda seconds: done.append("setswitchinterval"))
    monkeypatch.setattr(worker.sys, "argv", ["oarlock.worker", "--coordinator", "127.0.0.1:1", "--reader", "arrow"])
    return done


def test_a_worker_computes_with_the_threads_of_the_job_that_it_joins(
    start: Any, begun: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    spec, _ = start(blas_threads=3)
    found = []

    async def joined(*arguments: Any, prepare: Any, **options: Any) -> None:
        prepare(spec)
        # Others come first, and what is loaded is spared, before anything is trained.
        assert begun == ["setswitchinterval", "step_back", "warm_up", "keep_what_is_loaded"]
        found.append(of_process.loaded_blas().threads)

    monkeypatch.setattr(worker, "run_worker", joined)
    logger = logging.getLogger("oarlock")
    handlers = list(logger.handlers)
    try:
        with of_process.limit_blas(2):
            assert worker.main() == 0
    finally:
        logger.handlers[:] = handlers
    assert found == [3]
    (line, *_) = [r.getMessage() for r in caplog.records if "event=processors" in r.getMessage()]
    assert " role=worker " in line
    assert " compute_threads=1 " in line
    assert line.endswith(" blas_threads=3")


def test_threads_may_change_when_a_job_goes_on(start: Any, run_job: Any) -> None:
    spec, folder = start(epochs=1)
    assert isinstance(spec, JobSpec)
    assert run_job(spec, folder)["phase"] == "done"
    changes = {"epochs": 2, "compute_threads": 2, "blas_threads": 2, "network_threads": 32, "worker_pin_cores": "auto"}
    spec, path = resume(folder, changes)
    assert (spec.compute_threads, spec.blas_threads) == (2, 2)
    assert run_job(spec, folder, path)["phase"] == "done"
    assert resume(folder, {"epochs": 3})[0].compute_threads == 2, "what was changed stays"
