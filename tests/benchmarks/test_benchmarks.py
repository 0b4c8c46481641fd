# SPDX-License-Identifier: Apache-2.0
"""The benchmarks come to their end and print one JSON object. What they measure is no business of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oarlock.benchmarks import dense


def run(module: str, folder: Path) -> dict[str, Any]:
    before = set(folder.iterdir())
    ended = subprocess.run(
        [sys.executable, "-P", "-m", f"oarlock.benchmarks.{module}", "--tiny", "--quick", "--json"],
        cwd=folder,
        env={**os.environ, "OPENBLAS_CORETYPE": "Haswell", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert set(folder.iterdir()) == before, "something was left behind"
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert result["surroundings"]["openblas_coretype"] == {"found": "Haswell", "used": None}
    return result


def test_rpc(tmp_path: Path) -> None:
    result = run("rpc", tmp_path)
    assert set(result["round_trips"]) == {"20 kB", "200 kB", "1 MB"}
    for verbs in result["round_trips"].values():
        for by_way in verbs.values():
            for figures in by_way.values():
                assert set(figures) == {"us", "client_cpu_us", "server_cpu_us"}
                assert figures["us"] > 0
        assert set(verbs) == {"pull", "push"}
        assert set(verbs["pull"]) == {"single calls", "stream", "TCP"}


def test_wire(tmp_path: Path) -> None:
    result = run("wire", tmp_path)
    assert set(result["sides"]) == {"frames unix", "raw unix", "frames TCP", "raw TCP", "gRPC"}
    names = {"gb_per_second", "client_cpu_seconds_per_gb", "server_cpu_seconds_per_gb", "call_us"}
    assert all(set(figures) == names for figures in result["sides"].values())
    assert all(result[name] > 0 for name in ("bulk_vs_tcp", "grpc_vs_tcp", "call_us", "tcp_us"))


def test_security(tmp_path: Path) -> None:
    result = run("security", tmp_path)
    assert set(result["figures"]) == {
        "call",
        "pull of 1 MB, stream",
        "pull of 1 MB, frames by TCP",
        "pull of 1 MB, frames",
    }
    for by_how in result["figures"].values():
        assert set(by_how) == {"none", "tokens", "tls"}
        assert all(figures["us"] > 0 and figures["cpu_us"] > 0 for figures in by_how.values())
    assert all(result[name].keys() == result["figures"].keys() for name in ("tokens_vs_none", "tls_vs_none"))


def test_elasticity(tmp_path: Path) -> None:
    result = run("elasticity", tmp_path)
    decisions = {"place", "nothing_to_do", "one_more", "tenth_more", "drain_one", "death_of_one"}
    assert set(result["replicas_1"]) == decisions
    assert result["replicas_1"]["nothing_to_do"]["moves"] == 0
    for name in ("one_more", "tenth_more", "drain_one", "death_of_one"):
        assert result["replicas_1"][name]["bytes_over_least"] <= 1.1
    assert result["scaler"]["decision_ms"] > 0
    assert set(result["unit_costs"]) == {"heartbeat_cpu_us", "heartbeats_answered_per_second"}
    assert result["messages"]["heartbeats_per_second"] == 40


@pytest.mark.slow
def test_overload(tmp_path: Path) -> None:
    result = run("overload", tmp_path)
    assert result["died"] is False
    assert result["refused_not_retryable"] == 0
    assert {"rss_over_limit", "refused", "throughput_after", "slow_shard_pull_ratio"} < set(result)


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    result = run("scaling", tmp_path)
    assert [each["servers"] for each in result["scales"]] == ["2 to 4", "4 to 2"]
    assert {"pause_ms", "pause_quiet_ms", "throughput", "replicas_1_over_0"} < set(result)
    for each in result["scales"]:
        assert each["copied_mb"] > 0.9 * each["least_mb"] > 0
        assert each["seconds"] >= each["seconds_of_moves"] > 0


@pytest.mark.slow
def test_checkpoint(tmp_path: Path) -> None:
    result = run("checkpoint", tmp_path)
    assert {"pause_ms", "cut_ms", "cow_peak_over_model"} < set(result)
    for name in ("write_vs_raw", "restore_vs_raw", "incremental_over_touched", "slowdown", "step_ms"):
        assert result[name] > 0
    assert all(touched > 0 for touched in result["touched_rows"])


@pytest.mark.slow
def test_ncf(tmp_path: Path) -> None:
    result = run("ncf", tmp_path)
    ways = {"ps", "ps_1x1", "inprocess", "torch", "torch_given_batches", "local"}
    assert {f"{way}_samples_per_s" for way in ways} < set(result)
    assert {"ps_vs_torch", "inprocess_vs_torch", "ps_vs_local", "why"} < set(result)
    assert set(result["epoch_seconds"]) == set(result["cpu_seconds_per_million_samples"]) == ways
    assert set(result["local_us"]) == {"encode", "dedup", "pull", "compute", "push"}
    assert result["local_samples_per_s"] > 0
    assert result["ps_samples_per_s"] > 0
    assert (result["torch_samples_per_s"] is None) == (result["why"] is not None)


@pytest.mark.torch
def test_dense_with_torch(tmp_path: Path) -> None:
    result = run("dense", tmp_path)
    assert result["why"] is None
    for figures in result["models"].values():
        assert all(value > 0 for value in figures.values())


def test_dense_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    result = dense.measure(32, 1, tiny=True)
    assert "make setup-torch" in result["why"]
    assert set(result["models"]) == {"wide_deep", "dlrm"}
    for figures in result["models"].values():
        assert {name for name, value in figures.items() if value is None} == {
            "gradient_difference",
            "bfloat16_speedup",
            *(name for name in figures if name.startswith("bfloat16_")),
        }
        assert figures["float32_step_ms"] > 0
        assert figures["gflop"] > 0
