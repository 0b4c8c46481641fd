# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol over gRPC, by a public client of it where there is one, and by messages made by hand."""

from typing import Any

import grpc
import numpy as np
import pytest
import serving_rig
from predict_rig import Job
from security_rig import bearer, opened, raw, texts_of, write_tokens
from serving_rig import check_under_swaps, loaded, served

from oarlock.proto import inference_pb2
from oarlock.proto.inference_pb2 import ModelInferRequest, ModelInferResponse
from oarlock.proto.methods import INFERENCE, METHODS
from oarlock.proto.rpc import GrpcServer
from oarlock.serving.handlers import Handlers
from oarlock.serving.inference import InferenceService
from oarlock.serving.models import Models
from oarlock.serving.service import ServingService
from oarlock.serving.swap import Serving
from oarlock.serving.tensors import to_raw


class Server:
    """A server of what ``serving`` serves, as oarlock serve has it."""

    def __init__(self, serving: Serving, predictor: Any = None, **options: Any) -> None:
        self.serving = serving
        service = ServingService(serving)
        self.models = Models(service)
        self.models.begin(predictor)
        handler = Handlers(service, InferenceService(self.models))
        self.server = GrpcServer(handler, "Serving", listen="127.0.0.1:0", **options)
        self.address = self.server.start()
        self.channel = grpc.insecure_channel(self.address)

    def call(self, name: str, request: Any, metadata: Any = ()) -> Any:
        method = METHODS[f"{INFERENCE}.{name}"]
        ask = self.channel.unary_unary(method.path, lambda m: m.SerializeToString(), method.reply.FromString)
        return ask(request, timeout=20, metadata=metadata)

    def refusal(self, name: str, request: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as found:
            self.call(name, request)
        return found.value.code(), found.value.details()

    def close(self) -> None:
        self.channel.close()
        self.server.stop(0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job("dlrm", tmp_path_factory.mktemp("dlrm"))


@pytest.fixture
def predicting(job: Job) -> Any:
    yield from served(Server, job.store, job.predictor())


@pytest.fixture
def rows(model: Any) -> Any:
    yield from served(Server, model.store)


def infer(name: str, inputs: list[Any], raw_form: bool = True, **more: Any) -> ModelInferRequest:
    request = ModelInferRequest(model_name=name, **more)
    for tensor in inputs:
        made = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw_form:
            request.raw_input_contents.append(to_raw(tensor))
        elif tensor.datatype == "BYTES":
            made.contents.bytes_contents.extend(tensor.values.to_pylist())
        else:
            made.contents.uint64_contents.extend(tensor.values.tolist())
    return request


def keys_request(keys: Any, **more: Any) -> ModelInferRequest:
    request = ModelInferRequest(model_name="user", **more)
    request.inputs.add(name="keys", datatype="UINT64", shape=[len(keys)])
    request.raw_input_contents.append(np.asarray(keys, "<u8").tobytes())
    return request


@pytest.mark.parametrize("raw_form", [True, False])
def test_predictions_are_those_of_the_evaluation(predicting: Server, job: Job, raw_form: bool) -> None:
    answer = predicting.call("ModelInfer", infer("dlrm", job.inputs, raw_form, id="mine"))
    assert (answer.model_name, answer.model_version, answer.id) == (
        "dlrm",
        f"{job.manifest.run}.{job.manifest.cut}",
        "mine",
    )
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("score", "FP32", [len(job.scores)])
    if raw_form:
        found = np.frombuffer(answer.raw_output_contents[0], "<f4")
        assert not output.HasField("contents")
    else:
        found = np.array(output.contents.fp32_contents, np.float32)
        assert not answer.raw_output_contents
    assert np.abs(found - job.scores).max() <= 1e-6
    assert answer.parameters["cut"].int64_param == job.manifest.cut
    assert answer.parameters["seconds_since"].double_param > 0
    assert answer.parameters["missing"].int64_param > 0, "the test's cities that training never saw"


def test_metadata_say_what_to_give(predicting: Server) -> None:
    found = predicting.call("ModelMetadata", inference_pb2.ModelMetadataRequest(name="dlrm"))
    inputs = {each.name: (each.datatype, list(each.shape)) for each in found.inputs}
    assert inputs == {"age": ("FP32", [-1]), "spent": ("FP32", [-1]), "city": ("BYTES", [-1]), "item": ("BYTES", [-1])}
    assert [(each.name, each.datatype) for each in found.outputs] == [("score", "FP32")]
    table = predicting.call("ModelMetadata", inference_pb2.ModelMetadataRequest(name="fields"))
    assert [(each.name, each.datatype, list(each.shape)) for each in table.outputs] == [("rows", "FP32", [-1, 8])]
    server = predicting.call("ServerMetadata", inference_pb2.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("oarlock", ["binary_tensor_data"])
    assert predicting.call("ServerLive", inference_pb2.ServerLiveRequest()).live
    assert predicting.call("ServerReady", inference_pb2.ServerReadyRequest()).ready
    ready = [
        predicting.call("ModelReady", inference_pb2.ModelReadyRequest(name=name, version=version)).ready
        for name, version in (("dlrm", ""), ("fields", found.versions[0]), ("dlrm", "9.9"), ("other", ""))
    ]
    assert ready == [True, True, False, False]


def test_rows_of_tables_by_key(rows: Server, model: Any) -> None:
    answer = rows.call("ModelInfer", keys_request([*model.keys[:5], 10**15], model_version="0.1"))
    found = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
    assert (found[:5] == serving_rig.value_of(1, model.keys[:5])[:, None]).all()
    assert answer.parameters["missing"].int64_param == 1
    assert not len(rows.call("ModelInfer", keys_request([])).raw_output_contents[0])


def test_what_is_wrong_is_said(rows: Server) -> None:
    def said(request: ModelInferRequest) -> str:
        code, words = rows.refusal("ModelInfer", request)
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), words
        return f"{code.name}: {words}"

    assert (
        said(ModelInferRequest(model_name="nothing"))
        == "NOT_FOUND: there is no model 'nothing'; the models are user, item"
    )
    assert "has no version '3.7' here; 0.1 is served" in said(keys_request([1], model_version="3.7"))
    assert "one input, 'keys'; given were none" in said(ModelInferRequest(model_name="user"))
    wrong = keys_request([1, 2])
    wrong.inputs[0].shape[:] = [3]
    assert "16 bytes are not what its datatype and shape [3] say" in said(wrong)
    wrong.inputs[0].shape[:] = [1 << 40]
    assert "a dimension of 1099511627776" in said(wrong)
    wrong.inputs[0].shape[:] = [-2]
    assert "a dimension of -2" in said(wrong)
    wrong = keys_request([1])
    wrong.inputs[0].datatype = "FP64"
    assert "give UINT64 of shape [n], not FP64[1]" in said(wrong)
    wrong.inputs[0].datatype = "KEYS"
    assert "datatype 'KEYS': give one of BOOL," in said(wrong)
    wrong = keys_request([1])
    wrong.raw_input_contents.append(b"")
    assert "2 raw_input_contents came for 1 inputs" in said(wrong)
    wrong = keys_request([1])
    wrong.inputs[0].contents.uint64_contents.append(1)
    assert "has contents beside raw_input_contents" in said(wrong)
    wrong = keys_request([1])
    wrong.outputs.add(name="score")
    assert "has no output 'score'" in said(wrong)
    negative = ModelInferRequest(model_name="user")
    negative.inputs.add(name="keys", datatype="INT64", shape=[2]).contents.int64_contents.extend([1, -1])
    assert "row 1, column 'keys': -1 is negative" in said(negative)


def test_nobody_is_answered_before_the_model_is_warm(model: Any) -> None:
    service = InferenceService(Models(ServingService(loaded(model.store))))
    assert not service.server_ready(inference_pb2.ServerReadyRequest()).ready
    assert not service.model_ready(inference_pb2.ModelReadyRequest(name="user")).ready


def test_inference_is_not_among_what_is_counted_a_second(model: Any, tmp_path: Any) -> None:
    path = write_tokens(tmp_path / "tokens")
    server = Server(loaded(model.store), security=opened(token_file=path, read_requests_per_second=2.0))
    metadata = bearer(texts_of(path)["read"])
    try:
        for _ in range(20):
            server.call("ModelInfer", keys_request([1]), metadata)
        path_of = METHODS[f"{INFERENCE}.ServerMetadata"].path
        codes = [raw(server.channel, path_of, metadata)[0].name for _ in range(6)]
        assert "UNAVAILABLE" in codes
    finally:
        server.close()


def test_answers_under_swaps_are_of_one_cut_each(rows: Server, model: Any) -> None:
    def ask() -> tuple[int, Any, Any]:
        answer: ModelInferResponse = rows.call("ModelInfer", keys_request(model.keys))
        cut = answer.parameters["cut"].int64_param
        assert answer.model_version == f"0.{cut}"
        return cut, model.keys, np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(-1, 4)

    check_under_swaps(rows.serving, model, 7, ask)


# A public client


def test_the_fields_are_those_of_the_public_messages() -> None:
    public = pytest.importorskip("tritonclient.grpc.service_pb2")

    def numbers(message: Any) -> dict[str, Any]:
        return {f.name: (f.number, f.type, f.is_repeated) for f in message.fields}

    def compare(mine: Any, theirs: Any) -> None:
        have = numbers(theirs)
        for name, value in numbers(mine).items():
            assert have[name] == value, (mine.full_name, name)
        for name, nested in mine.nested_types_by_name.items():
            compare(nested, theirs.nested_types_by_name[name])

    for name, message in inference_pb2.DESCRIPTOR.message_types_by_name.items():
        theirs = public.DESCRIPTOR.message_types_by_name[name]
        assert message.full_name == theirs.full_name
        compare(message, theirs)


def test_a_public_client_predicts_and_looks_up(predicting: Server, job: Job) -> None:
    public = pytest.importorskip("tritonclient.grpc")
    client = public.InferenceServerClient(predicting.address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("dlrm")
        metadata = client.get_model_metadata("dlrm")
        inputs = []
        for tensor in job.inputs:
            told = next(each.datatype for each in metadata.inputs if each.name == tensor.name)
            texts = [value.decode() for value in tensor.values.to_pylist()]
            if told == "FP32":
                values = np.array([float(text or "nan") for text in texts], np.float32)
            else:
                values = np.array([text.encode() for text in texts], np.object_)
            made = public.InferInput(tensor.name, [len(values)], told)
            made.set_data_from_numpy(values)
            inputs.append(made)
        answer = client.infer("dlrm", inputs, model_version=metadata.versions[0])
        assert np.abs(answer.as_numpy("score") - job.scores).max() <= 1e-6
        assert answer.get_response().model_version == metadata.versions[0]
        keys = public.InferInput("keys", [3], "UINT64")
        keys.set_data_from_numpy(np.array([1, 2, 3], np.uint64))
        assert client.infer("fields", [keys]).as_numpy("rows").shape == (3, 8)
        with pytest.raises(Exception, match=r"has no version '7\.7' here"):
            client.infer("fields", [keys], model_version="7.7")
    finally:
        client.close()


class Rows:
    """Tables of another make than a snapshot's, as a job that is followed has them."""

    def __init__(self, snapshot: Any) -> None:
        self.job, self.part, self.version, self.tables = snapshot.job, snapshot.part, snapshot.version, snapshot.tables
        self.table, self.rows, self.nbytes, self.copies = snapshot.table, snapshot.rows, snapshot.nbytes, 1


def test_tables_that_are_no_snapshots_give_rows_and_no_predictions(model: Any) -> None:
    serving: Any = loaded(model.store)
    live = Rows(serving.current)
    serving._snapshot = live
    server = Server(serving)
    try:
        answer = server.call("ModelInfer", keys_request(model.keys))
        found = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(-1, 4)
        assert (found == serving_rig.value_of(1, model.keys)[:, None]).all()
    finally:
        server.close()
