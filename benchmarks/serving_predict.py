# SPDX-License-Identifier: Apache-2.0
"""Predictions of a DLRM by `oarlock serve`, of raw rows by the Open Inference Protocol over gRPC and HTTP, part of the benchmark
`serving`; beside onnxruntime on the exported dense graph alone, where that can be had.

Invariant: what is asked for is raw, so transforms and look-ups are in every figure of Oarlock's, and the wire in those of a
server; the dense graph is given rows that were looked up before. Compared with it, by requests per second of processor time, is
first what a process computes that has the rows, as onnxruntime does (``predict_vs_onnx``), then a server and its client. Each
computes in one thread, in turns, and of the turns' ratios the median counts. Every answer's first occurrence is compared with the
same graph in this process.
"""

import http.client
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oarlock.benchmarks.serving_measures import at_rate
from oarlock.benchmarks.serving_predict_model import FIELDS, MODEL, raw_rows, write_job
from oarlock.benchmarks.serving_sides import Serve, processor_seconds
from oarlock.checkpoint.store import LocalStore
from oarlock.client.job import JobSpec
from oarlock.client.processors import limit_blas
from oarlock.data.transforms import Fitted
from oarlock.launch.prediction import predictor_of
from oarlock.proto.inference_pb2 import ModelInferRequest
from oarlock.proto.rpc import BlockingTransport
from oarlock.serving.features import RawColumns
from oarlock.serving.predictor import Predictor
from oarlock.serving.snapshot import Snapshot, open_snapshot
from oarlock.serving.tensors import Tensor, to_raw
from oarlock.worker.recipe import load_recipe

BATCHES = (1, 32, 256)
HEADLINE = 256
CALLERS = 4
DRAWN = 16
SECONDS = 60.0
TOLERANCE = 1e-6


class Asker(Serve):
    """`oarlock serve` of a job, and requests of it by gRPC and by HTTP."""

    def __init__(self, job: Path) -> None:
        super().__init__(job, "--http", "127.0.0.1:0")
        self._transport = BlockingTransport(frames=False)
        self._http = http.client.HTTPConnection(self.ready["http"], timeout=SECONDS)

    def by_grpc(self, request: ModelInferRequest) -> NDArray[np.float32]:
        method = "GRPCInferenceService.ModelInfer"
        reply = self._transport.call(self.ready["address"], method, request, timeout_seconds=SECONDS)
        return np.frombuffer(reply.raw_output_contents[0], np.float32)

    def by_http(self, request: ModelInferRequest) -> NDArray[np.float32]:
        """The same values as binary tensor data."""
        raw = request.raw_input_contents
        inputs = [
            {
                "name": i.name,
                "datatype": i.datatype,
                "shape": list(i.shape),
                "parameters": {"binary_data_size": len(data)},
            }
            for i, data in zip(request.inputs, raw, strict=True)
        ]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        header = {"Inference-Header-Content-Length": str(len(head))}
        self._http.request("POST", f"/v2/models/{MODEL}/infer", head + b"".join(raw), header)
        response = self._http.getresponse()
        data = response.read()
        return np.frombuffer(data[int(response.headers["Inference-Header-Content-Length"]) :], np.float32)

    def close(self) -> None:
        self._http.close()
        self._transport.close()
        super().close()


def request_of(tensors: list[Tensor]) -> ModelInferRequest:
    """Return the request for predictions of raw rows."""
    request = ModelInferRequest(model_name=MODEL, raw_input_contents=[to_raw(tensor) for tensor in tensors])
    for tensor in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return request


def measure_predictions(folder: Path, rows: int, *, seconds: float, turns: int, seed: int) -> dict[str, Any]:
    """Return the figures of predictions: of each size of batch, and the headlines."""
    spec = write_job(folder, rows, seed=seed)
    job = folder / "job"
    store = LocalStore(job / "checkpoints")
    snapshot = open_snapshot(store, store.load_manifest(None))
    rng = np.random.default_rng(seed + 1)
    by_batch: dict[str, Any] = {}
    failed, ratios, why = 0, dict[str, float](), ""
    with limit_blas(1):
        twin = predictor_of(snapshot.manifest, job=job)
        asker = Asker(job)
        try:
            for batch in BATCHES:
                drawn = [raw_rows(batch, max(1, rows // FIELDS), rng) for _ in range(DRAWN)]
                requests = [request_of(tensors) for tensors in drawn]
                for tensors, request in zip(drawn, requests, strict=True):
                    arrays, count = twin.columns.read({tensor.name: tensor for tensor in tensors})
                    right = twin.predict(snapshot, arrays, count).scores
                    failed += sum(_differs(ask(request), right) for ask in (asker.by_grpc, asker.by_http))
                by_batch[str(batch)] = _measure_batch(asker, requests, seconds, turns)
                if batch == HEADLINE:
                    sides = {"raw": _computing(twin, snapshot, drawn), "http": asker.by_http, "grpc": asker.by_grpc}
                    ratios, why = _against_onnx(sides, asker.pid, requests, drawn, snapshot, spec, seconds, turns)
        finally:
            asker.close()
    return {
        "predict_p99_ms": by_batch[str(HEADLINE)]["grpc"]["p99_ms"],
        "predict_vs_onnx": ratios.get("raw"),
        "predict_http_vs_onnx": ratios.get("http"),
        "predict_grpc_vs_onnx": ratios.get("grpc"),
        "predict": {"rows": snapshot.rows, "by_batch": by_batch, "failed": failed, "why_no_onnx": why or None},
    }


def _differs(found: NDArray[np.float32], right: NDArray[np.float32]) -> int:
    return int(found.shape != right.shape or bool(np.abs(found - right).max() > TOLERANCE))


def _measure_batch(asker: Asker, requests: list[Any], seconds: float, turns: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, ask in (("grpc", asker.by_grpc), ("http", asker.by_http)):
        rate = statistics.median(_rate(ask, requests, seconds) for _ in range(turns))
        late = np.concatenate([at_rate(ask, requests, rate / 2, seconds) for _ in range(turns)])
        made[name] = {"requests_per_second": round(rate, 1)}
        made[name] |= {f"p{100 * q:g}_ms": round(1e3 * float(np.quantile(late, q)), 3) for q in (0.5, 0.99)}
    made["grpc_callers"] = CALLERS
    made["grpc_requests_per_second_of_all"] = round(_rate_of_many(asker, requests, seconds), 1)
    return made


def _rate(ask: Callable[[Any], Any], requests: list[Any], seconds: float) -> float:
    """Return requests per second of one caller that asks one after the other."""
    ask(requests[0])
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        ask(requests[done % len(requests)])
        done += 1
    return done / (time.perf_counter() - begun)


def _rate_of_many(asker: Asker, requests: list[Any], seconds: float) -> float:
    rates: list[float] = []
    threads = [Thread(target=lambda: rates.append(_rate(asker.by_grpc, requests, seconds))) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def _computing(twin: Predictor, snapshot: Snapshot, drawn: list[list[Tensor]]) -> Callable[[Any], Any]:
    """Return what predicts in this process, of raw rows as a request has them: given any, it takes the next ones."""
    named = itertools.cycle([{tensor.name: tensor for tensor in tensors} for tensors in drawn])

    def predict(_: object) -> Any:
        return twin.predict(snapshot, *twin.columns.read(next(named)))

    return predict


def _against_onnx(
    sides: dict[str, Callable[[Any], Any]],
    pid: int,
    requests: list[Any],
    drawn: list[list[Tensor]],
    snapshot: Snapshot,
    spec: JobSpec,
    seconds: float,
    turns: int,
) -> tuple[dict[str, float], str]:
    """Return how many requests each side answers for one of onnxruntime's on the dense graph, and why that is not known."""
    # It tells its maker of its use otherwise, and leaves a file where temporary ones are.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        runtime = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")
        dense_graph = importlib.import_module("oarlock.export.onnx").dense_graph
    except ImportError as error:
        return {}, f"{error}: the dense graph cannot be exported and run"
    model = load_recipe(spec.recipe).workload(spec).model
    fitted = Fitted.from_json(spec.transforms)
    columns = RawColumns(fitted.inputs)
    program = model.bind(1)
    program.flat_parameters[:] = snapshot.dense
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    data = dense_graph(model, program.parameters).SerializeToString()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feeds = []
    (lookup,) = model.lookups
    for tensors in drawn:
        arrays, count = columns.read({tensor.name: tensor for tensor in tensors})
        features = fitted.apply(arrays, label=False)
        rows = np.empty((features.keys.size, lookup.dim), np.float32)
        snapshot.lookup(lookup.table, features.keys.reshape(-1), rows)
        feeds.append({lookup.name: rows.reshape(count, -1), "numbers": features.dense})
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        alone = _processor_rate(lambda feed: session.run(["score"], feed), feeds, seconds, pid)
        for name, ask in sides.items():
            ratios[name].append(_processor_rate(ask, requests, seconds, pid) / alone)
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}, ""


def _processor_rate(ask: Callable[[Any], Any], requests: list[Any], seconds: float, pid: int) -> float:
    """Return requests per second of processor time of this process and the server, which stands still if it is not asked."""
    for request in requests:
        ask(request)
    server, client, begun, done = processor_seconds(pid), time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or done < len(requests):
        ask(requests[done % len(requests)])
        done += 1
    return done / (time.process_time() - client + processor_seconds(pid) - server)
