# SPDX-License-Identifier: Apache-2.0
"""Jobs that are scraped: one in this process, and real processes; and what the launcher tells its processes of ports."""

import asyncio
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scrape

from oarlock import __version__
from oarlock.client.entry import parser
from oarlock.client.telemetry import observed
from oarlock.launch.inprocess import run_in_process
from oarlock.launch.processes import LocalProcesses
from oarlock.proto.coordinator_pb2 import StatusRequest
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.rpc import GrpcTransport
from oarlock.telemetry.metrics import METRICS

Stage = Any
Script = Iterator[Any]

# What a job in one process has none of: a wire.
WIRE = {m.name for m in METRICS if m.name.startswith("oarlock_rpc_")}
# Of tables whose rows begin with a part of their columns, and of jobs that have a scaler; neither is so here.
NEVER = {"oarlock_table_expanded_rows", "oarlock_coordinator_autoscale_decisions_total"}
# Of another process.
NEVER |= {m.name for m in METRICS if m.name.startswith("oarlock_serving_")}


def test_a_job_in_one_process_tells_all_there_is_to_tell(start: Any) -> None:
    spec, folder = start(epochs=3, cache={"item": {"rows": 100, "bound": "auto", "highest": 3}})
    pages: list[dict[str, scrape.Found]] = []

    def watch(status: dict[str, Any]) -> bool:
        if status["metrics"]:
            pages.append(scrape.metrics_at(status["metrics"]))
        return True

    status = run_in_process(spec, folder, watch=watch, watch_seconds=0.01, metrics_port=0)
    assert status["phase"] == "done"
    told = {name for page in pages for name in page}
    assert told == {m.name for m in METRICS} - WIRE - NEVER
    for page in pages:
        assert page["oarlock_telemetry_failures_total"].at() == 0
        phases = page["oarlock_coordinator_phase"].samples
        assert sorted(phases.values()) == [0] * 6 + [1]
        assert page["oarlock_coordinator_info"].at(id=spec.job, name="job", recipe=spec.recipe, mode="async") == 1
    whole = [p for p in pages if "oarlock_worker_samples_total" in p]
    assert len(whole) > 1
    for page in whole:
        # The coordinator was asked first, so the workers have trained no less.
        trained = sum(page["oarlock_worker_samples_total"].samples.values())
        assert trained >= page["oarlock_coordinator_samples_total"].at()
        assert page["oarlock_coordinator_epochs"].at() == 3
    for before, after in itertools.pairwise(pages):
        for name, found in before.items():
            if found.kind == "counter":
                assert all(after[name].samples[key] >= value for key, value in found.samples.items() if name in after)
    tables = {table.name for table in spec.tables}
    assert {dict(labels)["table"] for _, labels in whole[-1]["oarlock_table_rows"].samples} == tables
    assert {dict(labels)["shard"] for _, labels in whole[-1]["oarlock_table_rows"].samples} == {"0", "1"}
    assert {dict(labels)["worker"] for _, labels in whole[-1]["oarlock_worker_batches_total"].samples} <= {"0", "1"}
    # A worker's first page may come before the end of its first stage.
    timed = [p["oarlock_worker_stage_seconds_total"] for p in whole if "oarlock_worker_stage_seconds_total" in p]
    stages = {dict(labels)["stage"] for found in timed for _, labels in found.samples}
    assert {"lease", "read", "compute", "wait_for_pull", "wait_for_push", "evaluate"} <= stages
    last = status["history"][-2]
    told_results = [p["oarlock_coordinator_epoch_loss"].at() for p in pages if "oarlock_coordinator_epoch_loss" in p]
    assert set(told_results) <= {r["loss"] for r in status["history"]}
    assert last["loss"] in told_results


def test_a_job_without_the_option_has_no_page(start: Any, run_job: Any) -> None:
    spec, folder = start(epochs=1)
    status = run_job(spec, folder)
    assert status["metrics"] == ""


class Process:
    """A process of a job, its log in a file."""

    def __init__(self, log: Path, module: str, *arguments: str) -> None:
        self.log = log
        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--until-stdin-closes", *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=environment,
            )

    def until(self, condition: Callable[[], Any]) -> Any:
        """Return what ``condition`` finds, once it finds something; the process's end ends the wait."""
        while True:
            ended = self.process.poll() is not None
            if found := condition():
                return found
            assert not ended, self.log.read_text()
            # So that the processes have the processor to get there.
            threading.Event().wait(0.05)

    @property
    def metrics(self) -> str:
        found = self.until(lambda: re.search(r"event=metrics address=http://(\S+)/metrics\n", self.log.read_text()))
        return str(found[1])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


# A shard may have to compile its kernels first.
@pytest.mark.timeout(400)
def test_real_processes_are_scraped(start: Any, tmp_path: Path) -> None:
    """A coordinator and a shard, of a job that waits for a worker."""
    _, folder = start(servers=1)
    processes = [Process(tmp_path / "coordinator", "oarlock.cluster", "--dir", str(folder), "--metrics-port", "0")]
    try:
        (coordinator,) = processes
        at = coordinator.metrics
        coordinator.until((folder / "coordinator.json").exists)
        address = json.loads((folder / "coordinator.json").read_text())["address"]
        shard = Process(tmp_path / "shard", "oarlock.ps", "--coordinator", address, "--metrics-port", "0")
        processes.append(shard)
        # From before it has joined.
        assert scrape.metrics_at(shard.metrics)["process_threads"].at() >= 1
        shard.until(lambda: scrape.metrics_at(at)["oarlock_coordinator_placed_shards"].at())
        page = scrape.metrics_at(at)
        assert page["oarlock_coordinator_members"].at(role="shard") == 1
        assert page["oarlock_coordinator_orders_total"].at(order="adopt", result="done") == 1
        assert page["oarlock_rpc_server_requests_total"].at(method="Coordinator.Join") == 1
        mine = scrape.metrics_at(shard.metrics)
        assert mine["oarlock_process_info"].samples
        assert mine["oarlock_shard_blocks"].at(shard="0") > 0
        assert mine["oarlock_rpc_server_requests_total"].at(method="Shard.Adopt") == 1
        assert mine["oarlock_rpc_server_received_bytes_total"].at(method="Shard.Adopt") > 100
        sent = page["oarlock_rpc_client_sent_bytes_total"].at(method="Shard.Adopt")
        assert mine["oarlock_rpc_server_received_bytes_total"].at(method="Shard.Adopt") == sent
        assert mine["oarlock_member_lease_seconds"].at(role="shard", member="0") > 0
        assert mine["oarlock_telemetry_failures_total"].at() == page["oarlock_telemetry_failures_total"].at() == 0
        # Whoever asks the coordinator finds both pages.
        status = shard.until(lambda: found if "metrics" in (found := _status(address))["members"][0]["stats"] else None)
        assert (status["metrics"], status["members"][0]["stats"]["metrics"]) == (at, shard.metrics)
        # Nobody's scrape is worth more than the process.
        with scrape.connect(shard.metrics) as half:
            half.sendall(b"GET /metrics HT")
            assert scrape.metrics_at(shard.metrics)
        assert shard.process.poll() is None
    finally:
        for process in reversed(processes):
            process.end()


def _status(address: str) -> dict[str, Any]:
    async def ask() -> Any:
        transport = GrpcTransport()
        try:
            return await transport.call(address, "Coordinator.Status", StatusRequest(), timeout_seconds=30)
        finally:
            await transport.close()

    found: dict[str, Any] = json.loads(asyncio.run(ask()).status)
    return found


def test_a_port_that_is_taken_is_an_error_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with observed("first", 0) as first:
        port = int(first.address.rpartition(":")[2])
        assert first.told(lambda: {"rows": 1})() == {"rows": 1, "metrics": f"127.0.0.1:{port}"}
        words = rf"metrics cannot be served at 127\.0\.0\.1:{port} \(Address already in use.*\): give another --metrics-port"
        with pytest.raises(InvalidArgument, match=words), observed("second", port):
            pass
        # Unless the process would rather go on without.
        with caplog.at_level(logging.WARNING, "oarlock"), observed("second", port, needed=False) as second:
            assert second.address == ""
            assert second.told(lambda: {"rows": 1})() == {"rows": 1}
        assert "event=no_metrics" in caplog.text
        assert scrape.metrics_at(first.address)["oarlock_process_info"].at(role="first", version=__version__) == 1
    with pytest.raises(OSError, match="refused"):
        scrape.connect(first.address)


@pytest.mark.parametrize("text", ["-1", "65536", "http", "9100.5", "", "٣", " 1", "1e3"])
def test_what_is_no_port_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser("oarlock.ps", "").parse_args([f"--metrics-port={text}"])
    assert ended.value.code == 2
    assert "give a port from 0 (any free one) to 65535" in capsys.readouterr().err


def options_of(arguments: list[str]) -> list[str]:
    return [a for i, a in enumerate(arguments) if a.startswith("--metrics") or arguments[i - 1] == "--metrics-port"]


def test_each_process_gets_a_port_of_its_own_and_keeps_it(stage: Stage) -> None:
    def script(stage: Stage) -> Script:
        stage.kill("worker", 1)
        yield from stage.until(lambda: stage.starts("worker") == 3)
        stage.kill("coordinator")
        yield from stage.until(lambda: stage.starts("coordinator") == 2)
        yield from stage.until(lambda: "note" not in stage.statuses[-1])

    stage.play(script, metrics_port=9100)
    found = [(role, number, options_of(arguments)) for role, number, arguments in stage.started]
    assert found == [
        ("coordinator", 0, ["--metrics-port", "9100"]),
        ("shard", 0, ["--metrics-port", "9101"]),
        ("worker", 0, ["--metrics-port", "9102"]),
        ("worker", 1, ["--metrics-port", "9103"]),
        # One that is started again goes on without its port rather than end the job.
        ("worker", 1, ["--metrics-port", "9103", "--metrics-if-free"]),
        ("coordinator", 0, ["--metrics-port", "9100", "--metrics-if-free"]),
    ]


@pytest.mark.parametrize("port", [None, 0])
def test_any_port_or_none(stage: Stage, port: int | None) -> None:
    def script(stage: Stage) -> Script:
        yield from ()

    stage.play(script, metrics_port=port)
    wanted = [] if port is None else ["--metrics-port", "0"]
    assert [options_of(arguments) for _, _, arguments in stage.started] == [wanted] * 4


def test_ports_beyond_the_last_are_refused_before_anything_is_started(start: Any) -> None:
    spec, folder = start(servers=2, workers=2)
    LocalProcesses(spec, folder, metrics_port=65531)
    with pytest.raises(InvalidArgument, match=r"--metrics-port 65532 .* goes beyond 65535"):
        LocalProcesses(spec, folder, metrics_port=65532)
