# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol over HTTP: JSON, binary tensor data, every refusal by its status, and a public client."""

import json
import re
from typing import Any

import numpy as np
import pytest
import serving_rig
from http_rig import Http, binary_body, keys_body, values_of
from predict_rig import Job
from serving_rig import check_under_swaps, loaded, served

from oarlock.serving.openapi import path_of
from oarlock.serving.rest import ROUTES, STATUS
from oarlock.serving.tensors import to_raw


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job("wide_deep", tmp_path_factory.mktemp("wide_deep"))


@pytest.fixture
def predicting(job: Job) -> Any:
    yield from served(Http, job.store, job.predictor())


@pytest.fixture
def rows(model: Any) -> Any:
    yield from served(Http, model.store)


def json_inputs(job: Job, count: int) -> list[dict[str, Any]]:
    """Raw rows as a person would write them: numbers as numbers, null where one is missing."""
    inputs = []
    for tensor in job.inputs:
        texts = [value.decode() for value in tensor.values.to_pylist()[:count]]
        numbers = tensor.name in ("age", "spent")
        data = [float(text) if text else None for text in texts] if numbers else texts
        if tensor.name == "item":
            data = [int(text) for text in texts]
        told = {"age": "FP64", "spent": "FP64", "city": "BYTES", "item": "INT64"}[tensor.name]
        inputs.append({"name": tensor.name, "datatype": told, "shape": [count], "data": data})
    return inputs


def test_predictions_by_json_are_those_of_the_evaluation(predicting: Http, job: Job) -> None:
    status, answer = predicting.json(
        "POST", "/v2/models/wide_deep/infer", {"id": "7", "inputs": json_inputs(job, len(job.scores))}
    )
    assert status == 200, answer
    assert np.abs(values_of(answer) - job.scores).max() <= 1e-6
    assert (answer["id"], answer["model_name"]) == ("7", "wide_deep")
    assert answer["model_version"] == f"{job.manifest.run}.{job.manifest.cut}"
    assert answer["parameters"]["cut"] == job.manifest.cut
    assert answer["parameters"]["missing"] > 0


def test_predictions_by_binary_data_are_those_of_the_evaluation(predicting: Http, job: Job) -> None:
    tensors = [(t.name, t.datatype, t.shape, to_raw(t)) for t in job.inputs]
    body, header = binary_body(tensors, outputs=[{"name": "score", "parameters": {"binary_data": True}}])
    status, headers, data = predicting.ask("POST", "/v2/models/wide_deep/infer", body, header)
    size = int(headers["Inference-Header-Content-Length"])
    answer = json.loads(data[:size])
    assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": len(data) - size}
    assert np.abs(np.frombuffer(data[size:], "<f4") - job.scores).max() <= 1e-6


def test_one_row_and_none(predicting: Http, job: Job) -> None:
    path = f"/v2/models/wide_deep/versions/{job.manifest.run}.{job.manifest.cut}/infer"
    status, answer = predicting.json("POST", path, {"inputs": json_inputs(job, 1)})
    assert (status, answer["outputs"][0]["shape"]) == (200, [1])
    assert abs(values_of(answer)[0] - job.scores[0]) <= 1e-6
    assert values_of(predicting.json("POST", path, {"inputs": json_inputs(job, 0)})[1]).shape == (0,)


def test_rows_of_tables_by_key(rows: Http, model: Any) -> None:
    status, answer = rows.json("POST", "/v2/models/user/infer", keys_body([*model.keys[:4], 10**18]))
    assert status == 200, answer
    assert (values_of(answer)[:4] == serving_rig.value_of(1, model.keys[:4])[:, None]).all()
    assert answer["parameters"]["missing"] == 1
    body, header = binary_body(
        [("keys", "UINT64", (2,), model.keys[:2].tobytes())], parameters={"binary_data_output": True}
    )
    _, headers, data = rows.ask("POST", "/v2/models/item/infer", body, header)
    size = int(headers["Inference-Header-Content-Length"])
    found = np.frombuffer(data[size:], "<f4").reshape(json.loads(data[:size])["outputs"][0]["shape"])
    assert (found == serving_rig.value_of(1, model.keys[:2])[:, None]).all()


def test_what_is_there_is_told(rows: Http, model: Any) -> None:
    assert rows.json("GET", "/v2/health/live") == (200, {"live": True})
    assert rows.json("GET", "/v2/health/ready") == (200, {"ready": True})
    status, server = rows.json("GET", "/v2")
    assert (status, server["name"], server["models"]) == (200, "oarlock", ["user", "item"])
    assert rows.json("GET", "/v2/")[0] == 200
    assert rows.json("GET", "/v2/models/user/ready") == (200, {"name": "user", "ready": True})
    _, metadata = rows.json("GET", "/v2/models/user")
    assert metadata == {
        "name": "user",
        "versions": ["0.1"],
        "platform": "oarlock",
        "inputs": [{"name": "keys", "datatype": "UINT64", "shape": [-1]}],
        "outputs": [{"name": "rows", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert rows.json("GET", "/v2/models/user/versions/0.1")[0] == 200
    assert rows.json("GET", "/v2/models/us%65r?x=1")[0] == 200


def test_nothing_is_ready_before_the_model_is_warm(model: Any) -> None:
    http = Http(loaded(model.store), begun=False)
    try:
        assert http.json("GET", "/v2/health/ready") == (503, {"ready": False})
        assert http.json("GET", "/v2/health/live")[0] == 200
        status, headers, _ = http.ask("POST", "/v2/models/user/infer", keys_body([1]))
        assert (status, headers["Retry-After"]) == (503, "1")
    finally:
        http.close()


KEYS = {"name": "keys", "datatype": "UINT64", "shape": [1], "data": [1]}
WRONG = [
    (b"", "not readable as JSON"),
    (b"{" * 100_000, "not readable as JSON"),
    (b"[" * 100_000, "not readable as JSON"),
    (b"\xff\xfe", "not readable as JSON"),
    ([], "no JSON object"),
    ({}, "given were none"),
    ({"inputs": {}}, "inputs: give a list of objects"),
    ({"inputs": [1]}, "inputs: give a list of objects"),
    ({"inputs": [{}]}, "name: give a string"),
    ({"inputs": [{**KEYS, "shape": 1}]}, "shape is no list"),
    ({"inputs": [{**KEYS, "shape": ["1"]}]}, "a dimension of 1"),
    ({"inputs": [{**KEYS, "shape": [True]}]}, "a dimension of True"),
    ({"inputs": [{**KEYS, "shape": [1] * 40}]}, "more than 2 dimensions"),
    ({"inputs": [{**KEYS, "shape": [2]}]}, "1 values are not what"),
    ({"inputs": [{**KEYS, "data": 1}]}, "data is no list"),
    ({"inputs": [{**KEYS, "data": ["1"]}]}, "'1' is no UINT64"),
    ({"inputs": [{**KEYS, "data": [1.0]}]}, "'1.0' is no UINT64"),
    ({"inputs": [{**KEYS, "data": [True]}]}, "'True' is no UINT64"),
    ({"inputs": [{**KEYS, "data": [[1]]}]}, r"'\[1\]' is no UINT64"),
    ({"inputs": [{**KEYS, "data": [-1]}]}, "outside UINT64"),
    ({"inputs": [{**KEYS, "data": [1 << 64]}]}, "outside UINT64"),
    ({"inputs": [{**KEYS, "data": [None]}]}, "null is not a key"),
    ({"inputs": [{**KEYS, "datatype": "BYTES", "data": ["\ud800"]}]}, "outside BYTES"),
    ({"inputs": [{**KEYS, "datatype": "BYTES", "data": ["a"]}]}, r"give UINT64 of shape \[n\], not BYTES"),
    ({"inputs": [{**KEYS, "parameters": {"binary_data_size": 8}}]}, "no 8 bytes of binary data left"),
    ({"inputs": [{**KEYS, "parameters": {"binary_data_size": -1}}]}, "no -1 bytes"),
    ({"inputs": [{**KEYS, "parameters": []}]}, "parameters: give an object"),
    ({"inputs": [KEYS, KEYS]}, "two inputs have the same name"),
    ({"inputs": [KEYS], "outputs": [{"name": "a"}]}, "has no output 'a'"),
    ({"inputs": [KEYS], "outputs": [{"name": "rows"}] * 2}, "asked for twice"),
    ({"inputs": [KEYS], "outputs": [{"name": "rows", "parameters": {"binary_data": 1}}]}, "give true or false"),
    ({"inputs": [KEYS], "id": 7}, "id: give a string"),
    ({"inputs": [KEYS], "id": "x" * 2000}, "id: give a string"),
    ({"inputs": [{**KEYS, "name": "k" * 300}]}, "a tensor's name has 300"),
]


@pytest.mark.parametrize(("body", "words"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_in_a_body_is_said(rows: Http, body: Any, words: str) -> None:
    status, answer = rows.json("POST", "/v2/models/user/infer", body)
    assert status == 400, answer
    assert list(answer) == ["error"]
    assert re.search(words, answer["error"]), answer
    assert rows.json("POST", "/v2/models/user/infer", {"inputs": [KEYS]})[0] == 200


def test_what_is_wrong_in_a_prediction_is_said(predicting: Http, job: Job) -> None:
    def said(column: str, **changes: Any) -> str:
        inputs = [{**each, **changes} if each["name"] == column else each for each in json_inputs(job, 2)]
        status, answer = predicting.json("POST", "/v2/models/wide_deep/infer", {"inputs": inputs})
        assert status == 400, answer
        return str(answer["error"])

    assert said("age", name="aeg").startswith("input 'age' is missing; this model needs age, spent, city, item")
    assert "input 'city': datatype FP64: give one of BYTES" in said("city", datatype="FP64", data=[1.0, 2.0])
    assert "row 1, column 'spent': 1e+300 is not a finite float32" in said("spent", data=[1.0, 1e300])
    assert "row 0, column 'spent': 'x' is not a number" in said("spent", datatype="BYTES", data=["x", "1"])
    assert "has 3 rows, another one 2" in said("item", shape=[3], data=[1, 2, 3])
    assert "give one value for each row" in said("item", shape=[1, 2], data=[1, 2])
    inputs = [*json_inputs(job, 1), KEYS]
    _, answer = predicting.json("POST", "/v2/models/wide_deep/infer", {"inputs": inputs})
    assert "input 'keys' is none of this model's" in answer["error"]


def test_statuses_of_what_is_not_there(rows: Http) -> None:
    assert rows.json("GET", "/v2/models/none")[0] == 404
    status, answer = rows.json("POST", "/v2/models/user/versions/5.5/infer", keys_body([1]))
    assert (status, "has no version '5.5' here; 0.1 is served" in answer["error"]) == (404, True)
    assert rows.json("GET", "/v2/models/user/versions/5.5/ready")[0] == 404
    assert [rows.json("GET", path)[0] for path in ("/", "/metrics", "/v2/models", "/v1/models/user", "/v2/x/y")] == [
        404
    ] * 5
    status, headers, _ = rows.ask("GET", "/v2/models/user/infer")
    assert (status, headers["Allow"]) == (405, "POST")
    assert rows.ask("DELETE", "/v2/models/user")[:1] == (405,)


def test_the_description_has_every_route_and_no_other(rows: Http) -> None:
    status, found = rows.json("GET", "/v2/openapi.json")
    assert status == 200
    told = {(method.upper(), path) for path, of in found["paths"].items() for method in of}
    assert told == {(route.method, path_of(route)) for route in ROUTES}
    open_ = {path for path, of in found["paths"].items() for each in of.values() if each["security"] == []}
    assert open_ == {"/v2/health/live", "/v2/health/ready"}
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert named == set(found["components"]["schemas"])
    for route in ROUTES:
        responses = found["paths"][path_of(route)][route.method.lower()]["responses"]
        assert route.open or {str(int(status)) for status in STATUS.values()} <= set(responses)
    operations = [each["operationId"] for of in found["paths"].values() for each in of.values()]
    assert len(set(operations)) == len(operations)


def fits(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> bool:
    """Tell whether a value is what a schema of ours says."""
    if "$ref" in schema:
        return fits(value, schemas[schema["$ref"].rpartition("/")[2]], schemas)
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": float,
    }
    if "type" not in schema:
        return True
    if not isinstance(value, kinds[schema["type"]]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if schema["type"] == "array":
        return all(fits(each, schema["items"], schemas) for each in value)
    if schema["type"] == "object" and "properties" in schema:
        known = schema["properties"]
        if set(schema.get("required", ())) - set(value) or set(value) - set(known):
            return False
        return all(fits(each, known[name], schemas) for name, each in value.items())
    return True


def test_answers_are_as_the_description_says(rows: Http) -> None:
    _, told = rows.json("GET", "/v2/openapi.json")
    asked = [
        ("GET", path_of(route).format(name="user", version="0.1"), None) for route in ROUTES if route.method == "GET"
    ]
    asked += [
        ("POST", "/v2/models/user/infer", keys_body([1], id="a")),
        ("POST", "/v2/models/none/infer", keys_body([1])),
    ]
    asked += [("GET", "/v2/models/none/ready", None)]
    for method, path, body in asked:
        status, answer = rows.json(method, path, body)
        pattern = next(
            p
            for p in told["paths"]
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", p), path) and method.lower() in told["paths"][p]
        )
        responses = told["paths"][pattern][method.lower()]["responses"]
        schema = responses[str(status)]["content"]["application/json"]["schema"]
        assert fits(answer, schema, told["components"]["schemas"]), (path, answer)


def test_answers_under_swaps_are_of_one_cut_each(rows: Http, model: Any) -> None:
    def ask() -> tuple[int, Any, Any]:
        _, answer = rows.json("POST", "/v2/models/user/infer", keys_body(model.keys[:50]))
        return answer["parameters"]["cut"], model.keys[:50], values_of(answer)

    check_under_swaps(rows.serving, model, 6, ask)


def test_a_public_client_predicts_and_looks_up(predicting: Http, job: Job) -> None:
    public = pytest.importorskip("tritonclient.http")
    client = public.InferenceServerClient(predicting.address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("wide_deep")
        assert not client.is_model_ready("wide_deep", "9.9")
        metadata = client.get_model_metadata("wide_deep")
        for binary in (True, False):
            inputs = []
            for tensor in job.inputs:
                told = next(each["datatype"] for each in metadata["inputs"] if each["name"] == tensor.name)
                texts = [value.decode() for value in tensor.values.to_pylist()]
                if told == "FP32":
                    # JSON of that client has no form for a number that is missing.
                    lacks = "nan" if binary else "40"
                    values = np.array([float(text or lacks) for text in texts], np.float32)
                else:
                    values = np.array([text.encode() for text in texts], np.object_)
                made = public.InferInput(tensor.name, [len(values)], told)
                made.set_data_from_numpy(values, binary_data=binary)
                inputs.append(made)
            wanted = [public.InferRequestedOutput("score", binary_data=binary)]
            answer = client.infer("wide_deep", inputs, outputs=wanted, model_version=metadata["versions"][0])
            known = np.array([bool(value) for value in job.inputs[0].values.to_pylist()]) | binary
            assert np.abs(answer.as_numpy("score") - job.scores)[known].max() <= 1e-6
        keys = public.InferInput("keys", [3], "UINT64")
        keys.set_data_from_numpy(np.array([1, 2, 3], np.uint64))
        assert client.infer("fields", [keys]).as_numpy("rows").shape == (3, 9)
    finally:
        client.close()
