# SPDX-License-Identifier: Apache-2.0
"""Anything at all as a request of the Open Inference Protocol: an answer or a refusal, never a defect, and no memory that stays.

HTTP goes through the reader of heads, the routes and the bodies as it does behind a socket, and some of it through one; gRPC
through the parser of messages and the service, as behind the port.
"""

import gc
import json
import random
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from http_rig import Http, binary_body, keys_body
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predict_rig import Job
from serving_rig import served

from oarlock.proto.errors import Internal, Malformed, PSError
from oarlock.proto.inference_pb2 import ModelInferRequest
from oarlock.proto.methods import INFERENCE, METHODS
from oarlock.proto.rpc import to_status
from oarlock.proto.transport import dispatch
from oarlock.serving.http_request import Refused, parse_head
from oarlock.serving.inference import InferenceService
from oarlock.serving.rest import ROUTES
from oarlock.serving.tensors import DATATYPES, to_raw
from oarlock.telemetry.system import memory

METHODS_OF = [m for m in METHODS.values() if m.service == INFERENCE]
SLOW_INPUTS = 110_000
# Beside what the allocator keeps for the next ones.
MOST_GROWTH = 24 << 20


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = Job("dlrm", tmp_path_factory.mktemp("dlrm"))
    for made in served(Http, job.store, job.predictor()):
        made.job = job
        yield made


def ask_http(http: Http, data: bytes) -> int:
    """Give the bytes of one request to what reads them; return the status. A defect fails."""
    head, _, body = data.partition(b"\r\n\r\n")
    try:
        request = parse_head(head)
    except Refused as refused:
        return check_refused(refused)
    request = request._replace(body=memoryview(body))
    response = http.rest.admit(request) or http.rest.answer(request)
    if response.status != HTTPStatus.OK:
        assert response.status < 500 or response.status == HTTPStatus.SERVICE_UNAVAILABLE, response
        assert list(json.loads(response.parts[0])) == ["error"]
    return int(response.status)


def ask_grpc(service: InferenceService, method: Any, data: bytes) -> str:
    """Give the bytes of one message to the service; return the name of what came of it."""
    try:
        try:
            request = method.request.FromString(data)
        except DecodeError as error:
            raise Malformed("no such message") from error
        return type(dispatch(service, method.name, request)).__name__
    except PSError as error:
        return check_error(error)


def check_refused(refused: Refused) -> int:
    assert 400 <= refused.status <= 501
    return int(refused.status)


def check_error(error: PSError) -> str:
    assert not isinstance(error, Internal), error.__cause__
    to_status(error)
    return type(error).__name__


# What is nearly right

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4).map(str),
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
names = st.one_of(st.sampled_from(["age", "spent", "city", "item", "keys", "score"]), st.text(max_size=8))
types = st.one_of(st.sampled_from([*DATATYPES, "BF16", ""]), st.text(max_size=8))
shapes = st.one_of(st.lists(st.integers(-2, 5), max_size=3), anything)


def tensor(data: Any) -> Any:
    parameters = st.one_of(
        st.none(), st.fixed_dictionaries({"binary_data_size": st.one_of(st.integers(-1, 64), anything)}), anything
    )
    return st.fixed_dictionaries(
        {"name": st.one_of(names, anything), "datatype": st.one_of(types, anything), "shape": shapes},
        optional={"data": data, "parameters": parameters},
    )


data = st.one_of(st.lists(scalars, max_size=5), st.lists(st.lists(scalars, max_size=3), max_size=3), anything)
bodies = st.one_of(
    anything,
    st.fixed_dictionaries(
        {"inputs": st.one_of(st.lists(tensor(data), max_size=5), anything)},
        optional={
            "id": anything,
            "outputs": st.one_of(st.lists(tensor(data), max_size=2), anything),
            "parameters": anything,
        },
    ),
)


def request_of(path: str, body: bytes, length: Any = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    if length is not None:
        lines.append(f"Inference-Header-Content-Length: {length}")
    return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + body


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(body=bodies, rest=st.binary(max_size=64), binary=st.booleans(), model=st.sampled_from(["dlrm", "fields", "x"]))
def test_bodies_that_are_nearly_right(http: Http, body: Any, rest: bytes, binary: bool, model: str) -> None:
    head = json.dumps(body).encode()
    ask_http(
        http, request_of(f"/v2/models/{model}/infer", head + (rest if binary else b""), len(head) if binary else None)
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_at_all(http: Http, data: bytes) -> None:
    ask_http(http, data)
    ask_http(http, b"GET /v2 HTTP/1.1\r\n" + data)
    ask_http(http, request_of("/v2/models/fields/infer", data))
    service = InferenceService(http.models)
    for method in METHODS_OF:
        ask_grpc(service, method, data)


# What was right and was changed


def http_seeds(http: Any) -> list[bytes]:
    job = http.job
    few = [t._replace(values=t.values.take(np.arange(3)), shape=(3,)) for t in job.inputs]
    inputs = [
        {"name": t.name, "datatype": "BYTES", "shape": [3], "data": [v.decode() for v in t.values.to_pylist()]}
        for t in few
    ]
    body, header = binary_body(
        [(t.name, t.datatype, t.shape, to_raw(t)) for t in few], parameters={"binary_data_output": True}
    )
    keys, of_keys = binary_body([("keys", "INT32", (2,), np.arange(2, dtype="<i4").tobytes())])
    seeds = [
        request_of("/v2/models/dlrm/infer", json.dumps({"id": "1", "inputs": inputs}).encode()),
        request_of("/v2/models/dlrm/infer", body, *header.values()),
        request_of("/v2/models/fields/infer", json.dumps(keys_body([1, 2, 3])).encode()),
        request_of("/v2/models/fields/infer", keys, *of_keys.values()),
    ]
    paths = ["/v2" + "".join(f"/{p}" for p in r.path) for r in ROUTES if r.method == "GET"]
    return seeds + [f"GET {p.replace('NAME', 'dlrm')} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for p in paths]


def grpc_seeds(http: Any) -> list[tuple[Any, bytes]]:
    named = {m.name.split(".")[1]: m for m in METHODS_OF}
    infer = named["ModelInfer"].request
    raw, contents = infer(model_name="dlrm", id="1"), infer(model_name="dlrm")
    for t in http.job.inputs:
        few = t._replace(values=t.values.take(np.arange(3)), shape=(3,))
        raw.inputs.add(name=t.name, datatype=t.datatype, shape=[3])
        raw.raw_input_contents.append(to_raw(few))
        contents.inputs.add(name=t.name, datatype=t.datatype, shape=[3]).contents.bytes_contents.extend(
            few.values.to_pylist()
        )
    keys = infer(model_name="fields")
    keys.inputs.add(name="keys", datatype="UINT64", shape=[2]).contents.uint64_contents.extend([1, 2])
    raw_keys = infer(model_name="fields", raw_input_contents=[np.arange(2, dtype="<u8").tobytes()])
    raw_keys.inputs.add(name="keys", datatype="UINT64", shape=[2])
    seeds = [(named["ModelInfer"], message.SerializeToString()) for message in (raw, contents, keys, raw_keys)]
    for name in ("ModelMetadata", "ModelReady"):
        seeds.append((named[name], named[name].request(name="dlrm", version="0.1").SerializeToString()))
    return seeds + [(named[n], b"") for n in ("ServerLive", "ServerReady", "ServerMetadata")]


def changed(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return bytes that are like these: cut, flipped, doubled, with pieces of others."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0:
                del out[at:]
            case 1 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                del out[at : at + rng.randint(1, 16)]
            case 4:
                out[at:at] = out[at : at + rng.randint(1, 64)]
            case 5:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                out[at : at + 16] = other[begin : begin + 16]
            case _:
                out[at : at + 1] = rng.choice(
                    (b"0", b"-1", b"null", b"1e999", b"[", b"{", b'"', b"\xff", b"18446744073709551616")
                )
    return bytes(out)


def shaken(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes of a request for an inference that is one, and says something else."""
    message = ModelInferRequest.FromString(data)
    for _ in range(rng.randint(1, 3)):
        each = rng.choice(message.inputs) if message.inputs else message.inputs.add()
        match rng.randrange(7):
            case 0 if message.raw_input_contents:
                at = rng.randrange(len(message.raw_input_contents))
                message.raw_input_contents[at] = changed(rng, message.raw_input_contents[at], [b"\0\0\0\xff"])
            case 1:
                each.shape[:] = [rng.choice((0, 1, 2, 3, -1, 1 << 20, 1 << 62)) for _ in range(rng.randrange(4))]
            case 2:
                each.datatype = rng.choice([*DATATYPES, "", "BF16"])
            case 3:
                each.name = rng.choice(("age", "city", "keys", "", "x" * 300))
            case 4:
                message.model_name = rng.choice(("dlrm", "fields", "", "\0"))
            case 5 if len(message.raw_input_contents) == len(message.inputs) > 1:
                del message.inputs[-1], message.raw_input_contents[-1]
            case _:
                each.contents.fp32_contents.extend([float("nan"), float("inf"), 1.0][: rng.randrange(4)])
    return bytes(message.SerializeToString())


def attack(http: Any, count: int, seed: int) -> dict[str, int]:
    """Give ``count`` changed requests; return how often each thing came of them."""
    rng, found = random.Random(seed), dict[str, int]()
    over_http, over_grpc = http_seeds(http), grpc_seeds(http)
    messages, service = [data for _, data in over_grpc], InferenceService(http.models)
    for number in range(count):
        if number % 2:
            method, data = rng.choice(over_grpc)
            which = rng.random()
            if method.request is ModelInferRequest and which < 0.5:
                data = shaken(rng, data)
            else:
                data = changed(rng, data, messages) if which < 0.95 else rng.randbytes(rng.randint(0, 80))
            came = ask_grpc(service, method, data)
        else:
            data = rng.choice(over_http)
            head, _, body = data.partition(b"\r\n\r\n")
            if body and rng.random() < 0.7:
                # A body that is changed is to come through the head.
                body = changed(rng, body, [each.partition(b"\r\n\r\n")[2] or b" " for each in over_http])
                data = head + b"\r\n\r\n" + body
            else:
                data = changed(rng, data, over_http)
            came = str(ask_http(http, data))
        found[came] = found.get(came, 0) + 1
    return found


def test_some_hundreds_of_changed_requests(http: Any) -> None:
    found = attack(http, 800, seed=1)
    assert found["200"] > 20, found
    assert found["400"] > 20, found
    assert found["ModelInferResponse"] > 20, found
    assert found["Malformed"] > 20, found


def test_a_port_lives_on_after_any_bytes(http: Any) -> None:
    rng, seeds = random.Random(2), http_seeds(http)
    for _ in range(60):
        data = changed(rng, rng.choice(seeds), seeds)
        if b"\r\n\r\n" not in data:
            data += b"\r\n\r\n"
        http.raw(data)
    assert http.json("POST", "/v2/models/fields/infer", keys_body([1]))[0] == 200
    assert set(http.server.answered) <= {200, 400, 401, 404, 405, 413, 415, 417, 431, 501, 503}, http.server.answered


@pytest.mark.slow
@pytest.mark.timeout(570)
def test_a_hundred_thousand_changed_requests_leave_nothing(http: Any) -> None:
    attack(http, 20_000, seed=3)
    gc.collect()
    before = memory()[1]
    found = attack(http, SLOW_INPUTS, seed=4)
    gc.collect()
    grown = memory()[1] - before
    assert sum(found.values()) == SLOW_INPUTS >= 100_000
    assert min(found["200"], found["ModelInferResponse"]) > 1000, found
    assert grown < MOST_GROWTH, f"{grown} bytes more are in RAM: {found}"
