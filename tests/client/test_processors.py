# SPDX-License-Identifier: Apache-2.0
"""What a process computes on: lists of cores, threads that are pinned wherever they come from, threads of matrix products."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.client import entry, processors
from oarlock.client.entry import parser, run
from oarlock.client.processors import (
    WORKER_NICENESS,
    Blas,
    allowed_cores,
    announce,
    crowded,
    forced_kernels,
    format_cores,
    loaded_blas,
    on_cores,
    parse_cores,
    pin,
    usable_cores,
)
from oarlock.proto.errors import InvalidArgument, Unavailable
from oarlock.proto.rpc.server import MIN_THREADS

TWO = len(allowed_cores()) >= 2
needs_two_cores = pytest.mark.skipif(not TWO, reason="this process may use one core only")


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), (" 5 , 1-2,2", (1, 2, 5)), ("7-7", (7,)), ("65535", (65535,))],
)
def test_lists_of_cores(text, cores):
    assert parse_cores(text, "x") == cores


@given(st.sets(st.integers(0, 300), min_size=1))
def test_what_is_written_reads_back(cores):
    text = format_cores(cores)
    assert parse_cores(text, "x") == tuple(sorted(cores))
    assert len(text.split(",")) == sum(core - 1 not in cores for core in cores)


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "0,", "a", "-1", "3-1", "1-", "1--2", "1.5", "0x1", "65536", "0-99999999999", "٣", "0\n1", "auto"],
)
def test_what_is_no_list_of_cores(text):
    with pytest.raises(InvalidArgument, match=r"worker_pin_cores = .*: give cores like 0-3,8"):
        parse_cores(text, "worker_pin_cores")


def test_cores_that_the_process_may_not_use_are_named():
    assert usable_cores("2,4-5", "x", (2, 3, 4, 5)) == (2, 4, 5)
    with pytest.raises(InvalidArgument, match=r"^x = '0-3': cores 0-1 cannot be used .*; give some of 2-3,8$"):
        usable_cores("0-3", "x", (2, 3, 8))
    with pytest.raises(InvalidArgument, match="core 9 cannot be used"):
        usable_cores("2,9", "x", (2, 3, 8))


# Pins, then tells the cores of every thread that the process has and of one that it makes afterwards. OpenBLAS started its
# threads while numpy was loaded.
PINNING = """
import json, os, sys, threading
import numpy
from oarlock.client.processors import limit_blas, loaded_blas, parse_cores, pin
limit_blas(3)
pinned_from = len(os.listdir("/proc/self/task"))
pin(parse_cores(sys.argv[1], "cores"))
later = []
thread = threading.Thread(target=lambda: later.append(sorted(os.sched_getaffinity(0))))
thread.start()
thread.join()
found = {tuple(sorted(os.sched_getaffinity(int(t)))) for t in os.listdir("/proc/self/task")}
print(json.dumps([pinned_from, sorted(found), later, loaded_blas().threads]))
"""


@needs_two_cores
def test_threads_that_were_there_before_are_pinned_too():
    """In a process of its own: OpenBLAS never ends a thread."""
    core = allowed_cores()[-1]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PINNING, str(core)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    threads, found, later, blas_threads = json.loads(ended.stdout)
    assert (found, later) == ([[core]], [[core]])
    if loaded_blas().name.startswith("openblas"):
        assert blas_threads == 3, "more than it began with"
        assert threads >= 3


NICENESS = """
import json, os, threading
import numpy
from oarlock.client.processors import step_back

def of_all():
    return {os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")}

held, waiting = threading.Event(), threading.Event()
threading.Thread(target=lambda: (waiting.set(), held.wait(60)), daemon=True).start()
waiting.wait(60)
before = of_all()
step_back()
later = []
thread = threading.Thread(target=lambda: later.extend(of_all()))
thread.start()
thread.join()
print(json.dumps([sorted(before), sorted(set(later))]))
"""


def test_a_worker_lets_others_come_first_with_all_its_threads():
    """In a process of its own: none may go back."""
    ended = subprocess.run([sys.executable, "-c", NICENESS], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    (before,), (after,) = json.loads(ended.stdout)
    assert after == min(before + WORKER_NICENESS, 19)


@needs_two_cores
def test_a_thread_is_pinned_for_a_while_and_others_are_not():
    before = allowed_cores()
    other: list[tuple[int, ...]] = []
    asked, done = threading.Event(), threading.Event()

    def look():
        asked.wait(10)
        other.append(allowed_cores())
        done.set()

    thread = threading.Thread(target=look)
    thread.start()
    with on_cores(before[:1]):
        assert allowed_cores() == before[:1]
        asked.set()
        assert done.wait(10)
        with on_cores(()):
            assert allowed_cores() == before[:1], "no cores: as it was"
    thread.join()
    assert allowed_cores() == before
    assert other == [before]


def test_cores_that_are_gone_are_an_error_of_one_line():
    before = allowed_cores()
    for use in (pin, lambda cores: on_cores(cores).__enter__()):
        with pytest.raises(Unavailable, match="core 65000 cannot be used any more"):
            use((65000,))
    pin(())
    assert allowed_cores() == before


def test_threads_that_end_while_they_are_pinned_are_no_error(monkeypatch):
    gone = []

    def put(thread, cores):
        gone.append(thread)
        raise ProcessLookupError

    monkeypatch.setattr(os, "sched_setaffinity", put)
    pin((0,))
    assert gone


def test_what_matrix_products_run_on_is_known():
    blas = loaded_blas()
    assert blas.threads >= 1
    assert "unknown" not in (blas.name, blas.kernels)


def test_variables_that_force_kernels_are_named():
    assert forced_kernels({"OPENBLAS_CORETYPE": "", "PATH": "/bin"}) == []
    (words,) = forced_kernels({"OPENBLAS_CORETYPE": "Haswell"})
    assert words.startswith("OPENBLAS_CORETYPE=Haswell ")
    assert "run `unset OPENBLAS_CORETYPE` first" in words
    assert len(forced_kernels({"MKL_DEBUG_CPU_TYPE": "5", "OPENBLAS_CORETYPE": "Zen"})) == 2


def test_one_line_says_what_a_process_computes_on(caplog, monkeypatch):
    monkeypatch.setattr(processors, "loaded_blas", lambda: Blas("openblas 0.3.1", "Zen", 2))
    monkeypatch.setattr(processors, "allowed_cores", lambda: (0, 1, 2, 8))
    with caplog.at_level(logging.INFO, "oarlock"):
        announce("worker", pinned=True, compute_threads=2)
        announce("shard", pinned=False, network_threads=16)
        announce("worker", pinned=True, compute_threads=3)
    first, second, _, warning = [record.getMessage() for record in caplog.records]
    assert first == (
        "event=processors role=worker cores=0-2,8 pinned=true compute_threads=2 "
        "blas=openblas-0.3.1 kernels=Zen blas_threads=2"
    )
    assert " role=shard cores=0-2,8 pinned=false network_threads=16 blas=" in second
    assert warning.startswith(
        "event=crowded words='compute_threads = 3 times blas_threads = 2 are 6 threads on 4 cores"
    )


def test_more_computing_threads_than_cores():
    assert crowded(2, 2, 4) == ""
    assert "are 6 threads on 1 core of a worker" in crowded(2, 3, 1)


@pytest.fixture
def _no_log_is_left_open():
    logger = logging.getLogger("oarlock")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.mark.usefixtures("_no_log_is_left_open")
def test_a_process_on_cores_that_are_not_there_ends_with_one_line(capsys):
    async def body():
        raise AssertionError("it began")

    given = parser("oarlock.worker", "A worker.").parse_args(["--pin-cores", "0,60000"])
    assert run(body, given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --pin-cores = '0,60000': core 60000 cannot be used by this process; give some of ")


@pytest.mark.usefixtures("_no_log_is_left_open")
def test_a_process_is_pinned_before_it_begins(monkeypatch):
    pinned = []
    monkeypatch.setattr(entry, "pin", pinned.append)

    async def body():
        assert pinned == [allowed_cores()[:1]]

    core = str(allowed_cores()[0])
    assert run(body, parser("oarlock.worker", "A worker.").parse_args(["--pin-cores", core])) == 0
    assert len(pinned) == 1
    assert run(body, parser("oarlock.worker", "A worker.").parse_args([])) == 0
    assert len(pinned) == 1


def test_the_fewest_threads_are_those_of_the_server():
    assert processors.NETWORK_THREADS_RANGE[0] == MIN_THREADS
