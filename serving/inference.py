# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol over gRPC: messages in, messages out; what they ask for is answered by models.py.

Invariant: values come raw or as contents, all inputs in one of these ways, and go back in the way in which they came. Called from
many threads at once.
"""

from typing import Any

from oarlock.proto.errors import Malformed, NotFound, Unavailable
from oarlock.proto.inference_pb2 import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from oarlock.serving.models import EXTENSIONS, MAX_ID, MAX_INPUTS, PLATFORM, SERVER, Answer, Described, Models, text_of
from oarlock.serving.tensors import DATATYPES, Tensor, from_contents, from_raw, to_raw


class InferenceService:
    """Answers for ``models``."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def server_live(self, request: ServerLiveRequest) -> ServerLiveResponse:
        """Say that the process lives."""
        return ServerLiveResponse(live=True)

    def server_ready(self, request: ServerReadyRequest) -> ServerReadyResponse:
        """Say whether a model is open."""
        return ServerReadyResponse(ready=self.models.ready)

    def model_ready(self, request: ModelReadyRequest) -> ModelReadyResponse:
        """Say whether a model, of a version, can be asked."""
        try:
            return ModelReadyResponse(ready=self.models.is_ready(request.name, request.version))
        except (NotFound, Unavailable):
            return ModelReadyResponse(ready=False)

    def server_metadata(self, request: ServerMetadataRequest) -> ServerMetadataResponse:
        """Say who answers."""
        return ServerMetadataResponse(name=SERVER, version=self.models.server_version, extensions=EXTENSIONS)

    def model_metadata(self, request: ModelMetadataRequest) -> ModelMetadataResponse:
        """Say what a model takes and gives."""
        found = self.models.metadata(request.name, request.version)
        return ModelMetadataResponse(
            name=found.name,
            versions=[found.version],
            platform=PLATFORM,
            inputs=[_described(each) for each in found.inputs],
            outputs=[_described(each) for each in found.outputs],
        )

    def model_infer(self, request: ModelInferRequest) -> ModelInferResponse:
        """Answer for one model."""
        if len(request.id) > MAX_ID:
            raise Malformed(f"an id has {len(request.id)} characters; the limit is {MAX_ID}")
        outputs = [each.name for each in request.outputs]
        found = self.models.infer(request.model_name, request.model_version, _inputs(request), outputs)
        raw = bool(request.raw_input_contents)
        return _response(found, request.id, raw)


def _described(tensor: Described) -> Any:
    return ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _inputs(request: ModelInferRequest) -> list[Tensor]:
    given, raw = request.inputs, request.raw_input_contents
    if len(given) > MAX_INPUTS:
        raise Malformed(f"a request has {len(given)} inputs; the limit is {MAX_INPUTS}")
    if not raw:
        return [from_contents(each.name, each.datatype, each.shape, each.contents) for each in given]
    if len(raw) != len(given):
        raise Malformed(f"{len(raw)} raw_input_contents came for {len(given)} inputs: give one for each")
    if any(each.HasField("contents") for each in given):
        raise Malformed("an input has contents beside raw_input_contents: give one of them")
    return [from_raw(each.name, each.datatype, each.shape, data) for each, data in zip(given, raw, strict=True)]


def _response(found: Answer, identity: str, raw: bool) -> ModelInferResponse:
    response = ModelInferResponse(model_name=found.name, model_version=text_of(found.version), id=identity)
    for name, value in found.parameters.items():
        made = InferParameter(double_param=value) if isinstance(value, float) else InferParameter(int64_param=value)
        response.parameters[name].CopyFrom(made)
    for tensor in found.outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            response.raw_output_contents.append(to_raw(tensor))
        else:
            getattr(output.contents, DATATYPES[tensor.datatype][1]).extend(tensor.values.reshape(-1).tolist())
    return response
