# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmark: the laws of its data, the gate that opens windows, and one run that comes to its end.

How fast anything is is no business of a test.
"""

import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from oarlock.benchmarks.end_to_end_cases import Case, ends_of, learns
from oarlock.benchmarks.end_to_end_data import (
    CRITEO,
    NUMBERS,
    DataSize,
    categories,
    field_name,
    generate_clicks,
    generate_pairs,
    scattered,
    zipf_ranks,
)
from oarlock.benchmarks.end_to_end_gate import Gate
from oarlock.benchmarks.end_to_end_job import Window, without_member
from oarlock.benchmarks.end_to_end_peers import PEERS, measure_peers
from oarlock.benchmarks.end_to_end_recipe import EndToEndConfig, build, layers, recipe
from oarlock.benchmarks.end_to_end_stages import hidden_share, stages_of, wire_bytes
from oarlock.client.job import TRAINING, JobSpec
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.store import Store
from oarlock.data.categories import hash_array
from oarlock.data.field_keys import field_salt
from oarlock.embedding.hashing import mix64
from oarlock.launch.config import RunConfig
from oarlock.launch.job import make_spec
from oarlock.proto.common_pb2 import Header
from oarlock.proto.coordinator_pb2 import TRAIN, WAIT, CloseSplitRequest, LeaseReply, LeaseRequest
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.methods import PROTOCOL

KEYS = (
    "wdl_inproc_vs_gemm",
    "wdl_ps_vs_gemm",
    "wdl_ps_dense_every_step_vs_gemm",
    "dlrm_inproc_vs_gemm",
    "dlrm_ps_vs_gemm",
    "remote_vs_inproc",
    "ncf_ps_vs_torch",
    "wdl_ps_vs_torch",
    "wdl_bf16_ps_samples_per_s",
    "dense_mode",
    "pull_hidden",
    "bytes_per_sample",
)


# 1. Data


def test_zipf_ranks_follow_the_bounded_law(rng: np.random.Generator) -> None:
    n, size = 50, 200_000
    found = np.bincount(zipf_ranks(rng, n, size, 1.05), minlength=n)
    law = np.arange(1, n + 1) ** -1.05
    expected = law / law.sum() * size
    assert len(found) == n
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max())


def test_scattering_is_a_bijection(rng: np.random.Generator) -> None:
    for n in (1, 2, 3, 10, 997):
        assert sorted(scattered(np.arange(n), n, rng)) == list(range(n))


def test_clicks(tmp_path: Path) -> None:
    size = DataSize(5000, 300, True)
    rows = generate_clicks(tmp_path / "a", size)
    generate_clicks(tmp_path / "b", size)
    arrays = {n: np.load(tmp_path / "a" / f"{n}.npy") for n in ("keys", "ids", "numbers", "label", "existing-fields")}
    for name, array in arrays.items():
        assert np.array_equal(array, np.load(tmp_path / "b" / f"{name}.npy")), name
    assert arrays["keys"].shape == arrays["ids"].shape == (5000, 26)
    assert arrays["numbers"].shape == (5000, NUMBERS)
    # A quarter or so are clicks, and there is a key for every category, met or not.
    assert 0.2 < arrays["label"].mean() < 0.45
    assert rows == len(np.unique(arrays["existing-fields"])) == sum(categories(300))
    assert np.isin(arrays["keys"], arrays["existing-fields"]).all()
    # Ids name rows of one table of all fields, one to one with keys.
    assert len(np.unique(arrays["ids"])) == len(np.unique(arrays["keys"]))
    begin = sum(categories(300)[:3])
    first = int(arrays["ids"][7, 3]) - begin
    code = hash_array(pa.array([first]))[0]
    assert arrays["keys"][7, 3] == mix64(code ^ field_salt(field_name(3)))


def test_only_rows_that_are_met_exist_if_wanted(tmp_path: Path) -> None:
    rows = generate_clicks(tmp_path / "a", DataSize(500, 20_000, False))
    keys = np.load(tmp_path / "a" / "keys.npy")
    assert rows == len(np.unique(keys)) < sum(categories(20_000)) < sum(CRITEO) == sum(categories(0))


# 2. Recipe


def spec_of(folder: Path, **options: object) -> JobSpec:
    name = "oarlock.benchmarks.end_to_end_recipe:recipe"
    run = RunConfig(recipe=name, data=str(folder), servers=1, checkpoint_epochs=0, recipe_options=dict(options))
    return make_spec(run, "test")


def test_encode_takes_the_lines_of_the_arrays(tmp_path: Path) -> None:
    generate_clicks(tmp_path / "a", DataSize(4096, 100, False))
    spec = spec_of(tmp_path / "a", model="dlrm", batch_samples=512)
    assert (spec.splits, spec.rows_per_split, spec.batch_rows, spec.evaluation_splits) == (2, 1024, 512, 0)
    workload = recipe.workload(spec)
    workload.start()
    rows = np.array([5, 4000, 5], np.uint64)
    example = workload.encode({"row": rows}, epoch=0, split=0, batch=0)
    assert np.array_equal(example.keys["fields"], np.load(tmp_path / "a" / "keys.npy")[[5, 4000, 5]])
    assert np.array_equal(example.feeds["numbers"], np.load(tmp_path / "a" / "numbers.npy")[[5, 4000, 5]])
    assert np.array_equal(example.feeds["label"], np.load(tmp_path / "a" / "label.npy")[[5, 4000, 5]])


def test_pairs_are_fed_to_both_lookups(tmp_path: Path) -> None:
    assert generate_pairs(tmp_path / "a", 4096) == 6040 + 3706
    workload = recipe.workload(spec_of(tmp_path / "a", model="ncf", batch_samples=512))
    workload.start()
    example = workload.encode({"row": np.array([9, 1], np.uint64)}, epoch=0, split=0, batch=0)
    pairs = np.load(tmp_path / "a" / "keys.npy")[[9, 1]]
    assert np.array_equal(example.keys["user"], pairs[:, 0])
    assert np.array_equal(example.keys["item"], pairs[:, 1])


@pytest.mark.parametrize("model", ["wdl", "wdl_small", "dlrm", "ncf"])
def test_layers_are_those_of_the_graph(model: str) -> None:
    graph, tables = build(EndToEndConfig(model=model, dim=16))
    weights = sorted(p.shape for p in graph.parameters if len(p.shape) == 2)
    assert sorted(layers(model, 16)) == weights
    assert graph.tables == {t.name: t.dim for t in tables}
    assert {part.optimizer.name for t in tables for part in t.all_parts} == {"rowwise_adagrad"}


def test_unknown_model() -> None:
    with pytest.raises(InvalidArgument, match="wdl_small"):
        EndToEndConfig(model="w&d")


# 3. Gate


class Job:
    """A coordinator that trains, with workers whose questions the test puts."""

    def __init__(self, folder: Path) -> None:
        generate_clicks(folder / "data", DataSize(1 << 14, 50, False))
        self.spec = spec_of(folder / "data", batch_samples=256, batches_per_split=1)
        self.store = Store(folder / "state.sqlite").open()
        self.coordinator = Coordinator(self.store, self.spec, clock=lambda: 0.0, rng=random.Random(0))
        self.coordinator.open()
        self.coordinator.phase = TRAINING
        self.gate = Gate(self.coordinator)
        self._asked: dict[int, int] = {}

    def worker(self, nonce: int) -> int:
        return self.coordinator.join("worker", "", nonce, 1, "here", "arrow").incarnation

    def header(self, worker: int) -> Header:
        c = self.coordinator
        return Header(protocol=PROTOCOL, job=self.spec.job_bytes, run=c.run, sender=worker, term=c.term)

    def lease(self, worker: int, wanted: int, held: tuple[int, ...] = ()) -> LeaseReply:
        self._asked[worker] = self._asked.get(worker, 0) + 1
        request = LeaseRequest(header=self.header(worker), wanted=wanted, number=self._asked[worker], held=held)
        if held:
            request.clock.active = True
        return self.gate.lease(request)

    def close(self, worker: int, split: int, loss: float) -> None:
        request = CloseSplitRequest(header=self.header(worker), work=TRAIN, split=split, groups=1)
        request.samples, request.loss_sum = 256, loss * 256
        self.gate.close_split(request)


def test_a_window_hands_out_its_splits_and_ends_with_the_last(tmp_path: Path) -> None:
    job = Job(tmp_path)
    one, other = job.worker(1), job.worker(2)
    end = job.gate.open(3, {one})
    # Who is not named gets nothing; one that holds something is not kept waiting.
    assert job.lease(other, 2, held=(99,)).work == WAIT
    first = job.lease(one, 2)
    assert (first.work, len(first.splits)) == (TRAIN, 2)
    second = job.lease(one, 2, held=tuple(first.splits))
    assert (second.work, len(second.splits)) == (TRAIN, 1), "more than the window has"
    held = (*first.splits, *second.splits)
    assert job.lease(one, 1, held=held).work == WAIT
    with pytest.raises(InvalidArgument, match="a window is open"):
        job.gate.open(1)
    for number, split in enumerate(held):
        assert not end.done()
        job.close(one, split, number + 0.5)
        job.close(one, split, 9.0)  # a repeated report counts once
    seconds, samples = end.result(timeout=0)
    assert samples == 3 * 256
    assert seconds > 0
    assert job.gate.losses == [(256, 0.5), (256, 1.5), (256, 2.5)]
    job.store.close()


def test_a_question_is_kept_until_a_window_opens(tmp_path: Path) -> None:
    job = Job(tmp_path)
    worker = job.worker(1)
    answer: Future[LeaseReply] = Future()
    asking = threading.Thread(target=lambda: answer.set_result(job.lease(worker, 1)))
    asking.start()
    assert not answer.done()
    job.gate.open(1)
    assert answer.result(timeout=20).work == TRAIN
    asking.join()
    # After the end everybody is answered at once.
    job.gate.shut()
    assert job.lease(worker, 1).work == WAIT
    job.store.close()


def test_epochs_follow_each_other_within_a_window(tmp_path: Path) -> None:
    job = Job(tmp_path)
    worker = job.worker(1)
    end = job.gate.open(job.spec.splits + 1)
    for _ in range(job.spec.splits + 1):
        reply = job.lease(worker, 1)
        assert reply.work == TRAIN
        job.close(worker, reply.splits[0], 0.5)
    assert end.done()
    assert job.coordinator.work.epoch == 1
    job.store.close()


# 4. Figures


def test_what_counters_say() -> None:
    counters = {
        "oarlock_worker_batches_total": 4.0,
        'oarlock_worker_stage_seconds_total{stage="compute"}': 0.1,
        'oarlock_worker_stage_seconds_total{stage="wait_for_pull"}': 0.01,
        "oarlock_worker_pull_seconds_sum": 0.04,
        "oarlock_worker_push_seconds_sum": 0.08,
        'oarlock_rpc_client_sent_bytes_total{method="Shard.Push"}': 600.0,
        'oarlock_rpc_client_received_bytes_total{method="Shard.Pull"}': 424.0,
        'oarlock_rpc_client_sent_bytes_total{method="Coordinator.Lease"}': 1e6,
    }
    windows = [Window(1.0, 512, 1.0, counters), Window(1.0, 512, 1.0, counters)]
    assert stages_of(windows) == {"compute": 25.0, "wait_for_pull": 2.5, "pull": 10.0, "push": 20.0}
    assert hidden_share(windows) == 0.75
    assert wire_bytes(windows) == 2.0
    assert stages_of([Window(1.0, 512, 1.0)]) == {}
    assert hidden_share([]) is None


def test_members_are_added_up() -> None:
    assert without_member('a{worker="1",stage="compute"}') == 'a{stage="compute"}'
    assert without_member('a{worker="1"}') == "a"
    assert without_member("a") == "a"


def test_what_counts_as_learning() -> None:
    falling = [(100, 0.7 - 0.01 * i) for i in range(20)]
    assert ends_of(falling, 2000) == pytest.approx((0.7, 0.53))
    assert ends_of(falling, 1000) == pytest.approx((0.7, 0.62))
    assert ends_of(falling[:1], 50) == pytest.approx((0.7, 0.7))
    assert learns((0.70, 0.52), (0.695, 0.515))
    assert not learns((0.70, 0.60), (0.695, 0.515)), "far behind what the same samples taught in process"
    assert not learns((0.70, 0.71), (0.695, 0.69))
    assert learns((0.70, 0.60), None)
    assert not learns((0.70, 0.75), None)


@pytest.mark.parametrize(
    ("far", "half", "learned"),
    [
        # Behind what came of the same samples in process, but as its twin of as many threads was some batches before.
        (0.53, 0.545, (True, True)),
        (0.53, 0.62, (True, False)),
        # Nothing is learned by falling as one that does not learn.
        (0.66, 0.66, (False, False)),
    ],
)
def test_bfloat16_learns_if_it_does_as_its_twin_that_learns(
    far: float, half: float, learned: tuple[bool, bool], tmp_path: Path
) -> None:
    def job(name: str, end: float) -> Any:
        return SimpleNamespace(name=name, gate=SimpleNamespace(losses=[(2048, 0.7), *[(2048, end)] * 95]))

    case = Case("c", "wdl", tmp_path, tmp_path, inprocess=False, forms=())
    case.ps, case.near, case.half = {"ps_1": job("c_ps_1", far)}, job("c_inproc", 0.52), job("c_ps_bf16", half)
    found = case.learning()
    assert found["c_inproc"]["learns"]
    assert (found["c_ps_1"]["learns"], found["c_ps_bf16"]["learns"]) == learned
    assert found["c_ps_bf16"]["float32"] == [0.7, far]
    assert found["c_ps_1"]["inproc"] == [0.7, 0.52]


# 5. A run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_run_gives_every_key(tmp_path: Path) -> None:
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "oarlock.benchmarks.end_to_end", "--tiny", "--json", "--peers"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == [], "something was left behind"
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["surroundings"]["openblas_coretype"] == {"found": "Haswell", "used": None}
    for key in (*KEYS, *PEERS):
        assert (result[key] is None) == (key in result["why"]), key
    clicks, pairs = result["rows"]["wdl_ps_1"], 6040 + 3706
    expected = {f"{model}_{kind}": clicks for model in ("wdl", "dlrm") for kind in ("ps_1", "ps_2", "inproc")}
    expected |= {"wdl_ps_one": clicks, "wdl_inproc_one": clicks, "ncf_ps_1": pairs, "ncf_ps_2": pairs}
    # Where PyTorch is there is one more.
    assert {name: rows for name, rows in result["rows"].items() if name != "wdl_ps_bf16"} == expected
    for name in ("wdl_ps_1", "wdl_ps_2", "wdl_inproc", "wdl_gemm", "dlrm_ps_1", "ncf_ps_2", "wdl_hidden"):
        assert result["configurations"][name]["samples_per_s"] > 0
    assert result["learning"]["wdl_ps_2"]["samples"] > 0


# 6. Peers

SCRIPT = """
import json, sys
print("something else")
print(json.dumps({"peer": "x", "samples_per_s": 50.0, "samples_per_cpu_s": 20.0, "arguments": sys.argv[1:]}))
"""


def test_peers_are_run_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "tf"):
        (tmp_path / "venvs" / name / "bin").mkdir(parents=True)
        (tmp_path / "venvs" / name / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "peer_torch_rpc.py").write_text(SCRIPT)
    (tmp_path / "peer_tf.py").write_text("raise ValueError('no such CPU')")
    monkeypatch.setenv("OARLOCK_PEERS", str(tmp_path))
    monkeypatch.setenv("PEERS_VENVS", str(tmp_path / "venvs"))
    said: list[str] = []
    ours = {"wdl": {"samples_per_s": 100.0, "samples_per_cpu_s": 30.0}, "ncf": None}
    found, why = measure_peers(ours, tmp_path, said.append)
    assert found["wdl_ps_vs_rpc_per_cpu_s"] == 1.5
    assert found["peers"]["wdl_ps_vs_rpc_per_cpu_s"]["arguments"][:2] == ["--model", "wdl"]
    assert set(why) == {key for key in PEERS if found[key] is None} == set(PEERS) - {"wdl_ps_vs_rpc_per_cpu_s"}
    assert "no such CPU" in why["wdl_ps_vs_tf"]
    assert "peer_paddle_ps.py" in why["wdl_ps_vs_paddle"]
    assert "learned" in why["ncf_ps_vs_rpc"]


def test_peers_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OARLOCK_PEERS", raising=False)
    found, why = measure_peers({"wdl": None, "ncf": None}, tmp_path, print)
    assert all(found[key] is None and "OARLOCK_PEERS" in why[key] for key in PEERS)
